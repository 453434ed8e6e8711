"""Scaling: a number for all entries of several tensors."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry.axes import AxisSymmetry
from noetherflow.symmetry.base import Action


@final
@dataclass(frozen=True)
class ScalarSymmetry(AxisSymmetry):
    r"""Scaling of tensors, or of slices of them: `plus` by $e^{x}$, `minus` by $e^{-x}$.

    The charge is $|\theta_+|^2 - |\theta_-|^2$. Weights in front of a normalisation layer have `plus` alone.

    Args:
        plus: Axes of the tensors that grow. The dimension of an axis does not matter here, only the slice.
        minus: Axes of the tensors that shrink.

    Examples:
        >>> import torch, noetherflow as nf
        >>> symmetry = nf.ScalarSymmetry(plus=[nf.Axis("u", 0)], minus=[nf.Axis("w", 0)])
        >>> symmetry.charge({"u": torch.tensor([3.0, 4.0]), "w": torch.tensor([1.0])})
        tensor(24.)

    Source: Ziyin et al. (2024), the scaling and rescaling symmetries.
    """

    @property
    def action(self) -> Action:
        """Entries are scaled."""
        return Action.SCALES_ENTRIES

    @property
    def per_row(self) -> bool:
        """All rows share the coordinate."""
        return False

    def dimension(self, v: Params) -> int:
        """A single generator."""
        return 1

    def identity(self, v: Params) -> Tensor:
        """Zero, shape ()."""
        return v[self.names[0]].new_zeros(())

    def reduce(self, rows: Tensor) -> Tensor:
        """The sum over rows and columns, shape (*batch)."""
        return rows.sum(dim=(-2, -1))

    def gram(self, rows: Tensor) -> Tensor:
        """The trace of the Gram matrix, shape ()."""
        return self.reduce(rows.square())

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """All rows times x."""
        return x * rows

    def exponential(self, x: Tensor) -> Tensor:
        """Of a number."""
        return torch.exp(x)

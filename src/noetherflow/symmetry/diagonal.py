"""Rescaling: a number per row, that is, per neuron."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry.axes import AxisSymmetry
from noetherflow.symmetry.base import Action


@final
@dataclass(frozen=True)
class DiagonalSymmetry(AxisSymmetry):
    r"""Rescaling neuron by neuron: row $i$ of every `plus` axis by $e^{x_i}$, of every `minus` axis by $e^{-x_i}$.

    The charge has an entry per row: the squared norm of the plus rows less that of the minus rows. For a hidden ReLU
    layer, the rows of its weight and its bias are in `plus`, the columns of the next weight in `minus`.

    Args:
        plus: Axes whose rows grow; all axes must have the same number of rows.
        minus: Axes whose rows shrink.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> hidden = nf.DiagonalSymmetry(plus=into, minus=out_of)
        >>> hidden.charge(dict(net.named_parameters())).shape
        torch.Size([3])

    Source: Ziyin et al. (2024), the rescaling symmetry.
    """

    @property
    def action(self) -> Action:
        """Entries are scaled."""
        return Action.SCALES_ENTRIES

    @property
    def per_row(self) -> bool:
        """Every row has a coordinate."""
        return True

    def dimension(self, v: Params) -> int:
        """A generator per row."""
        return self.size(v)

    def identity(self, v: Params) -> Tensor:
        """Zeros, shape (n,)."""
        return v[self.names[0]].new_zeros(self.size(v))

    def reduce(self, rows: Tensor) -> Tensor:
        """The sum over columns, shape (*batch, n)."""
        return rows.sum(dim=-1)

    def gram(self, rows: Tensor) -> Tensor:
        """The diagonal of the Gram matrix, shape (n,)."""
        return self.reduce(rows.square())

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """Row i times x_i."""
        return x.unsqueeze(-1) * rows

    def exponential(self, x: Tensor) -> Tensor:
        """Entry by entry."""
        return torch.exp(x)

"""Double rotation: a matrix multiplies the rows."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from noetherflow import _spd
from noetherflow._errors import ParameterShapeError
from noetherflow._types import Params
from noetherflow.symmetry.axes import AxisSymmetry
from noetherflow.symmetry.base import Action


@final
@dataclass(frozen=True)
class MatrixSymmetry(AxisSymmetry):
    r"""Double rotation of two linear maps: rows of `plus` are multiplied by $e^{x}$, those of `minus` by $e^{-x}$.

    Both x and the charge are symmetric matrices; the charge is the Gram matrix of the plus rows less that of the minus
    rows, $W W^T - U^T U$ for the map $U W$. Any two linear maps with nothing in between have this symmetry, LoRA and
    every attention head among them. Rotations of the rows are a symmetry too, but an antisymmetric generator has no
    charge and changes no norm.

    Args:
        plus: Axes whose rows are multiplied by the exponential; all axes must have the same number of rows.
        minus: Axes whose rows are multiplied by its inverse.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2))
        >>> rotation = nf.MatrixSymmetry(plus=[nf.Axis("0.weight", 0)], minus=[nf.Axis("1.weight", 1)])
        >>> rotation.charge(dict(net.named_parameters())).shape
        torch.Size([3, 3])

    Source: Ziyin et al. (2024), the double rotation symmetry.
    """

    @property
    def action(self) -> Action:
        """Rows are mixed."""
        return Action.MIXES_ROWS

    @property
    def per_row(self) -> bool:
        """Coordinates form a matrix with a row and a column per row of the axes."""
        return True

    def dimension(self, v: Params) -> int:
        """The symmetric matrices, n (n + 1) / 2."""
        n = self.size(v)
        return n * (n + 1) // 2

    def identity(self, v: Params) -> Tensor:
        """Zeros, shape (n, n)."""
        n = self.size(v)
        return v[self.names[0]].new_zeros(n, n)

    def reduce(self, rows: Tensor) -> Tensor:
        """The sum over columns, shape (*batch, n): of squares, the diagonal of the Gram matrix."""
        return rows.sum(dim=-1)

    def gram(self, rows: Tensor) -> Tensor:
        """The Gram matrix of the rows, shape (n, n)."""
        return rows @ rows.mT

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """A matrix product."""
        return x.to(rows.dtype) @ rows

    def exponential(self, x: Tensor) -> Tensor:
        """Of a symmetric matrix."""
        scale = x.abs().max().clamp_min(1.0)
        if not (x - x.mT).abs().max() <= 1e-6 * scale:
            raise ParameterShapeError(
                "the coordinates of a MatrixSymmetry form a symmetric matrix, got one that is not: rotations have no "
                "charge; give (x + x.T) / 2"
            )
        return _spd.expm(_spd.symmetric(x))

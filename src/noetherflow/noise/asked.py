"""What the symmetries ask of each parameter's gradients, and how their Grams are put together from the answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Axis, DiagonalSymmetry, Grams, MatrixSymmetry, ScalarSymmetry, Symmetry
from noetherflow.symmetry.axes import AxisSymmetry


@final
@dataclass(frozen=True)
class Asked:
    """Which squares of one parameter's per-example gradient are wanted, beyond the sum of all.

    Args:
        rows: Their sums over everything but the first dimension.
        columns: Their sums over the first dimension.
        entries: Each of them.
        grams: Axes along which the whole Gram matrix is wanted.
    """

    rows: bool = False
    columns: bool = False
    entries: bool = False
    grams: tuple[Axis, ...] = ()


@final
@dataclass(frozen=True, eq=False)
class Squares:
    """The answers: squares of one gradient, or sums of them over examples.

    Args:
        total: The sum of all squares, shape ().
        rows: Shape (n, 1, ..., 1), or None if it was not asked for.
        columns: Shape (1, *rest), or None.
        entries: The shape of the parameter, or None; of one batch in the precision of its gradients.
        grams: For each axis asked for, shape (n, n).
    """

    total: Tensor
    rows: Tensor | None
    columns: Tensor | None
    entries: Tensor | None
    grams: dict[Axis, Tensor]

    def combine(self, other: "Squares", weight: float) -> "Squares":
        """This plus a multiple of another."""

        def both(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else torch.add(mine, theirs, alpha=weight)

        return Squares(
            self.total + weight * other.total,
            both(self.rows, other.rows),
            both(self.columns, other.columns),
            both(self.entries, other.entries),
            {axis: gram + weight * other.grams[axis] for axis, gram in self.grams.items()},
        )

    def scaled(self, factor: float) -> "Squares":
        """A multiple, in float64."""

        def times(mine: Tensor | None) -> Tensor | None:
            return None if mine is None else mine.double() if factor == 1.0 else mine.double() * factor

        return Squares(
            self.total * factor,
            times(self.rows),
            times(self.columns),
            times(self.entries),
            {axis: gram * factor for axis, gram in self.grams.items()},
        )


def asked_of(params: Params, symmetries: Mapping[str, AxisSymmetry], *, variances: bool) -> dict[str, Asked]:
    """For each parameter, what all symmetries together ask of it.

    Args:
        params: The trained parameters.
        symmetries: With canonical names.
        variances: Whether to ask for every entry of the parameters on which scalings and rescalings act.

    Returns:
        One answer sheet per parameter.
    """
    rows, columns, entries = set(), set(), set()
    grams: dict[str, dict[Axis, None]] = {name: {} for name in params}
    for symmetry in symmetries.values():
        for axis in symmetry.plus + symmetry.minus:
            tensor = params[axis.name]
            if isinstance(symmetry, MatrixSymmetry):
                grams[axis.name][axis] = None
            elif variances or (axis.within is not None and not _is_whole(axis, tensor, symmetry)):
                entries.add(axis.name)
            elif _is_whole(axis, tensor, symmetry):
                continue
            elif axis.dim % tensor.ndim == 0:
                rows.add(axis.name)
            else:
                columns.add(axis.name)
    return {
        # Sums of entries come for nothing where every entry is kept.
        name: Asked(name in rows - entries, name in columns - entries, name in entries, tuple(grams[name]))
        for name in params
    }


def grams_of(symmetry: AxisSymmetry, squares: Mapping[str, Squares], like: Params) -> Grams:
    """What one symmetry wanted to know, from the answers for each parameter."""

    def side(axes: tuple[Axis, ...]) -> Tensor:
        parts = [_along(symmetry, axis, squares[axis.name], like[axis.name]) for axis in axes]
        if parts:
            return torch.stack(parts).sum(0)
        return torch.zeros_like(side(symmetry.plus + symmetry.minus))

    return Grams(side(symmetry.plus), side(symmetry.minus))


def _along(symmetry: AxisSymmetry, axis: Axis, squares: Squares, tensor: Tensor) -> Tensor:
    if isinstance(symmetry, MatrixSymmetry):
        return squares.grams[axis]
    if squares.entries is not None:
        return symmetry.reduce(axis.rows(squares.entries)).double()
    if _is_whole(axis, tensor, symmetry):
        return squares.total
    sums = squares.rows if axis.dim % tensor.ndim == 0 else squares.columns
    assert sums is not None
    return symmetry.reduce(axis.rows(sums))


def _is_whole(axis: Axis, tensor: Tensor, symmetry: Symmetry) -> bool:
    """Whether only the sum over the whole parameter is wanted."""
    return (
        isinstance(symmetry, ScalarSymmetry)
        and axis.within is None
        and (axis.start or 0) == 0
        and axis.stop in (None, tensor.shape[axis.dim])
    )


def names_with_variances(symmetries: Mapping[str, Symmetry]) -> list[str]:
    """The parameters on which scalings and rescalings act."""
    commuting = [one for one in symmetries.values() if isinstance(one, (ScalarSymmetry, DiagonalSymmetry))]
    return list(dict.fromkeys(name for symmetry in commuting for name in symmetry.names))

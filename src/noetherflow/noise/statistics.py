"""Which statistics of each parameter's gradients the symmetries request, and their layout in a vector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Action, Axis, AxisSymmetry, Grams, Symmetry


@final
@dataclass(frozen=True)
class Requested:
    """Which squares of one parameter's per-example gradient are requested, beyond the sum of all.

    Args:
        rows: Their sums over everything but the first dimension.
        columns: Their sums over the first dimension.
        entries: Each of them.
        grams: Axes along which the Gram matrix is requested.
        weighted: The sum of all, each times a weight that the step is given.
    """

    rows: bool = False
    columns: bool = False
    entries: bool = False
    grams: tuple[Axis, ...] = ()
    weighted: bool = False

    def covers(self, other: "Requested") -> bool:
        """Whether these statistics contain those of another request; sums follow from entries."""
        return (
            (self.rows or self.entries or not other.rows)
            and (self.columns or self.entries or not other.columns)
            and (self.entries or not other.entries)
            and (self.weighted or not other.weighted)
            and set(other.grams) <= set(self.grams)
        )


# The position of statistics that are not requested.
ABSENT = -1


@final
@dataclass(frozen=True)
class StatisticsLayout:
    """Where the squares of one parameter's gradients are in a vector: their total comes first.

    Args:
        shape: Of the parameter.
        requested: Which statistics are requested.
        rows: Where sums by row begin, or ABSENT.
        columns: Where sums by column begin, or ABSENT.
        grams: Where the Gram matrix along each axis begins.
        length: Of the vector.
        diagonal: Whether of Gram matrices only the diagonal is there.
        weighted: Where the weighted sum is, or ABSENT.
    """

    shape: torch.Size
    requested: Requested
    rows: int
    columns: int
    grams: dict[Axis, int]
    length: int
    diagonal: bool = False
    weighted: int = ABSENT

    @classmethod
    def of(cls, shape: torch.Size, requested: Requested, *, diagonal: bool = False) -> "StatisticsLayout":
        """The layout in which total, weighted sum, rows, columns and Gram matrices follow each other."""
        weighted = rows = columns = ABSENT
        end = 1
        if requested.weighted:
            weighted, end = end, end + 1
        if requested.rows:
            rows, end = end, end + shape[:1].numel()
        if requested.columns:
            columns, end = end, end + shape[1:].numel()
        grams = {}
        for axis in requested.grams:
            size = axis.size(torch.empty(shape, device="meta"))
            grams[axis], end = end, end + (size if diagonal else size**2)
        return cls(shape, requested, rows, columns, grams, end, diagonal, weighted)

    @property
    def has_total_only(self) -> bool:
        """Whether nothing but the sum of all squares is requested."""
        return self.length == 1 and not self.requested.entries

    @property
    def is_of_vector(self) -> bool:
        """Whether the parameter is a vector or a number of which no more than sums by row are requested."""
        return len(self.shape) < 2 and not (self.requested.columns or self.requested.entries or self.grams)

    def rows_from(self, first: int) -> int:
        """Where sums by row begin for a part of the parameter that begins with some row, or ABSENT."""
        return self.rows if self.rows == ABSENT else self.rows + first

    def diagonals(self) -> tuple["StatisticsLayout", Tensor]:
        """The layout with the diagonals of Gram matrices only, and the indices of its numbers in this layout."""
        thin = StatisticsLayout.of(self.shape, self.requested, diagonal=True)
        parts = [torch.arange(min([*self.grams.values(), self.length]))]
        for axis, start in self.grams.items():
            size = axis.size(torch.empty(self.shape, device="meta"))
            parts.append(start + (size + 1) * torch.arange(size))
        return thin, torch.cat(parts)


@final
@dataclass(frozen=True, eq=False)
class Squares:
    """Squares of one gradient, or sums of them over examples.

    Args:
        layout: Where each statistic is in the vector.
        numbers: Shape (..., length of the layout), float64.
        entries: The square of every entry, if requested, shape (..., *shape of the parameter).
    """

    layout: StatisticsLayout
    numbers: Tensor
    entries: Tensor | None

    @property
    def total(self) -> Tensor:
        """The sum of all squares."""
        return self.numbers[..., 0]

    @property
    def weighted(self) -> Tensor | None:
        """The sum of all squares, each times its weight, or None if it is not requested."""
        return None if self.layout.weighted == ABSENT else self.numbers[..., self.layout.weighted]

    @property
    def rows(self) -> Tensor | None:
        """Shape (n, 1, ..., 1), or None if they are not requested."""
        shape = self.layout.shape
        return self._part(self.layout.rows, (*shape[:1], *(1,) * len(shape[1:])))

    @property
    def columns(self) -> Tensor | None:
        """Shape (1, *rest), or None."""
        shape = self.layout.shape
        return self._part(self.layout.columns, (*(1,) * len(shape[:1]), *shape[1:]))

    def gram(self, axis: Axis) -> Tensor:
        """The Gram matrix along an axis, shape (n, n), or (n,) if there are only diagonals."""
        start = self.layout.grams[axis]
        size = axis.size(torch.empty(self.layout.shape, device="meta"))
        part = self.numbers[..., start : start + (size if self.layout.diagonal else size**2)]
        return part if self.layout.diagonal else part.unflatten(-1, (size, size))

    def _part(self, start: int, shape: tuple[int, ...]) -> Tensor | None:
        if start == ABSENT:
            return None
        part = self.numbers[..., start : start + math.prod(shape)]
        return part.reshape((*part.shape[:-1], *shape))


def requested_of(
    params: Params, symmetries: Mapping[str, AxisSymmetry], *, variances: bool, weighted: bool = False
) -> dict[str, Requested]:
    """For each parameter, what all symmetries together request.

    Args:
        params: The trained parameters.
        symmetries: With canonical names.
        variances: Whether to request every entry of the parameters on which scalings and rescalings act.
        weighted: Whether to request weighted sums of the squares of all parameters.

    Returns:
        One request per parameter.
    """
    rows, columns, entries = set(), set(), set()
    grams: dict[str, dict[Axis, None]] = {name: {} for name in params}
    for symmetry in symmetries.values():
        for axis in symmetry.plus + symmetry.minus:
            tensor = params[axis.name]
            if symmetry.action is Action.MIXES_ROWS:
                grams[axis.name][axis] = None
            elif variances or (axis.within is not None and not _is_total(axis, tensor, symmetry)):
                entries.add(axis.name)
            elif _is_total(axis, tensor, symmetry):
                continue
            elif axis.dim % max(1, tensor.ndim) == 0:
                rows.add(axis.name)
            else:
                columns.add(axis.name)
    # Where every entry is kept, sums by row and column follow from the entries.
    rows, columns = rows - entries, columns - entries
    return {
        name: Requested(name in rows, name in columns, name in entries, tuple(grams[name]), weighted) for name in params
    }


def grams_of(symmetry: AxisSymmetry, squares: Mapping[str, Squares], like: Params) -> Grams:
    """The Grams of one symmetry, from the squares of each parameter."""
    # No function inside this one: a function that refers to itself keeps all squares until cycles are collected.
    return Grams(*(_side(symmetry, axes, squares, like) for axes in (symmetry.plus, symmetry.minus)))


def _side(symmetry: AxisSymmetry, axes: tuple[Axis, ...], squares: Mapping[str, Squares], like: Params) -> Tensor:
    """The sum over the axes of a side; zeros for a side without axes."""
    parts = [_along(symmetry, axis, squares[axis.name], like[axis.name]) for axis in axes]
    if parts:
        return torch.stack(parts).sum(0)
    return torch.zeros_like(_side(symmetry, symmetry.plus + symmetry.minus, squares, like))


def _along(symmetry: AxisSymmetry, axis: Axis, squares: Squares, tensor: Tensor) -> Tensor:
    if symmetry.action is Action.MIXES_ROWS:
        return squares.gram(axis)
    if squares.entries is not None:
        return symmetry.reduce(axis.rows(squares.entries)).double()
    if _is_total(axis, tensor, symmetry):
        return squares.total
    sums = squares.rows if axis.dim % max(1, tensor.ndim) == 0 else squares.columns
    assert sums is not None
    return symmetry.reduce(axis.rows(sums))


def _is_total(axis: Axis, tensor: Tensor, symmetry: AxisSymmetry) -> bool:
    """Whether only the sum over all entries of the parameter is requested."""
    return (
        not symmetry.per_row
        and axis.within is None
        and (axis.start or 0) == 0
        and (not tensor.ndim or axis.stop in (None, tensor.shape[axis.dim]))
    )


def names_with_variances(symmetries: Mapping[str, Symmetry]) -> list[str]:
    """The parameters on which scalings and rescalings act."""
    commuting = [s for s in symmetries.values() if s.action is Action.SCALES_ENTRIES]
    return list(dict.fromkeys(name for symmetry in commuting for name in symmetry.names))

"""What the symmetries ask of each parameter's gradients, and how their Grams are put together from the answers."""

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


# Where nothing was asked for.
ABSENT = -1


@final
@dataclass(frozen=True)
class Page:
    """Where in a vector the squares of one parameter's gradients are: their total comes first.

    Args:
        shape: Of the parameter.
        asked: What is wanted.
        rows: Where sums by row begin, or ABSENT.
        columns: The same by column.
        grams: Where the Gram matrix along each axis begins.
        length: Of the vector.
        diagonal: Whether of Gram matrices only the diagonal is there.
    """

    shape: torch.Size
    asked: Asked
    rows: int
    columns: int
    grams: dict[Axis, int]
    length: int
    diagonal: bool = False

    @classmethod
    def of(cls, shape: torch.Size, asked: Asked, *, diagonal: bool = False) -> "Page":
        """One field after the other."""
        rows = columns = ABSENT
        end = 1
        if asked.rows:
            rows, end = end, end + shape[:1].numel()
        if asked.columns:
            columns, end = end, end + shape[1:].numel()
        grams = {}
        for axis in asked.grams:
            size = axis.size(torch.empty(shape, device="meta"))
            grams[axis], end = end, end + (size if diagonal else size**2)
        return cls(shape, asked, rows, columns, grams, end, diagonal)

    def rows_from(self, first: int) -> int:
        """Where sums by row begin for a part of the parameter that begins with some row, or ABSENT."""
        return self.rows if self.rows == ABSENT else self.rows + first

    def diagonals(self) -> tuple["Page", Tensor]:
        """The page with but the diagonals of Gram matrices, and where in the vector of this one its numbers are."""
        thin = Page.of(self.shape, self.asked, diagonal=True)
        parts = [torch.arange(min([*self.grams.values(), self.length]))]
        for axis, start in self.grams.items():
            size = axis.size(torch.empty(self.shape, device="meta"))
            parts.append(start + (size + 1) * torch.arange(size))
        return thin, torch.cat(parts)


@final
@dataclass(frozen=True, eq=False)
class Squares:
    """The answers: squares of one gradient, or sums of them over examples.

    Args:
        page: Where in the vector what is.
        numbers: Shape (..., length of the page), float64.
        entries: The square of every entry if they were asked for, shape (..., *shape of the parameter).
    """

    page: Page
    numbers: Tensor
    entries: Tensor | None

    @property
    def total(self) -> Tensor:
        """The sum of all squares."""
        return self.numbers[..., 0]

    @property
    def rows(self) -> Tensor | None:
        """Shape (n, 1, ..., 1), or None if they were not asked for."""
        shape = self.page.shape
        return self._part(self.page.rows, (*shape[:1], *(1,) * len(shape[1:])))

    @property
    def columns(self) -> Tensor | None:
        """Shape (1, *rest), or None."""
        shape = self.page.shape
        return self._part(self.page.columns, (*(1,) * len(shape[:1]), *shape[1:]))

    def gram(self, axis: Axis) -> Tensor:
        """The Gram matrix along an axis, shape (n, n), or (n,) if there are only diagonals."""
        start = self.page.grams[axis]
        size = axis.size(torch.empty(self.page.shape, device="meta"))
        part = self.numbers[..., start : start + (size if self.page.diagonal else size**2)]
        return part if self.page.diagonal else part.unflatten(-1, (size, size))

    def _part(self, start: int, shape: tuple[int, ...]) -> Tensor | None:
        if start == ABSENT:
            return None
        part = self.numbers[..., start : start + math.prod(shape)]
        return part.reshape((*part.shape[:-1], *shape))


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
            if symmetry.action is Action.MIXES_ROWS:
                grams[axis.name][axis] = None
            elif variances or (axis.within is not None and not _is_whole(axis, tensor, symmetry)):
                entries.add(axis.name)
            elif _is_whole(axis, tensor, symmetry):
                continue
            elif axis.dim % max(1, tensor.ndim) == 0:
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
    if _is_whole(axis, tensor, symmetry):
        return squares.total
    sums = squares.rows if axis.dim % max(1, tensor.ndim) == 0 else squares.columns
    assert sums is not None
    return symmetry.reduce(axis.rows(sums))


def _is_whole(axis: Axis, tensor: Tensor, symmetry: AxisSymmetry) -> bool:
    """Whether only the sum over the whole parameter is wanted."""
    return (
        not symmetry.per_row
        and axis.within is None
        and (axis.start or 0) == 0
        and (not tensor.ndim or axis.stop in (None, tensor.shape[axis.dim]))
    )


def names_with_variances(symmetries: Mapping[str, Symmetry]) -> list[str]:
    """The parameters on which scalings and rescalings act."""
    commuting = [one for one in symmetries.values() if one.action is Action.SCALES_ENTRIES]
    return list(dict.fromkeys(name for symmetry in commuting for name in symmetry.names))

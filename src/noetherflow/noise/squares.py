"""The squares of one gradient, or of gradients stacked along a leading axis: passes over memory, as few as possible."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.passes import accumulator, pile, scanner, vector_squares, wide
from noetherflow.symmetry import Axis


class Sums(NamedTuple):
    """The squares of each example's gradient, summed, those of the sum of gradients, and that sum if it was kept."""

    each: Squares
    whole: Squares
    gradient: Tensor | None


def squares_of(gradient: Tensor, asked: Asked) -> Squares:
    """The squares of a single gradient."""
    one = wide(gradient)
    if one.ndim < 2:
        return _of_vector(one.square(), asked, one.reshape(1, -1))
    matrix = one.reshape(len(one), -1)
    tally = Tally(asked, matrix)
    tally.scanner(matrix)()
    return tally.squares(one.shape, gradient_grams(asked, one), lambda matrix: matrix.reshape(-1, *one.shape[1:]))


def squares_of_vectors(stack: Tensor, asked: Asked) -> Sums:
    """The squares of vectors stacked along a leading axis, in few operations; without Gram matrices."""
    total, squares = vector_squares(stack)
    each, whole = (
        Squares(
            one[-1],
            one[:-1] if asked.rows else None,
            one[-1:] if asked.columns else None,
            one[:-1] if asked.entries else None,
            {},
        )
        for one in squares.unbind()
    )
    return Sums(each, whole, total)


def squares_of_stack(stack: Tensor, asked: Asked) -> tuple[Squares, Tensor]:
    """The squares of gradients stacked along a leading axis, summed over it, and the sum of the gradients."""
    flat = stack.reshape(len(stack), -1)
    total, sums = pile(flat)
    total, sums = (one.reshape(stack.shape[1:]) for one in (total, sums))
    if sums.ndim < 2:
        return _of_vector(sums, asked, wide(flat)), total
    grams = {}
    for axis in asked.grams:
        side = axis.rows(wide(stack), batch_dims=1).movedim(0, 1).flatten(1)
        grams[axis] = (side @ side.mT).double()
    rows = sums.flatten(1).sum(1)
    return Squares(
        rows.sum(),
        rows.reshape(rows_shape(sums.shape)) if asked.rows else None,
        sums.sum(0, keepdim=True) if asked.columns else None,
        sums if asked.entries else None,
        grams,
    ), total


def _of_vector(squares: Tensor, asked: Asked, stack: Tensor) -> Squares:
    """What is asked of vectors or numbers, whose entries are their rows: from sums of squares, and from all of them."""
    exact = squares.double()
    total = exact.sum()
    columns = total.reshape([1] * squares.ndim) if asked.columns else None
    grams = {}
    if asked.grams:
        # Stacked, they are a matrix, whose second dimension is their first.
        turned = {replace(axis, dim=1): axis for axis in asked.grams}
        found = gradient_grams(Asked(grams=tuple(turned)), stack)
        grams = {turned[axis]: gram for axis, gram in found.items()}
    return Squares(total, exact if asked.rows else None, columns, squares if asked.entries else None, grams)


def gradient_grams(asked: Asked, gradient: Tensor) -> dict[Axis, Tensor]:
    """The Gram matrices of a single gradient."""
    sums = GramSums(asked.grams, gradient)
    sums.add()
    return sums.found()


def rows_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape of sums over all but the first dimension."""
    return (shape[0], *(1,) * (len(shape) - 1))


@final
class Tally:
    """Squares of gradients that are matrices, some rows at a time, best while the cache still holds them.

    Args:
        asked: What to add up.
        like: Of the shape of a gradient, the type of its numbers and their device.
    """

    def __init__(self, asked: Asked, like: Tensor) -> None:
        self._asked = asked
        self._rows = like.new_zeros(like.shape[0], dtype=torch.float64)
        self._columns = like.new_zeros(like.shape[1], dtype=torch.float64) if asked.columns else None
        self._entries = torch.zeros_like(like, dtype=accumulator(like)) if asked.entries else None

    def scanner(self, strip: Tensor, part: slice = slice(None), total: Tensor | None = None) -> Callable[[], None]:
        """A pass over what some rows hold whenever it is called.

        Args:
            strip: The rows.
            part: Which ones.
            total: What else to add them to.

        Returns:
            The pass.
        """
        entries = None if self._entries is None else self._entries[part]
        return scanner(strip, self._rows[part], self._columns, entries, total)

    def squares(self, shape: torch.Size, grams: dict[Axis, Tensor], folded: Callable[[Tensor], Tensor]) -> Squares:
        """What there is.

        Args:
            shape: Of the parameter.
            grams: Its Gram matrices.
            folded: From some rows of the matrix to some of the parameter.

        Returns:
            The squares.
        """
        return Squares(
            self._rows.sum(),
            self._rows.view(rows_shape(shape)) if self._asked.rows else None,
            None if self._columns is None else folded(self._columns[None]),
            None if self._entries is None else folded(self._entries),
            grams,
        )


@final
class GramSums:
    """Gram matrices along axes, added up over what a buffer holds from time to time; those of heads in one product.

    Args:
        axes: Along which.
        buffer: Of the shape of the parameter.
    """

    def __init__(self, axes: Sequence[Axis], buffer: Tensor) -> None:
        self._buffer = buffer
        self._groups = [(group, _stacked_rows(group, buffer)) for group in _heads(axes, buffer.ndim)]
        kind = accumulator(buffer)
        self._sums = [rows.new_zeros(*rows.shape[:2], rows.shape[1], dtype=kind) for _, rows in self._groups]

    def add(self) -> None:
        """Add what the buffer holds now."""
        for (group, rows), sums in zip(self._groups, self._sums, strict=True):
            if rows.untyped_storage().data_ptr() != self._buffer.untyped_storage().data_ptr():
                rows = _stacked_rows(group, self._buffer)  # some unfoldings are copies
            rows = wide(rows)
            sums.baddbmm_(rows, rows.mT)

    def found(self) -> dict[Axis, Tensor]:
        """The sums, in float64."""
        groups = zip(self._groups, self._sums, strict=True)
        return {axis: gram for (group, _), sums in groups for axis, gram in zip(group, sums.double(), strict=True)}


def _heads(axes: Sequence[Axis], ndim: int) -> list[list[Axis]]:
    """Axes by groups of neighbouring slices of one length, along one dimension of a matrix."""
    groups: list[list[Axis]] = []
    for axis in sorted(axes, key=lambda one: (one.dim % ndim, one.start or 0)):
        last = groups[-1][-1] if groups else None
        if last is not None and ndim == 2 and _follows(axis, last):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _follows(axis: Axis, last: Axis) -> bool:
    if (
        axis.stop is None
        or last.stop is None
        or (axis.within, last.within, axis.repeat, last.repeat) != (None, None, 1, 1)
    ):
        return False
    start = last.start or 0
    return axis.dim % 2 == last.dim % 2 and axis.start == last.stop and axis.stop - last.stop == last.stop - start


def _stacked_rows(group: Sequence[Axis], tensor: Tensor) -> Tensor:
    """Shape (heads, rows, everything else)."""
    first = group[0]
    if len(group) == 1:
        return first.rows(tensor)[None]
    start, count, dim = first.start or 0, len(group), first.dim % 2
    part = tensor.narrow(dim, start, (group[-1].stop or 0) - start).unflatten(dim, (count, -1))
    return part if dim == 0 else part.permute(1, 2, 0)

"""The squares of one gradient, or of gradients stacked along a leading axis: passes over memory, as few as possible."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked, Squares
from noetherflow.symmetry import Axis

# Numbers over which columns are added up: so few that they stay next to the core.
_BLOCK = 2**16


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
    tally = Tally(asked)
    tally.add(one.reshape(len(one), -1))
    return tally.squares(one.shape, gradient_grams(asked, one), lambda matrix: matrix.reshape(-1, *one.shape[1:]))


def squares_of_stack(stack: Tensor, asked: Asked) -> Squares:
    """The squares of gradients stacked along a leading axis, summed over it."""
    one = wide(stack)
    # Examples that are small are like rows of one matrix.
    flat = one.reshape(len(one), -1)
    if flat.numel() <= _BLOCK:
        sums = flat.square().sum(0)
    else:
        examples = Tally(Asked(columns=True))
        examples.add(flat)
        sums = examples.columns()
    sums = sums.reshape(one.shape[1:])
    if sums.ndim < 2:
        return _of_vector(sums, asked, flat)
    grams = {}
    for axis in asked.grams:
        side = axis.rows(one, batch_dims=1).movedim(0, 1).flatten(1)
        grams[axis] = (side @ side.mT).double()
    tally = Tally(asked)
    tally.add_squares(sums.reshape(len(sums), -1))
    return tally.squares(sums.shape, grams, lambda matrix: matrix.reshape(-1, *sums.shape[1:]))


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


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type in which sums are kept: float32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in that type."""
    return tensor.to(accumulator(tensor))


@final
class Tally:
    """Squares of a matrix that comes some rows at a time, best while the cache still holds them.

    Args:
        asked: What to add up.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._lengths: list[Tensor] = []
        self._sums: Tensor | None = None
        self._entries: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Take the next rows of a gradient."""
        strip = wide(strip)
        if self._asked.entries:
            self.add_squares(strip.square())
            return
        for sums, block in self.blocks(strip):
            sums.addcmul_(block, block)
        if self._asked.rows:
            self.add_lengths(torch.linalg.vector_norm(strip, dim=1).square())
        elif not self._asked.columns:
            self.add_lengths(torch.linalg.vector_norm(strip).square()[None])

    def blocks(self, strip: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parts of the next rows, each with what its squares are to be added to, if columns are asked for."""
        if not self._asked.columns:
            return []
        if self._sums is None:
            count = min(len(strip), max(1, _BLOCK // strip.shape[1]))
            self._sums = strip.new_zeros(count, strip.shape[1], dtype=accumulator(strip))
        sums = self._sums
        return [(sums[: len(block)], block) for block in strip.split(len(sums))]

    def add_squares(self, squares: Tensor) -> None:
        """Take the squares of all rows, entry by entry."""
        if self._asked.rows:
            self._lengths.append(squares.sum(1))
        if self._asked.entries:
            self._entries.append(squares)
        if self._asked.columns or not self._asked.rows:
            self._sums = squares.sum(0, keepdim=True) if self._sums is None else self._sums + squares.sum(0)

    def add_lengths(self, lengths: Tensor) -> None:
        """Take the squared lengths of the next rows, shape (rows,) if they are asked for, and (1,) if not."""
        self._lengths.append(lengths)

    def columns(self) -> Tensor:
        """The sums over columns, if they are asked for."""
        assert self._sums is not None
        return self._sums.sum(0)

    def squares(self, shape: torch.Size, grams: dict[Axis, Tensor], folded: Callable[[Tensor], Tensor]) -> Squares:
        """What there is.

        Args:
            shape: Of the parameter.
            grams: Its Gram matrices.
            folded: From some rows of the matrix to some of the parameter.

        Returns:
            The squares.
        """
        lengths = torch.cat(self._lengths).double() if self._lengths else None
        columns = None if self._sums is None else self.columns().double()
        some = lengths if lengths is not None else columns
        assert some is not None
        return Squares(
            some.sum(),
            lengths.reshape(rows_shape(shape)) if self._asked.rows and lengths is not None else None,
            folded(columns[None]) if self._asked.columns and columns is not None else None,
            folded(torch.cat(self._entries)) if self._entries else None,
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

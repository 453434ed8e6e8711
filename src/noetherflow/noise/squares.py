"""The squares of one gradient, or of gradients stacked along a leading axis: passes over memory, as few as possible."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked, Squares
from noetherflow.symmetry import Axis

# Numbers that the cache next to a core holds.
_BLOCK = 2**16


class Sums(NamedTuple):
    """The squares of each example's gradient, summed, those of the sum of gradients, and that sum if it was kept."""

    each: Squares
    whole: Squares
    gradient: Tensor | None


def squares_of(gradient: Tensor, asked: Asked) -> Squares:
    """The squares of a single gradient."""
    one = wide(gradient)
    shape = one.shape or torch.Size((1,))
    flat = one.reshape(shape[0], -1)
    tally = Tally(asked)
    for block in flat.split(max(1, _BLOCK // flat.shape[1])) if asked.columns else (flat,):
        tally.add(block)
    grams = GramSums(asked.grams, one)
    grams.add()
    found = tally.squares(shape, grams.found(), lambda matrix: matrix.reshape(len(matrix), *shape[1:]))
    return found if one.ndim else found.of_number()


def squares_of_stack(stack: Tensor, asked: Asked) -> Squares:
    """The squares of gradients stacked along a leading axis, summed over it."""
    one = wide(stack)
    shape = one.shape[1:] or torch.Size((1,))
    # Examples that are small are like rows of one matrix.
    flat = one.reshape(len(one), -1)
    sums = torch.stack([block.square().sum(0) for block in flat.split(max(1, _BLOCK // flat.shape[1]))]).sum(0)
    tally = Tally(asked)
    tally.add_squares(sums.reshape(shape[0], -1))
    grams = {}
    for axis in asked.grams:
        side = axis.rows(one, batch_dims=1).movedim(0, 1).flatten(1)
        grams[axis] = (side @ side.mT).double()
    found = tally.squares(shape, grams, lambda matrix: matrix.reshape(len(matrix), *shape[1:]))
    return found if one.ndim > 1 else found.of_number()


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
        self._columns: list[Tensor] = []
        self._entries: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Take the next rows of a gradient."""
        strip = wide(strip)
        if self._asked.columns or self._asked.entries:
            self.add_squares(strip.square())
        elif self._asked.rows:
            self.add_lengths(torch.linalg.vector_norm(strip, dim=1).square())
        else:
            self.add_lengths(torch.linalg.vector_norm(strip).square()[None])

    def add_squares(self, squares: Tensor) -> None:
        """Take the squares of the next rows, entry by entry."""
        self._columns.append(squares.sum(0))
        if self._asked.rows:
            self._lengths.append(squares.sum(1))
        if self._asked.entries:
            self._entries.append(squares)

    def add_lengths(self, lengths: Tensor) -> None:
        """Take the squared lengths of the next rows, shape (rows,) if they are asked for, and (1,) if not."""
        self._lengths.append(lengths)

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
        columns = torch.stack(self._columns).sum(0, dtype=torch.float64) if self._columns else None
        some = columns if columns is not None else lengths
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

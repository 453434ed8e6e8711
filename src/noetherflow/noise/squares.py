"""The squares of one gradient, or of gradients stacked along a leading axis: passes over memory, as few as possible."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked
from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, scan_stack, scan_vectors, scanner, wide
from noetherflow.symmetry import Axis


def square(gradient: Tensor, sums: Sums, row: int) -> None:
    """Add the squares of a single gradient to one of the two rows of sums."""
    one = wide(gradient).contiguous()
    scanner(one if one.ndim == 2 else one.reshape(one.shape[:1].numel(), -1), sums, row)(False)
    if sums.page.grams:
        sums.add_grams(row, gradient_grams(sums.page.asked, one))


def square_stack(stack: Tensor, sums: Sums) -> Tensor:
    """Add the squares of gradients stacked along a leading axis to sums over examples; the sum of the gradients."""
    shape = sums.page.shape
    total = scan_stack(stack.reshape(len(stack), shape[:1].numel(), -1).contiguous(), sums)
    for axis in sums.page.asked.grams:
        side = axis.rows(wide(stack), batch_dims=1).movedim(0, 1).flatten(1)
        sums.add_grams(EACH, {axis: (side @ side.mT).double()})
    return total.view(shape)


def square_vectors(stack: Tensor, sums: Sums) -> Tensor:
    """The same for vectors or numbers, and for their sum as well."""
    total = scan_vectors(stack if stack.ndim == 2 else stack.reshape(len(stack), -1), sums)
    grams = sums.page.grams
    if grams:
        # Stacked, they are a matrix, whose second dimension is their first.
        turned = {replace(axis, dim=1): axis for axis in grams}
        for row, one in ((EACH, wide(stack)), (WHOLE, total[None])):
            found = gradient_grams(Asked(grams=tuple(turned)), one)
            sums.add_grams(row, {turned[axis]: gram for axis, gram in found.items()})
    return total if sums.page.shape else total.view(())


def gradient_grams(asked: Asked, gradient: Tensor) -> dict[Axis, Tensor]:
    """The Gram matrices of a single gradient."""
    if not asked.grams:
        return {}
    sums = GramSums(asked.grams, gradient)
    sums.add(gradient)
    return sums.found()


@final
class GramSums:
    """Gram matrices along axes, added up over gradients; those of heads in one product.

    Args:
        axes: Along which.
        like: A tensor of the shape and type of the gradients.

    Attributes:
        shape: Of the gradients.
        memory: All sums, one after the other.
    """

    def __init__(self, axes: Sequence[Axis], like: Tensor) -> None:
        self.shape, self._groups = like.shape, _heads(axes, like.ndim)
        shapes = [(len(rows), rows.shape[1], rows.shape[1]) for rows in self._rows(like)]
        self.memory = like.new_zeros(sum(map(math.prod, shapes)), dtype=accumulator(like))
        parts = self.memory.split([math.prod(shape) for shape in shapes])
        self._sums = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def add(self, gradient: Tensor) -> None:
        """Add those of a gradient."""
        for rows, sums in zip(self._rows(wide(gradient)), self._sums, strict=True):
            sums.baddbmm_(rows, rows.mT)

    def _rows(self, gradient: Tensor) -> list[Tensor]:
        return [_stacked_rows(group, gradient) for group in self._groups]

    @property
    def heads(self) -> tuple[tuple[int, int, int, int], ...] | None:
        """Of each Gram matrix its dimension, first row, number of rows, and place in memory; None if it has others."""
        axes = [axis for group in self._groups for axis in group]
        if len(self.shape) != 2 or any(axis.within is not None or axis.repeat != 1 for axis in axes):
            return None
        sizes = [axis.size(torch.empty(self.shape, device="meta")) for axis in axes]
        places = [0, *accumulate(size**2 for size in sizes)][: len(axes)]
        each = zip(axes, sizes, places, strict=True)
        return tuple((axis.dim % 2, axis.start or 0, size, place) for axis, size, place in each)

    def found(self) -> dict[Axis, Tensor]:
        """The sums, in float64."""
        groups = zip(self._groups, self._sums, strict=True)
        return {axis: gram for group, sums in groups for axis, gram in zip(group, sums.double(), strict=True)}


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

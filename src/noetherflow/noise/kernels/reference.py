"""The specification: batched functions of tensors, chunked by bytes, without a loop over examples, on any device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar, final

import torch
from torch import Tensor

from noetherflow.noise.buffers import EACH, OF_SUM, Buffer
from noetherflow.noise.kernels.base import Window, accumulator
from noetherflow.noise.kernels.costs import Costs, prefer_tokens_for_sum
from noetherflow.noise.kernels.formulas import (
    add_grams,
    square_by_tokens,
    square_rows,
    square_single_tokens,
    tables_of,
    widened,
)

# Bytes of gradients that are formed at a time: on a CPU they stay in the cache, elsewhere launches are few.
_CACHE, _MEMORY = 2**20, 2**28


class Batched(ABC):
    """The formulas that all sets share; a set says how it accumulates a stack, and what that costs."""

    name: ClassVar[str]
    costs: ClassVar[Costs]

    @abstractmethod
    def accumulate(self, stack: Tensor, buffer: Buffer, row: int, total: Tensor | None = None, first: int = 0) -> None:
        """See `Kernels`."""

    def add_stacks(self, stacks: Iterable[Tensor], buffer: Buffer, first: int = 0) -> Tensor:
        """See `Kernels`."""
        total: Tensor | None = None
        for stack in stacks:
            if total is None:
                total = stack.new_zeros(stack.shape[1:], dtype=accumulator(stack))
            self.accumulate(stack, buffer, EACH, total, first)
        assert total is not None
        self.accumulate(total[None], buffer, OF_SUM, first=first)
        return total

    def outer_products(self, x: Tensor, d: Tensor, buffer: Buffer, *, needs_sum: bool) -> Tensor | None:
        """See `Kernels`."""
        x, d = widened(x, d)
        (n, m), requested = (d.shape[2], x.shape[2]), buffer.layout.requested
        if x.shape[1] == 1:
            square_single_tokens(x[:, 0], d[:, 0], buffer)
        elif self.costs.prefer_tokens(x.shape[1], n, m, requested):
            square_by_tokens(x, d, buffer, EACH)
        else:
            return self._form(d.mT, x, buffer)
        x, d = x.flatten(0, 1), d.flatten(0, 1)
        if not needs_sum and prefer_tokens_for_sum(len(x), n, m, requested):
            square_by_tokens(x[None], d[None], buffer, OF_SUM)
            return None
        total = x.new_empty(1, n, m)
        self._multiply(d.mT[None], x[None], total)
        self.accumulate(total, buffer, OF_SUM)
        return total[0]

    def patches(self, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
        """See `Kernels`."""
        x, d = widened(x, d)
        shape = buffer.layout.shape
        n, m, places = d.shape[1], shape[1:].numel(), d.shape[2:].numel()
        # Token Grams know matrices only, not the dimensions of a kernel.
        plain = window.groups == 1 and not buffer.layout.grams
        by_tokens = plain and self.costs.prefer_tokens(places, n, m, buffer.layout.requested)
        if x.is_cpu and not by_tokens:
            # Patches are not copied, and products have the vectors of oneDNN. Elsewhere many groups are slow.
            parts = chunks(len(x), n * m * x.element_size(), x)
            products = (window.gradients(x[part], d[part], shape) for part in parts)
            return self.add_stacks((stack.reshape(-1, n, m) for stack in products), buffer).view(shape)
        parts = chunks(len(x), max(n, window.groups * places) * m * x.element_size(), x)

        def factors(part: slice) -> tuple[Tensor, Tensor]:
            right = window.patches(x[part])
            return d[part].reshape(*right.shape[:2], n // window.groups, places), right.mT

        if not by_tokens:
            products = (left @ right for left, right in map(factors, parts))
            return self.add_stacks((stack.reshape(len(stack), n, m) for stack in products), buffer).view(shape)
        for left, right in map(factors, parts):
            square_by_tokens(right[:, 0], left[:, 0].mT, buffer, EACH)
        total = window.gradient(x, d, shape)
        self.accumulate(total.reshape(1, n, m), buffer, OF_SUM)
        return total

    def table_rows(self, ids: Tensor, d: Tensor, buffer: Buffer) -> Tensor:
        """See `Kernels`."""
        layout, (d,) = buffer.layout, widened(d)
        if any(axis.dim % 2 == 0 or axis.within for axis in layout.requested.grams):
            # Rows of an example's gradient meet each other: it has to be formed.
            parts = chunks(len(ids), layout.shape.numel() * d.element_size(), d)
            return self.add_stacks((tables_of(ids[part], d[part], layout.shape) for part in parts), buffer)
        square_rows(ids, d, buffer)
        total = d.new_zeros(layout.shape).index_add_(0, ids.flatten(), d.flatten(0, 1))
        self.accumulate(total[None], buffer, OF_SUM)
        return total

    def affine_sums(self, x: Tensor, d: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        return (d * ((x - mean) * scale)).sum(1), d.sum(1)

    def channel_sums(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        x, d = (images.reshape(*x.shape[:2], -1) for images in (x, d))
        return (x * d).sum(2), d.sum(2)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write products of matrices (B, n, T) and (B, T, m)."""
        torch.bmm(left, right, out=out)

    def _form(self, left: Tensor, right: Tensor, buffer: Buffer) -> Tensor:
        """Add the squares of products of matrices (B, n, T) and (B, T, m), and of their sum, which is returned."""
        n, m = left.shape[1], right.shape[2]
        # Gram matrices need all rows of a gradient.
        rows = n if buffer.layout.grams else max(1, min(n, budget(right) // max(1, m * right.element_size())))
        parts = list(chunks(len(left), rows * m * right.element_size(), right))
        memory = right.new_empty(max((len(left[part]) for part in parts), default=0) * rows * m)

        def products(selected: slice) -> Iterator[Tensor]:
            for part in parts:
                shape = len(left[part]), len(range(n)[selected]), m
                block = memory[: math.prod(shape)].view(shape)
                self._multiply(left[part, selected], right[part], block)
                yield block

        blocks = [slice(first, min(first + rows, n)) for first in range(0, n, rows)]
        totals = [self.add_stacks(products(block), buffer, block.start) for block in blocks]
        return totals[0] if len(totals) == 1 else torch.cat(totals)


@final
class Reference(Batched):
    """Functions of tensors."""

    name = "reference"
    costs = Costs(squaring=45, call=1_000_000)

    def accumulate(self, stack: Tensor, buffer: Buffer, row: int, total: Tensor | None = None, first: int = 0) -> None:
        """See `Kernels`."""
        (stack,) = widened(stack)
        if total is not None:
            total.add_(stack[0] if len(stack) == 1 else stack.sum(0))
        squares = stack[0].square() if len(stack) == 1 else stack.square().sum(0)
        _reduce(squares[None], buffer, slice(row, row + 1), first)
        add_grams(stack, buffer, row)

    def add_stacks(self, stacks: Iterable[Tensor], buffer: Buffer, first: int = 0) -> Tensor:
        """See `Kernels`."""
        total = squares = None
        for stack in stacks:
            (stack,) = widened(stack)
            if total is None or squares is None:
                total, squares = stack.sum(0), stack.square().sum(0)
            elif len(stack) == 1:
                total.add_(stack[0])
                squares.addcmul_(stack[0], stack[0])
            else:
                total.add_(stack.sum(0))
                squares.add_(stack.square().sum(0))
            add_grams(stack, buffer, EACH)
        assert total is not None
        assert squares is not None
        # Both rows of the buffer at once: half as many launches.
        _reduce(torch.stack([squares, total.square()]), buffer, slice(EACH, OF_SUM + 1), first)
        add_grams(total[None], buffer, OF_SUM)
        return total


def _reduce(squares: Tensor, buffer: Buffer, rows: slice, first: int) -> None:
    """Add squares of entries (rows of the buffer, r, m), of r rows of the gradient from the first on, to the buffer."""
    layout, requested = buffer.layout, buffer.layout.requested
    by_row = squares.sum(2) if requested.rows else None
    parts = [(0, squares.sum((1, 2))[:, None] if by_row is None else by_row.sum(1, keepdim=True))]
    weights = buffer.weights_of(squares, first)
    if weights is not None:
        parts.append((layout.weighted, (squares * weights).sum((1, 2))[:, None]))
    if by_row is not None:
        parts.append((layout.rows_from(first), by_row))
    if requested.columns:
        parts.append((layout.columns, squares.sum(1)))
    if len(parts) > 1 and first == 0 and squares.shape[1] == layout.shape[:1].numel():
        parts = [(0, torch.cat([part for _, part in parts], 1))]  # neighbours in the buffer
    for start, part in parts:
        buffer.numbers[rows, start : start + part.shape[1]].add_(part)
    if buffer.entries is not None:
        entries = buffer.entries.view(2, layout.shape[:1].numel(), -1)
        entries[rows, first : first + squares.shape[1]].add_(squares)


def chunks(count: int, size: int, like: Tensor) -> Iterator[slice]:
    """Parts of a number of examples, each of which takes so many bytes on the device of a tensor."""
    step = max(1, budget(like) // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def budget(like: Tensor) -> int:
    """Bytes to form at a time on the device of a tensor."""
    return _CACHE if like.is_cpu else _MEMORY

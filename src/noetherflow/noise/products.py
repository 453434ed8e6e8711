"""Gradients that are products of two matrices, formed by compiled loops that multiply these, on every thread."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.asked import Page
from noetherflow.noise.ledger import EACH, Sums
from noetherflow.noise.native import Task, cut, in_parallel, kernel_of, product_of, team_size
from noetherflow.noise.passes import arrays_of, compiled_products, compiles, parts_of
from noetherflow.noise.squares import GramSums
from noetherflow.noise.uses import Convolution, Outer, Product, Rows


@final
@dataclass(eq=False)
class _Share:
    """Where a thread adds up: squares, entries if they are wanted, gradients and Gram matrices."""

    numbers: Tensor
    entries: Tensor | None
    total: Tensor
    grams: Tensor

    def another(self) -> "_Share":
        """The same for another thread: zeros, but for the total, which is written."""
        entries = None if self.entries is None else torch.zeros_like(self.entries)
        return _Share(
            torch.zeros_like(self.numbers), entries, torch.empty_like(self.total), torch.zeros_like(self.grams)
        )

    def take(self, other: "_Share") -> None:
        """Add what another thread found."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine += theirs

    def _tensors(self) -> list[Tensor]:
        every = (self.numbers, self.entries, self.total, self.grams)
        return [one for one in every if one is not None]


# Form some rows of every example's gradient: add up their squares, and write the sum over examples.
Strip = Callable[[slice, Tensor], None]
# What forms some rows for some examples, and adds up somewhere.
_Loop = Callable[[slice, slice, _Share], Task]
# Multiplications that take as long as reading a number.
_PRODUCTS = 32
# Numbers that threads may hold together, beyond what one needs.
_SPARE = 2**26
# What tokens of an example read where there is no table.
_NO_IDS = torch.empty(1, 0, dtype=torch.int64)


def compiled_strip(
    use: Product, sums: Sums, total: Tensor, rows: int, tables: Sequence[Rows] = (), grams: GramSums | None = None
) -> Strip | None:
    """How compiled loops form gradients, on several threads if there is enough to do.

    Args:
        use: A use of the whole parameter.
        sums: Where to add squares over examples, of the gradient as a matrix.
        total: A matrix of as many columns, and of the type of the sum of gradients.
        rows: How many are formed at a time, at most.
        tables: Further uses.
        grams: Where to add Gram matrices of all rows.

    Returns:
        None if there is no compiled loop for these.
    """
    heads = grams.heads if grams is not None else ()
    loop = None if heads is None or sums.arrays is None else _loop_for(use, sums, total, tables, heads)
    if loop is None:
        return None
    n, m = sums.page.shape[0], total.shape[1]
    memory = total.new_empty(0) if grams is None else grams.memory
    held = 2 * rows * m + sums.page.length + memory.numel() + use.held
    load = use.size * n * m * (1 + use.terms // _PRODUCTS)
    parts = min(parts_of(use.size, load), 1 + _SPARE // held)
    # Where there are far fewer examples than threads, these serve BLAS better.
    examples = cut(use.size, parts if 2 * use.size > team_size() else 1)

    def form(part: slice, total: Tensor) -> None:
        entries = None if sums.entries is None else sums.entries[EACH].view(n, m)[part]
        whole = _Share(sums.numbers[EACH], entries, total, memory)
        shares = [whole, *(whole.another() for _ in examples[1:])]
        in_parallel([loop(some, part, share) for some, share in zip(examples, shares, strict=True)])
        for other in shares[1:]:
            whole.take(other)

    return form


def compiled_sum(x: Tensor, g: Tensor, total: Tensor) -> Callable[[slice, Tensor], None] | None:
    """How compiled loops form some rows of the sum of outer products of vectors g (N, n) and x (N, m).

    Args:
        x: Vectors.
        g: The others.
        total: A matrix of as many columns, and of the type of the sum.

    Returns:
        None if there is no compiled loop for these.
    """
    size, m = x.shape
    kernel = kernel_of(total.dtype, len(total), size, m) if compiles() else 0
    apart = compiled_products().padding(m) if kernel else 0
    arrays = _alike(total, g, functional.pad(x, (0, apart)) if apart else x) if kernel else []
    if not arrays:
        return None
    _, left, right = arrays
    sum_products = compiled_products().sum_products

    def form(part: slice, into: Tensor) -> None:
        slices = cut(len(into), parts_of(len(into), into.numel() * (1 + size // _PRODUCTS)))
        each = [(part.start + some.start, into[some].numpy()) for some in slices]
        in_parallel([partial(sum_products, kernel, left, right, *one) for one in each])

    return form


def _loop_for(
    use: Product, sums: Sums, total: Tensor, tables: Sequence[Rows], heads: Sequence[tuple[int, int, int, int]]
) -> _Loop | None:
    if isinstance(use, Outer):
        return _outer_loop(use, sums, total, tables, heads)
    if isinstance(use, Convolution) and use.groups == 1 and not tables and not heads:
        return _patch_loop(use, sums, total)
    return None


def _outer_loop(
    use: Outer, sums: Sums, total: Tensor, tables: Sequence[Rows], heads: Sequence[tuple[int, int, int, int]]
) -> _Loop | None:
    if tables:
        ids, added = torch.cat([one.ids for one in tables], 1), torch.cat([one.outputs for one in tables], 1)
    else:
        ids, added = _NO_IDS.expand(use.size, 0), total.new_empty(use.size, 0, total.shape[1])
    arrays = _alike(total, use.outputs, use.inputs, added)
    if not arrays:
        return None
    product, left, right, outputs = arrays
    outer_products = compiled_products().outer_products
    read, page, table = ids.numpy(), sums.page, np.array(heads, np.int64).reshape(-1, 4)

    def loop(some: slice, part: slice, share: _Share) -> Task:
        kernel = kernel_of(total.dtype, len(share.total), use.terms, total.shape[1])
        return partial(
            outer_products,
            product, kernel, left[some], right[some], part.start, read[some], outputs[some], table, share.grams.numpy(),
            *_given(share, page, part.start),
        )  # fmt: skip

    return loop


def _patch_loop(use: Convolution, sums: Sums, total: Tensor) -> _Loop | None:
    arrays = _alike(total, use.outputs.flatten(2), use.inputs.flatten(2))
    if not arrays:
        return None
    product, left, images = arrays
    patch_products = compiled_products().patch_products
    lengths, steps = (use.inputs.shape[1:], use.outputs.shape[2:]), (use.kernel, use.stride, use.padding, use.dilation)
    length, spots, places, moves = _places_of(*map(tuple, (*lengths, *steps)))
    kernel = kernel_of(total.dtype, len(total), len(places), total.shape[1])

    def loop(some: slice, part: slice, share: _Share) -> Task:
        return partial(
            patch_products,
            product, kernel, left[some], images[some], length, spots, places, moves,
            *_given(share, sums.page, part.start),
        )  # fmt: skip

    return loop


def _alike(total: Tensor, *tensors: Tensor) -> list[Any]:
    """The address of BLAS' product for a type, and the memory of tensors that are of it; nothing if one is not."""
    arrays = arrays_of(total, *(one.contiguous() for one in tensors))
    product = product_of(total.dtype) if arrays and all(one.dtype is total.dtype for one in tensors) else 0
    return [product, *arrays[1:]] if product else []


def _given(share: _Share, page: Page, start: int) -> tuple[Any, ...]:
    """What the loops share: where to add up."""
    entries = None if share.entries is None else share.entries.numpy()
    return share.numbers.numpy(), page.rows_from(start), page.columns, entries, share.total.numpy()


@lru_cache(64)
def _places_of(
    shape: Sequence[int], lengths: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, Any, Any, Any]:  # fmt: skip
    """Where is what in an image (channels, *space) that is padded and laid out as (*space, channels).

    Returns:
        How long it is, where each of its own places is, where each patch begins, and how far from there each run of
        its numbers is.
    """
    channels, *space = shape
    wide = [length + 2 * width for length, width in zip(space, padding, strict=True)]
    if dilation[-1] == 1:
        kernel = (*kernel[:-1], 1)  # neighbours: one run
    steps = [channels * math.prod(wide[dim + 1 :]) for dim in range(len(wide))]

    def offsets(counts: Sequence[int], distances: Sequence[int]) -> Any:
        found = torch.zeros((), dtype=torch.int64)
        for count, distance, step in zip(counts, distances, steps, strict=True):
            found = found[..., None] + distance * step * torch.arange(count)
        return found.flatten().numpy()

    corner = sum(width * step for width, step in zip(padding, steps, strict=True))
    spots = corner + offsets(space, [1] * len(space))
    return channels * math.prod(wide), spots, offsets(lengths, stride), offsets(kernel, dilation)

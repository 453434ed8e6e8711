"""Compiled loops for the CPU: each block of gradients is squared and added up while the cache holds it."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.kernels import cpu_loops as loops
from noetherflow.noise.kernels.base import Window
from noetherflow.noise.kernels.costs import Costs
from noetherflow.noise.kernels.formulas import add_grams, add_sums
from noetherflow.noise.kernels.reference import Batched, Reference
from noetherflow.noise.ledger import EACH, WHOLE, Sums

# Numbers in a patch from which on the compiled product is faster than that of PyTorch.
_WIDE = 64
_COMPILED = (torch.float32, torch.float64, torch.int64)


@final
class Cpu(Batched):
    """Products of matrices by PyTorch, on its threads, and a compiled pass over each.

    Tensors that no loop is compiled for are left to the reference.
    """

    name = "cpu"
    costs = Costs(squaring=20, call=500_000)

    def __init__(self) -> None:
        self._reference = Reference()

    def accumulate(self, stack: Tensor, sums: Sums, row: int, total: Tensor | None = None, first: int = 0) -> None:
        """See `Kernels`."""
        page, (_, n, m) = sums.page, stack.shape
        entries = None
        if sums.entries is not None:
            entries = sums.entries[row].view(page.shape[:1].numel(), -1)[first : first + n]
        numbers = sums.numbers[row]
        arrays = _arrays(stack, numbers, entries, total)
        if not arrays:
            self._reference.accumulate(stack, sums, row, total, first)
            return
        stacked, vector, squares, added = arrays
        rows, columns = page.rows_from(first), page.columns
        if m == 1:  # a stack of vectors: the long dimension is the last
            rows, columns = columns, rows
            stacked, squares, added = (
                None if one is None else one.swapaxes(-1, -2) for one in (stacked, squares, added)
            )
        loops.accumulate(stacked, vector, rows, columns, squares, added)
        add_grams(stack, sums, row)

    def patches(self, x: Tensor, d: Tensor, window: Window, sums: Sums) -> Tensor:
        """See `Kernels`."""
        places, n, m = d.shape[2:].numel(), d.shape[1], sums.page.shape[1:].numel()
        flat = d.flatten(2).contiguous()
        compiled = (
            # The compiled product has a single thread, and few numbers in a patch leave its vectors empty.
            torch.get_num_threads() == 1
            and m >= _WIDE
            and window.groups == 1
            and not sums.page.grams
            and x.dtype is d.dtype
            and bool(_arrays(flat))
            and not self.costs.prefer_tokens(places, n, m, sums.page.asked)
        )
        return _form_from_patches(self, x, flat, window, sums) if compiled else super().patches(x, d, window, sums)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """See `Batched`."""
        (n, tokens), m = left.shape[1:], right.shape[2]
        fits = n % 4 == 0 and tokens % 4 == 0 and tokens > 0 and m >= _WIDE and torch.get_num_threads() == 1
        arrays = _arrays(right, out) if fits and has_slow_products() and left.dtype is out.dtype else []
        if arrays:
            loops.multiply(left.detach().numpy(), *arrays)
        else:
            super()._multiply(left, right, out)

    def affine_sums(self, x: Tensor, d: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        shape = x.shape[:2]
        arrays = _arrays(*(one.reshape(*shape, -1) for one in (x, d)), *(one.reshape(shape) for one in (mean, scale)))
        if not arrays:
            return super().affine_sums(x, d, mean, scale)
        gains, biases = (x.new_zeros(len(x), *x.shape[2:]) for _ in range(2))
        loops.affine_sums(*arrays, *(one.view(len(x), -1).numpy() for one in (gains, biases)))
        return gains, biases

    def channel_sums(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        shape = x.shape[:2]
        products, sums = x.new_empty(shape.numel()), x.new_empty(shape.numel())
        arrays = _arrays(*(one.reshape(shape.numel(), -1) for one in (x, d)), products, sums)
        if not arrays:
            return super().channel_sums(x, d)
        loops.channel_sums(*arrays)
        return products.view(shape), sums.view(shape)

    def group_norm_back(
        self, x: Tensor, d: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels`."""
        x, d, shape = x.contiguous(), d.contiguous(), x.shape[:2]
        back, gains, biases = torch.empty_like(x), x.new_empty(shape), x.new_empty(shape)
        full = x.new_ones(shape[1]) if weight is None else weight.contiguous()
        arrays = _arrays(x.flatten(2), d.flatten(2), full, mean, scale, back.flatten(2), gains, biases)
        if not arrays:
            return super().group_norm_back(x, d, weight, mean, scale)
        loops.group_norm_back(*arrays)
        return back, gains, biases


@cache
def has_slow_products() -> bool:
    """Whether PyTorch multiplies with MKL on a processor that is not from Intel: with half of its vectors' width."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.exists() and "AuthenticAMD" in info.read_text("utf-8")


def _form_from_patches(kernels: Cpu, x: Tensor, d: Tensor, window: Window, sums: Sums) -> Tensor:
    """What `Cpu.patches` does by compiled loops, for d (B, n, places)."""
    page, shape = sums.page, sums.page.shape
    n, m = d.shape[1], shape[1:].numel()
    widths = [width for one in reversed(window.padding) for width in (one, one)]
    images = functional.pad(x, widths).movedim(1, -1).contiguous()
    rows, columns = n + -n % 4, m + -m % loops.LANES
    numbers, padded = torch.zeros(1 + rows + columns, dtype=torch.float64), x.new_zeros(rows, columns)
    entries = None if sums.entries is None else torch.zeros_like(padded)
    starts, moves, run = _steps(tuple(images.shape[1:]), window, tuple(window.places(x)))
    arrays = _arrays(d, images.flatten(1), starts, moves, numbers, entries, padded)
    loops.patch_products(*arrays, run)  # type: ignore[call-arg]

    def turned(matrices: Tensor) -> Tensor:
        """From (..., kernel, channels) to (..., channels, kernel)."""
        return matrices[..., :m].unflatten(-1, (-1, shape[1])).transpose(-1, -2).flatten(-2)

    add_sums(sums.numbers[EACH], numbers[1 : 1 + n], page.rows, turned(numbers[1 + rows :]), page.columns)
    if entries is not None and sums.entries is not None:
        sums.entries[EACH].add_(turned(entries[:n]).view(shape))
    total = turned(padded[:n])
    kernels.accumulate(total[None], sums, WHOLE)
    return total.view(shape)


@lru_cache(64)
def _steps(image: tuple[int, ...], window: Window, places: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Where patches begin in an image (*space, channels), how far from there their runs are, and how long these are."""
    *space, channels = image
    kernel, run = list(window.kernel), channels
    if window.dilation[-1] == 1:
        run, kernel[-1] = run * kernel[-1], 1  # neighbours: a single run
    strides = [channels * math.prod(space[dim + 1 :]) for dim in range(len(space))]

    def offsets(counts: Sequence[int], distances: Sequence[int]) -> Tensor:
        found = torch.zeros((), dtype=torch.int64)
        for count, distance, stride in zip(counts, distances, strides, strict=True):
            found = found[..., None] + distance * stride * torch.arange(count)
        return found.flatten()

    return offsets(places, window.stride), offsets(kernel, window.dilation), run


def _swapped(array: Any) -> Any:
    return None if array is None else array.swapaxes(-1, -2)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """The memory of tensors; nothing if the loops cannot work on these."""
    for one in tensors:
        if one is not None and not (one.dtype in _COMPILED and one.is_cpu and one.is_contiguous()):
            return []
    return [None if one is None else one.detach().numpy() for one in tensors]

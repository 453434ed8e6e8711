"""Compiled loops for the CPU: each block of gradients is squared and added up while the cache holds it."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from noetherflow.noise.buffers import EACH, OF_SUM, Buffer
from noetherflow.noise.kernels import cpu_loops as loops
from noetherflow.noise.kernels.base import Window
from noetherflow.noise.kernels.costs import Costs
from noetherflow.noise.kernels.formulas import add_grams, add_sums
from noetherflow.noise.kernels.reference import Batched, Reference

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

    def accumulate(self, stack: Tensor, buffer: Buffer, row: int, total: Tensor | None = None, first: int = 0) -> None:
        """See `Kernels`."""
        layout, (_, n, m) = buffer.layout, stack.shape
        entries = None
        if buffer.entries is not None:
            entries = buffer.entries[row].view(layout.shape[:1].numel(), -1)[first : first + n]
        numbers = buffer.numbers[row]
        arrays = _arrays(stack, numbers, entries, total)
        if not arrays:
            self._reference.accumulate(stack, buffer, row, total, first)
            return
        stacked, vector, squares, added = arrays
        rows, columns = layout.rows_from(first), layout.columns
        if m == 1:  # a stack of vectors: the long dimension is the last
            rows, columns = columns, rows
            stacked, squares, added = (
                None if array is None else array.swapaxes(-1, -2) for array in (stacked, squares, added)
            )
        loops.accumulate(stacked, vector, rows, columns, squares, added)
        add_grams(stack, buffer, row)

    def patches(self, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
        """See `Kernels`."""
        places, n, m = d.shape[2:].numel(), d.shape[1], buffer.layout.shape[1:].numel()
        flat = d.flatten(2).contiguous()
        compiled = (
            # The compiled product has a single thread, and few numbers in a patch leave its vectors empty.
            torch.get_num_threads() == 1
            and m >= _WIDE
            and window.groups == 1
            and not buffer.layout.grams
            and x.dtype is d.dtype
            and bool(_arrays(flat))
            and not self.costs.prefer_tokens(places, n, m, buffer.layout.requested)
        )
        return _form_from_patches(self, x, flat, window, buffer) if compiled else super().patches(x, d, window, buffer)

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
        arrays = _arrays(*(tokens.reshape(*shape, -1) for tokens in (x, d)), *(m.reshape(shape) for m in (mean, scale)))
        if not arrays:
            return super().affine_sums(x, d, mean, scale)
        gains, biases = (x.new_zeros(len(x), *x.shape[2:]) for _ in range(2))
        loops.affine_sums(*arrays, *(affine.view(len(x), -1).numpy() for affine in (gains, biases)))
        return gains, biases

    def channel_sums(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        shape = x.shape[:2]
        products, sums = x.new_empty(shape.numel()), x.new_empty(shape.numel())
        arrays = _arrays(*(images.reshape(shape.numel(), -1) for images in (x, d)), products, sums)
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


def _form_from_patches(kernels: Cpu, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
    """What `Cpu.patches` does by compiled loops, for d (B, n, places)."""
    layout, shape = buffer.layout, buffer.layout.shape
    n, m = d.shape[1], shape[1:].numel()
    # Padded and with channels last in a single copy.
    sizes = [size + 2 * side for size, side in zip(x.shape[2:], window.padding, strict=True)]
    images = x.new_zeros(len(x), *sizes, x.shape[1])
    inside = images
    for dim, (size, side) in enumerate(zip(x.shape[2:], window.padding, strict=True), 1):
        inside = inside.narrow(dim, side, size)
    inside.copy_(x.movedim(1, -1))
    rows, columns = n + -n % 4, m + -m % loops.LANES
    numbers, padded = torch.zeros(1 + rows + columns, dtype=torch.float64), x.new_zeros(rows, columns)
    entries = None if buffer.entries is None else torch.zeros_like(padded)
    starts, moves, run = _steps(tuple(images.shape[1:]), window, tuple(window.places(x)))
    arrays = _arrays(d, images.flatten(1), starts, moves, numbers, entries, padded)
    loops.patch_products(*arrays, run)  # type: ignore[call-arg]

    def channels_first(matrices: Tensor) -> Tensor:
        """From (..., kernel, channels) to (..., channels, kernel)."""
        return matrices[..., :m].unflatten(-1, (-1, shape[1])).transpose(-1, -2).flatten(-2)

    add_sums(buffer.numbers[EACH], numbers[1 : 1 + n], layout.rows, channels_first(numbers[1 + rows :]), layout.columns)
    if entries is not None and buffer.entries is not None:
        buffer.entries[EACH].add_(channels_first(entries[:n]).view(shape))
    total = channels_first(padded[:n])
    kernels.accumulate(total[None], buffer, OF_SUM)
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
        starts = torch.zeros((), dtype=torch.int64)
        for count, distance, stride in zip(counts, distances, strides, strict=True):
            starts = starts[..., None] + distance * stride * torch.arange(count)
        return starts.flatten()

    return offsets(places, window.stride), offsets(kernel, window.dilation), run


def _swapped(array: Any) -> Any:
    return None if array is None else array.swapaxes(-1, -2)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """The memory of tensors; nothing if the loops cannot work on these."""
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype in _COMPILED and tensor.is_cpu and tensor.is_contiguous()):
            return []
    return [None if tensor is None else tensor.detach().numpy() for tensor in tensors]

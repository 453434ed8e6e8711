"""Compiled loops for the CPU: each block of gradients is squared and added up while the cache holds it."""

import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from noetherflow.noise.buffers import EACH, OF_SUM, Buffer
from noetherflow.noise.kernels import cpu_loops as loops
from noetherflow.noise.kernels.base import Window
from noetherflow.noise.kernels.costs import Costs
from noetherflow.noise.kernels.formulas import add_grams, add_sums
from noetherflow.noise.kernels.reference import Batched, Reference

Array = npt.NDArray[np.int64]

# Numbers in a patch from which on the compiled product is faster than that of PyTorch.
_WIDE = 64
# An inner product costs as much as so many further places; products of patches cost so many times as much by place.
_SUMMING, _PATCHES = 64, 1.6
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
        numbers, weights = buffer.numbers[row], buffer.weights_of(stack, first)
        arrays = _arrays(stack, numbers, entries, total, weights)
        if not arrays:
            self._reference.accumulate(stack, buffer, row, total, first)
            return
        stacked, vector, squares, added, factors = arrays
        rows, columns = layout.rows_from(first), layout.columns
        if m == 1:  # a stack of vectors: the long dimension is the last
            rows, columns = columns, rows
            stacked, squares, added, factors = (
                None if array is None else array.swapaxes(-1, -2) for array in (stacked, squares, added, factors)
            )
        loops.accumulate(stacked, vector, rows, columns, squares, added, factors)
        add_grams(stack, buffer, row)

    def patches(self, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
        """See `Kernels`."""
        places, n, m = d.shape[2:].numel(), d.shape[1], buffer.layout.shape[1:].numel()
        compiled = (
            torch.get_num_threads() == 1  # as many as the compiled products have
            and window.groups == 1
            and not buffer.layout.grams
            and x.is_cpu
            and x.dtype is d.dtype
            and x.dtype in _COMPILED
            and not self.costs.prefer_tokens(places, n, m, buffer.layout.requested)
        )
        return _form_by_example(self, x, d, window, buffer) if compiled else super().patches(x, d, window, buffer)

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


@cache
def has_slow_products() -> bool:
    """Whether PyTorch multiplies with MKL on a processor that is not from Intel: with half of its vectors' width."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.exists() and "AuthenticAMD" in info.read_text("utf-8")


def _form_by_example(kernels: Cpu, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
    """What `Cpu.patches` does by compiled loops."""
    layout, shape, channels = buffer.layout, buffer.layout.shape, x.shape[1]
    n, m = d.shape[1], shape[1:].numel()
    rows, columns = n + -n % 4, m + -m % loops.LANES
    numbers, padded = torch.zeros(2 + rows + columns, dtype=torch.float64), x.new_zeros(rows, columns)
    entries, weights = (None if each is None else torch.zeros_like(padded) for each in (buffer.entries, buffer.weights))
    arrays = _arrays(d.flatten(2).contiguous(), x.flatten(2).contiguous(), numbers, entries, padded, weights)
    stacks, sums = arrays[:2], arrays[2:]
    geometry = tuple(x.shape[2:]), window, tuple(d.shape[2:])
    spots, places, moves, extent = _positions(*geometry, apart=True)
    tokens = int(places[-1]) + 1
    by_plane = m < _WIDE or tokens + _SUMMING < _PATCHES * len(places)
    if weights is not None and buffer.weights is not None:
        given = buffer.weights.reshape(n, channels, -1)
        weights[:n, :m] = (given if by_plane else given.mT).flatten(1)
    if by_plane:
        starts = np.full(columns + 1, channels * extent)  # the last after all planes
        starts[:m] = np.add.outer(extent * np.arange(channels), moves).ravel()
        tokens += -tokens % loops.LANES
        loops.plane_products(*stacks, spots, places[:: d.shape[-1]], starts, *sums, tokens)  # type: ignore[call-arg]
    else:
        spots, places, moves, extent = _positions(*geometry, apart=False)
        image = np.zeros((extent, channels), stacks[0].dtype)
        run = window.kernel[-1] if window.dilation[-1] == 1 else 1  # neighbours
        places, moves, run = channels * places, channels * moves[::run], channels * run
        loops.patch_products(*stacks, image, spots, places, moves, *sums, run)  # type: ignore[call-arg]

    def cut(matrices: Tensor) -> Tensor:
        """Without padding, channels first."""
        matrices = matrices[..., :m]
        return matrices if by_plane else matrices.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)

    add_sums(buffer.numbers[EACH], numbers[2 : 2 + n], layout.rows, cut(numbers[2 + rows :]), layout.columns)
    if weights is not None:
        buffer.numbers[EACH, layout.weighted].add_(numbers[1])
    if entries is not None and buffer.entries is not None:
        buffer.entries[EACH].add_(cut(entries[:n]).view(shape))
    total = cut(padded[:n]).contiguous()
    kernels.accumulate(total[None], buffer, OF_SUM)
    return total.view(shape)


@lru_cache(64)
def _positions(
    space: tuple[int, ...], window: Window, counts: tuple[int, ...], *, apart: bool
) -> tuple[Array, Array, Array, int]:
    """Where the pixels of a padded image are, where each place of a kernel is, and how far from there its entries are.

    Args:
        space: Pixels along each dimension.
        window: The geometry.
        counts: Places along each dimension.
        apart: Whether pixels are sorted by the remainder that the stride leaves, so that places are neighbours.

    Returns:
        The three, and the number of pixels of a padded image.
    """
    steps = window.stride if apart else (1,) * len(space)
    lengths = [-(-(size + 2 * side) // step) for size, side, step in zip(space, window.padding, steps, strict=True)]

    def at(*coordinates: Array) -> Array:
        index, inner, outer = np.zeros((), np.int64), math.prod(lengths), math.prod(lengths) * math.prod(steps)
        for along, length, step in zip(coordinates, lengths, steps, strict=True):
            inner, outer = inner // length, outer // step
            index = np.add.outer(index, along % step * outer + along // step * inner)
        return index.ravel()

    spots = at(*(side + np.arange(size) for side, size in zip(window.padding, space, strict=True)))
    places = at(*(step * np.arange(count) for step, count in zip(window.stride, counts, strict=True)))
    moves = at(*(gap * np.arange(size) for gap, size in zip(window.dilation, window.kernel, strict=True)))
    return spots.view(np.uint64), places, moves, math.prod(lengths) * math.prod(steps)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """The memory of tensors; nothing if the loops cannot work on these."""
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype in _COMPILED and tensor.is_cpu and tensor.is_contiguous()):
            return []
    return [None if tensor is None else tensor.detach().numpy() for tensor in tensors]

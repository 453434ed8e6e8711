"""Compiled loops for the CPU: each block of gradients is squared and added up while the cache holds it."""

from typing import Any, final

import torch
from torch import Tensor

from noetherflow.noise.kernels import cpu_loops as loops
from noetherflow.noise.kernels.costs import Costs
from noetherflow.noise.kernels.reference import Batched, Reference, add_grams
from noetherflow.noise.ledger import Sums

_COMPILED = (torch.float32, torch.float64)


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


def _swapped(array: Any) -> Any:
    return None if array is None else array.swapaxes(-1, -2)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """The memory of tensors; nothing if the loops cannot work on these."""
    for one in tensors:
        if one is not None and not (one.dtype in _COMPILED and one.is_cpu and one.is_contiguous()):
            return []
    return [None if one is None else one.detach().numpy() for one in tensors]

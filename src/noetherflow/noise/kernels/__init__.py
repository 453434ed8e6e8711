"""Kernels that square per-example gradients, and the functions through which the rest of the package reaches them."""

from torch import Tensor

from noetherflow.noise.buffers import EACH, Buffer
from noetherflow.noise.kernels.base import Kernels, Window, accumulator
from noetherflow.noise.kernels.choose import kernels_for
from noetherflow.noise.kernels.formulas import distinct_rows, group_norm_back

__all__ = [
    "Kernels",
    "Window",
    "accumulator",
    "affine_sums",
    "channel_sums",
    "distinct_rows",
    "group_norm_back",
    "kernels_for",
    "square",
    "square_stack",
]


def square(gradient: Tensor, buffer: Buffer, row: int) -> None:
    """Add the squares of a single gradient to a row of the buffer."""
    kernels_for(gradient).accumulate(as_matrices(gradient[None]), buffer, row)


def square_stack(stack: Tensor, buffer: Buffer) -> Tensor:
    """Add the squares of gradients (B, *shape) to the sums over examples; returns the sum of the gradients."""
    matrices = as_matrices(stack)
    total = matrices.new_zeros(matrices.shape[1:], dtype=accumulator(stack))
    kernels_for(stack).accumulate(matrices, buffer, EACH, total)
    return total.view(stack.shape[1:])


def as_matrices(stack: Tensor) -> Tensor:
    """Gradients (B, *shape) as a stack of matrices (B, n, m), contiguous."""
    shape = stack.shape[1:]
    return stack.reshape(len(stack), shape[:1].numel(), shape[1:].numel()).contiguous()


def affine_sums(x: Tensor, d: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.affine_sums`."""
    return kernels_for(x).affine_sums(x, d, mean, scale)


def channel_sums(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """See `Kernels.channel_sums`."""
    return kernels_for(x).channel_sums(x, d)

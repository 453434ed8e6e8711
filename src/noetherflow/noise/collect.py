"""From the uses of one parameter to the squares of its per-example gradients, without keeping any of these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from noetherflow.noise.buffers import Buffer
from noetherflow.noise.kernels import accumulator, as_matrices, kernels_for
from noetherflow.noise.kernels.reference import chunks
from noetherflow.noise.uses import Convolution, Outer, PerExample, Rows, Use


def collect(uses: Sequence[Use], buffer: Buffer, like: Tensor, *, needs_sum: bool = True) -> Tensor | None:
    """Add the squares of every example's gradient, and of the sum of all, to the buffer of a parameter.

    Args:
        uses: All uses of the parameter; an example's gradients of different uses are summed before they are squared.
        buffer: The buffer.
        like: A tensor of the dtype and device of the gradients.
        needs_sum: Whether the sum of all gradients is returned, beyond its squares.

    Returns:
        That sum; None if it is not needed and was not formed.
    """
    kernels, (use, *others) = kernels_for(like), uses
    if not others and not use.views:
        if isinstance(use, Outer):
            return kernels.outer_products(use.inputs, use.outputs, buffer, needs_sum=needs_sum)
        if isinstance(use, Convolution):
            return kernels.patches(use.inputs, use.outputs, use.window, buffer)
        if isinstance(use, Rows):
            return kernels.table_rows(use.ids, use.outputs, buffer)
    shape, kind = buffer.layout.shape, torch.empty((), dtype=accumulator(like), device=like.device)
    parts = chunks(use.size, shape.numel() * kind.element_size(), like)
    total = kernels.add_stacks((as_matrices(_formed(uses, part, shape, kind)) for part in parts), buffer)
    return total.view(shape)


def stacked(uses: Sequence[Use], shape: torch.Size, like: Tensor) -> Tensor:
    """Every example's gradient, shape (B, *shape), for tensors that are made of parameters and go back to them."""
    return _formed(uses, slice(0, uses[0].size), shape, like)


def _formed(uses: Sequence[Use], examples: slice, shape: torch.Size, like: Tensor) -> Tensor:
    """The gradients of some examples, of all uses together, in the dtype of a tensor."""
    first = uses[0]
    if isinstance(first, PerExample) and not first.views and len(uses) == 1:
        return first.gradients[examples].to(like.dtype)
    count = len(range(first.size)[examples])
    stack = torch.zeros(count, *shape, dtype=like.dtype, device=like.device)
    for use in uses:
        use.add_to(use.part_of(stack), examples)
    return stack

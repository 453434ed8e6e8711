"""The seam: what every set of kernels computes, and what it is told about the operation.

Above the seam nothing depends on the device; below it nothing is known of symmetries. A set works on stacks of tensors,
examples along the first dimension, and adds squares of gradients to a `Buffer`: to row `EACH` sums over examples, to
row `OF_SUM` the squares of the sum of all gradients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor
from torch.nn import functional, grad

from noetherflow.noise.buffers import Buffer


@final
@dataclass(frozen=True)
class Window:
    """The geometry of a convolution of one to three dimensions.

    Args:
        stride: Of each dimension of space.
        padding: Zeros before each dimension of space, and as many after it.
        dilation: Of each dimension of space.
        groups: Number of separate maps.
        kernel: Size of the kernel along each dimension of space.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    kernel: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation", "kernel"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable

    def places(self, x: Tensor) -> list[int]:
        """How often the kernel fits into images, along each dimension of space."""
        each = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(length + 2 * pad - gap * (size - 1) - 1) // step + 1 for length, size, step, pad, gap in each]

    def patches(self, x: Tensor) -> Tensor:
        """The patches of images x (B, channels, *space) on which the kernel acts: (B, groups, patch, places)."""
        widths = [width for side in reversed(self.padding) for width in (side, side)]
        x = functional.pad(x, widths) if any(widths) else x
        for dim, (size, step, distance) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, distance * (size - 1) + 1, step)[..., ::distance]
        space = len(self.kernel)
        x = x.permute(0, 1, *range(2 + space, 2 + 2 * space), *range(2, 2 + space))
        patch = x.shape[1 : 2 + space].numel() // self.groups
        return x.reshape(len(x), self.groups, patch, x.shape[2 + space :].numel())

    def gradient(self, x: Tensor, d: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of a weight of some shape, for images x (B, channels, *space) and gradients d of the outputs."""
        function = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)[len(self.kernel) - 1]
        return function(x, shape, d, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[no-untyped-call]

    def gradients(self, x: Tensor, d: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of every example, shape (B, *shape): each example has groups of channels of its own."""
        window = replace(self, groups=self.groups * len(x))
        # By way of a vector: where a dimension has length 1, its stride may be any number, and PyTorch's convolution in
        # float64 fails if that stride is by chance that of a tensor whose channels come last.
        images, gradients = (
            stack.contiguous().view(-1).view(1, len(stack) * stack.shape[1], *stack.shape[2:]) for stack in (x, d)
        )
        return window.gradient(images, gradients, (len(x) * shape[0], *shape[1:])).view(len(x), *shape)


class Kernels(Protocol):
    """A set of kernels. Sums of gradients have the accumulator's dtype: float32, or float64 for float64 tensors."""

    name: ClassVar[str]

    def outer_products(self, x: Tensor, d: Tensor, buffer: Buffer, *, needs_sum: bool) -> Tensor | None:
        """Add the squares of g_b = sum_t d_bt x_bt^T and of sum_b g_b, for x (B, T, m) and d (B, T, n).

        Args:
            x: Inputs of a linear map.
            d: Gradients of its outputs.
            buffer: The buffer, for gradients of shape (n, m).
            needs_sum: Whether the sum of gradients has to be returned.

        Returns:
            The sum, shape (n, m); None if it is not needed and its squares cost less.
        """

    def patches(self, x: Tensor, d: Tensor, window: Window, buffer: Buffer) -> Tensor:
        """Add the squares of gradients of a convolution's weight, and of their sum, which is returned.

        Args:
            x: Images, shape (B, channels, *space).
            d: Gradients of the outputs, shape (B, n, *places).
            window: The geometry.
            buffer: The buffer, for gradients of shape (n, channels / groups, *kernel).
        """

    def table_rows(self, ids: Tensor, d: Tensor, buffer: Buffer) -> Tensor:
        """Add the squares of gradients of a table (n, m), and of their sum, which is returned.

        Args:
            ids: The row of the table that each token reads, shape (B, T).
            d: Gradients of what was read, shape (B, T, m).
            buffer: The buffer.
        """

    def add_stacks(self, stacks: Iterable[Tensor], buffer: Buffer, first: int = 0) -> Tensor:
        """Add the squares of gradients that come in stacks, and of their sum, which is returned, shape (r, m).

        Args:
            stacks: Rows of gradients as matrices, each of shape (b, r, m); it is done with before the next comes.
            buffer: The buffer; Gram matrices are added if the stacks hold all rows.
            first: Which row of the gradient is the first of these.
        """

    def accumulate(self, stack: Tensor, buffer: Buffer, row: int, total: Tensor | None = None, first: int = 0) -> None:
        """Add the squares of gradients to a row of the buffer, and the gradients to a total.

        Args:
            stack: Rows of the gradients as matrices, shape (B, r, m).
            buffer: The buffer; Gram matrices are added if the stack holds all rows.
            row: EACH or OF_SUM.
            total: Shape (r, m), or None.
            first: Which row of the gradient is the first of these.
        """

    def affine_sums(self, x: Tensor, d: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gain and bias after a normalisation of tokens, example by example.

        Args:
            x: What was normalised, shape (B, T, ...).
            d: Gradients of the outputs, of the same shape.
            mean: Of each token, shape (B, T, 1, ...).
            scale: What each centred token was multiplied by, of that shape.

        Returns:
            The sums over tokens of d (x - mean) scale, and of d, shape (B, ...).
        """

    def channel_sums(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of d x and of d over all but the first two dimensions, shape (B, channels)."""


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype in which sums are kept: that of the tensors, float32 at least."""
    return _accumulator(*(tensor.dtype for tensor in tensors))


@cache
def _accumulator(*kinds: torch.dtype) -> torch.dtype:
    widest = torch.float32
    for kind in kinds:
        widest = torch.promote_types(widest, kind)
    return widest

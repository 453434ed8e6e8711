"""How one parameter was used in a forward pass: what its gradient, example by example, is made of."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

View = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Use(ABC):
    """One use of a parameter, or of a view of it.

    Args:
        views: What leads from the parameter to what was used, in this order; each a view of its argument's memory.
        native: Whether autograd itself carries this gradient on to the parameter.
    """

    views: tuple[View, ...]
    native: bool = field(default=False, kw_only=True)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that was used."""
        for view in self.views:
            tensor = view(tensor)
        return tensor

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of examples."""

    @abstractmethod
    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example to the part that was used."""

    def write_to(self, part: Tensor, index: int) -> None:
        """The same into a part that holds anything."""
        self.add_to(part.zero_(), index)


class Product(Use):
    """A use for which the gradient of an example, as a matrix, is the product of two."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """How many products are summed for an entry of an example's gradient."""

    @property
    @abstractmethod
    def held(self) -> int:
        """How many numbers have to be made for the product of an example."""

    @abstractmethod
    def factors(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each example: some rows of the left one, and the right one."""

    @abstractmethod
    def folded(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Some rows of such a matrix as a part of a parameter of that shape; a view."""


@final
@dataclass(eq=False)
class Outer(Product):
    """A linear map of tokens: the gradient is the sum over tokens of output gradient times input.

    Args:
        inputs: Shape (B, T, m).
        outputs: Gradients, shape (B, T, n); the part that was used has shape (n, m).
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.outputs.shape[0]

    @property
    def terms(self) -> int:
        """Tokens."""
        return self.outputs.shape[1]

    @property
    def held(self) -> int:
        """None: they are there."""
        return 0

    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example."""
        left, right = self.outputs[index].mT, self.inputs[index]
        if left.dtype == part.dtype:
            part.addmm_(left, right)
        else:
            part += left @ right

    def write_to(self, part: Tensor, index: int) -> None:
        """Write it."""
        multiply(self.outputs[index].mT, self.inputs[index], part)

    def factors(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each example: output gradients and inputs."""
        return zip(self.outputs[:, :, part].mT.unbind(), self.inputs.unbind(), strict=True)

    def folded(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The matrix is the parameter."""
        return matrix


@final
@dataclass(eq=False)
class Rows(Use):
    """A table of which each token reads one row.

    Args:
        ids: Shape (B, T).
        outputs: Gradients, shape (B, T, d).
    """

    ids: Tensor
    outputs: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.outputs.shape[0]

    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example."""
        part.index_add_(0, self.ids[index], self.outputs[index].to(part.dtype))


@final
@dataclass(eq=False)
class Whole(Use):
    """The gradient of every example as it is.

    Args:
        gradients: Shape (B, *shape of the part that was used).
    """

    gradients: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.gradients.shape[0]

    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example."""
        part += self.gradients[index]

    def write_to(self, part: Tensor, index: int) -> None:
        """Write it."""
        part.copy_(self.gradients[index])


@final
@dataclass(eq=False)
class Convolution(Product):
    """A convolution: a linear map of patches, of each group of channels by itself; a product if there is one group.

    Args:
        inputs: Shape (B, channels, *space).
        outputs: Gradients, shape (B, n, *places).
        stride: Of each dimension of space.
        padding: With so many zeros before each dimension of space, and after it.
        dilation: Of each dimension of space.
        groups: How many separate maps it is made of.
        kernel: Its size.
    """

    inputs: Tensor
    outputs: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    kernel: Sequence[int]
    _patches: list[Tensor] = field(default_factory=list, init=False)

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.outputs.shape[0]

    @property
    def terms(self) -> int:
        """Places."""
        return self.outputs[0, 0].numel()

    @property
    def held(self) -> int:
        """The patches of its image."""
        return self.inputs.shape[1] * math.prod(self.kernel) * self.terms

    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example."""
        part += self._product(part, index, torch.empty_like(part))

    def write_to(self, part: Tensor, index: int) -> None:
        """Write it."""
        self._product(part, index, part)

    def factors(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each example: output gradients and patches, which are copied along channels, the longest run of memory."""
        channels, places, kernel = self.inputs.shape[1], self.outputs.shape[2:], self.kernel
        inputs = self._padded.movedim(1, -1).contiguous()
        steps = inputs.stride()[1:-1]
        moves = [distance * step for distance, step in zip(self.dilation, steps, strict=True)]
        jumps = [distance * step for distance, step in zip(self.stride, steps, strict=True)]
        shape, strides = (*places, *kernel, channels), (*jumps, *moves, 1)
        copied = inputs.new_empty(shape)
        for one, gradient in zip(inputs, self.outputs.flatten(2)[:, part], strict=True):
            copied.copy_(one.as_strided(shape, strides, one.storage_offset()))
            yield gradient, copied.view(places.numel(), -1)

    def folded(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Channels come last in the matrix, and second in the parameter."""
        return matrix.view(len(matrix), *shape[2:], shape[1]).movedim(-1, 1)

    @cached_property
    def _padded(self) -> Tensor:
        widths = [width for one in reversed(self.padding) for width in (one, one)]
        return functional.pad(self.inputs, widths) if any(widths) else self.inputs

    def _product(self, part: Tensor, index: int, out: Tensor) -> Tensor:
        one, gradient = self._padded[index], self.outputs[index]
        kernel, places = part.shape[2:], gradient.shape[1:]
        moves = [distance * step for distance, step in zip(self.dilation, one.stride()[1:], strict=True)]
        jumps = [distance * step for distance, step in zip(self.stride, one.stride()[1:], strict=True)]
        patches = one.as_strided((len(one), *kernel, *places), (one.stride(0), *moves, *jumps), one.storage_offset())
        if not self._patches:
            self._patches.append(torch.empty_like(patches, memory_format=torch.contiguous_format))
        copied = self._patches[0].copy_(patches).view(self.groups, -1, places.numel())
        multiply(
            gradient.reshape(self.groups, -1, places.numel()), copied.mT, out.view(self.groups, -1, copied.shape[1])
        )
        return out


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write a product of matrices into a tensor, which under autocast is of another type than these."""
    if left.dtype == out.dtype:
        torch.matmul(left, right, out=out)
    else:
        out.copy_(left @ right)

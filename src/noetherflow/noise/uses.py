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
        """The patches of its image, and the sum of all gradients in another order."""
        return self.inputs.shape[1] * math.prod(self.kernel) * (self.terms + self.outputs.shape[1])

    def add_to(self, part: Tensor, index: int) -> None:
        """Add the gradient of one example."""
        part += self._product(part, index, torch.empty_like(part))

    def write_to(self, part: Tensor, index: int) -> None:
        """Write it."""
        self._product(part, index, part)

    def factors(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each example: output gradients and patches."""
        for index, gradient in enumerate(self.outputs.flatten(2)[:, part]):
            yield gradient, self._patches_of(index).mT

    @cached_property
    def _padded(self) -> Tensor:
        widths = [width for one in reversed(self.padding) for width in (one, one)]
        return functional.pad(self.inputs, widths) if any(widths) else self.inputs

    @cached_property
    def _patches(self) -> Tensor:
        """Memory for the patches of an image."""
        return self.inputs.new_empty(self.inputs.shape[1], *self.kernel, *self.outputs.shape[2:])

    def _patches_of(self, index: int) -> Tensor:
        """Those of one image, shape (channels * kernel, places)."""
        one, memory = self._padded[index], self._patches
        moves = [distance * step for distance, step in zip(self.dilation, one.stride()[1:], strict=True)]
        jumps = [distance * step for distance, step in zip(self.stride, one.stride()[1:], strict=True)]
        memory.copy_(one.as_strided(memory.shape, (one.stride(0), *moves, *jumps), one.storage_offset()))
        return memory.view(-1, self.terms)

    def _product(self, part: Tensor, index: int, out: Tensor) -> Tensor:
        patches, gradient = self._patches_of(index), self.outputs[index]
        left, right = (one.reshape(self.groups, -1, self.terms) for one in (gradient, patches))
        multiply(left, right.mT, out.view(self.groups, -1, right.shape[1]))
        return out


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write a product of matrices into a tensor, which under autocast is of another type than these."""
    if left.dtype == out.dtype:
        torch.matmul(left, right, out=out)
    else:
        out.copy_(left @ right)

"""How one parameter was used in a forward pass: what its gradient, example by example, consists of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from noetherflow.noise.kernels.base import Window
from noetherflow.noise.kernels.formulas import add_table_rows

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

    def part_of(self, stack: Tensor) -> Tensor:
        """The same part of each tensor of a stack (B, *shape of the parameter), which is contiguous."""
        if not self.views:
            return stack
        # Views are functions of a single tensor; that of an example and of the whole stack differ by an offset only.
        single = self.of(stack.new_empty(stack.shape[1:]))
        size = stack.shape[1:].numel()
        start = stack.storage_offset() + single.storage_offset()
        return stack.as_strided((len(stack), *single.shape), (size, *single.stride()), start)

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of examples."""

    @abstractmethod
    def add_to(self, part: Tensor, examples: slice) -> None:
        """Add the gradients of examples to a stack of the part that was used."""


@final
@dataclass(eq=False)
class Outer(Use):
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

    def add_to(self, part: Tensor, examples: slice) -> None:
        """Add the gradients of examples to a stack."""
        left, right = self.outputs[examples].mT.to(part.dtype), self.inputs[examples].to(part.dtype)
        if part.is_contiguous():
            part.baddbmm_(left, right)
        else:
            part += left @ right


@final
@dataclass(eq=False)
class Rows(Use):
    """A table of which each token reads a row.

    Args:
        ids: Shape (B, T).
        outputs: Gradients, shape (B, T, m).
    """

    ids: Tensor
    outputs: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.outputs.shape[0]

    def add_to(self, part: Tensor, examples: slice) -> None:
        """Add the gradients of examples to a stack."""
        add_table_rows(part, self.ids[examples], self.outputs[examples])


@final
@dataclass(eq=False)
class PerExample(Use):
    """The gradient of every example as it is.

    Args:
        gradients: Shape (B, *shape of the part that was used).
    """

    gradients: Tensor

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.gradients.shape[0]

    def add_to(self, part: Tensor, examples: slice) -> None:
        """Add the gradients of examples to a stack."""
        part += self.gradients[examples]


@final
@dataclass(eq=False)
class Convolution(Use):
    """A convolution: a linear map of patches, of each group of channels by itself.

    Args:
        inputs: Shape (B, channels, *space).
        outputs: Gradients, shape (B, n, *places).
        stride: Of each dimension of space.
        padding: With so many zeros before each dimension of space, and after it.
        dilation: Of each dimension of space.
        groups: How many separate maps it consists of.
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
    def window(self) -> Window:
        """Its geometry."""
        return Window(self.stride, self.padding, self.dilation, self.groups, self.kernel)

    def add_to(self, part: Tensor, examples: slice) -> None:
        """Add the gradients of examples to a stack."""
        right = self.window.patches(self.inputs[examples].to(part.dtype))
        left = self.outputs[examples].to(part.dtype).reshape(*right.shape[:2], -1, right.shape[3])
        part += (left @ right.mT).reshape(part.shape)

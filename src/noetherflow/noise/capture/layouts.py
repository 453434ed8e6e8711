"""Where in a tensor the examples of a batch are: a value for every tensor that depends on the batch."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

# In labels: an entry that depends on no example, and an entry that depends on several. Example b has the label b + 1.
NO_EXAMPLE, SEVERAL = 0.0, -1.0


class Rows(NamedTuple):
    """The vectors of a tensor, by example.

    Args:
        values: Shape (B, T, ...), or (N, ...) with an owner for each of N vectors.
        owners: The example of each of N vectors, shape (N,); -1 for a vector of no example; None for (B, T, ...).
    """

    values: Tensor
    owners: Tensor | None


class Layout(ABC):
    """Where the examples are."""

    @abstractmethod
    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """The label of every entry of a tensor of some shape: what it depends on.

        Args:
            shape: The shape.
            size: Number of examples B.

        Returns:
            Labels of that shape, float32, on the CPU; best an expanded tensor.
        """


@final
@dataclass(frozen=True)
class Shared(Layout):
    """No example: a constant, although it may require a gradient."""

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """Nothing but NO_EXAMPLE."""
        return torch.full((), NO_EXAMPLE).expand(shape)


@final
@dataclass(frozen=True)
class Several(Layout):
    """All examples at once.

    Args:
        additive: Whether the tensor is a sum of a function of each example, plus constants: a mean loss is.
        cause: The function that joined the examples.
        summed: Whether the examples were added up, and the sum was multiplied by nothing.
    """

    additive: bool
    cause: str
    summed: bool = False

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """Nothing but SEVERAL."""
        return torch.full((), SEVERAL).expand(shape)


@final
@dataclass(frozen=True)
class Lost(Layout):
    """Nobody knows.

    Args:
        cause: What hides it.
    """

    cause: str

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """As if it were all of them."""
        return torch.full((), SEVERAL).expand(shape)


class Apart(Layout):
    """A tensor whose vectors belong to one example each.

    A number computed from all examples without a gradient, such as the mean of the inputs, may be a factor of such a
    tensor: `scaled` names the function that brought it in. An example then has no gradient with respect to what comes
    later; in front of the loss it is a constant.
    """

    scaled: str

    @abstractmethod
    def rows(self, tensor: Tensor, kept: int, size: int) -> Rows:
        """The vectors of a tensor by example.

        Args:
            tensor: A tensor of this layout, shape (..., *last dimensions).
            kept: How many last dimensions a vector has.
            size: Number of examples B.

        Returns:
            Vectors of shape (B, T, *last) where every example has as many; views, if possible.
        """

    @abstractmethod
    def ends_before(self, ndim: int, kept: int) -> bool:
        """Whether the last dimensions of a tensor lie within an example."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether every vector belongs to an example."""

    @abstractmethod
    def with_scale(self, cause: str) -> "Apart":
        """The layout after a multiplication by a number of all examples."""


@final
@dataclass(frozen=True)
class Regular(Apart):
    """Index i of a dimension belongs to example (i // inner) % B.

    Args:
        dim: The dimension, from the left.
        inner: How many neighbours belong to one example.
        scaled: See `Apart`.
    """

    dim: int
    inner: int = 1
    scaled: str = ""

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """Shape (1, ..., length, ..., 1), expanded."""
        owners = torch.arange(shape[self.dim]) // max(1, self.inner) % size
        return (owners + 1.0).reshape(-1, *(1,) * (len(shape) - self.dim - 1)).expand(shape)

    def rows(self, tensor: Tensor, kept: int, size: int) -> Rows:
        """A view for examples that come first."""
        last = tensor.shape[tensor.ndim - kept :]
        if self.dim or tensor.shape[0] != size * self.inner:
            tensor = tensor.unflatten(self.dim, (-1, size, self.inner)).movedim(self.dim + 1, 0)
        return Rows(tensor.reshape(size, -1, *last), None)

    def ends_before(self, ndim: int, kept: int) -> bool:
        """Whether the dimension is none of the last ones."""
        return self.dim < ndim - kept

    @property
    def is_complete(self) -> bool:
        """Always."""
        return True

    def with_scale(self, cause: str) -> "Regular":
        """See `Apart`."""
        return Regular(self.dim, self.inner, cause)


@final
@dataclass(frozen=True, eq=False)
class Listed(Apart):
    """Every index of a dimension has an owner.

    Args:
        dim: The dimension, from the left.
        owners: The example of each index, or -1, shape (length,), int64.
        scaled: See `Apart`.
    """

    dim: int
    owners: Tensor
    scaled: str = ""

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """As for `Regular`."""
        return (self.owners + 1.0).reshape(-1, *(1,) * (len(shape) - self.dim - 1)).expand(shape)

    def rows(self, tensor: Tensor, kept: int, size: int) -> Rows:
        """All vectors, each with its owner."""
        last = tensor.shape[tensor.ndim - kept :]
        moved = tensor.movedim(self.dim, 0)
        moved = moved.reshape(len(moved), math.prod(moved.shape[1 : moved.ndim - kept]), *last)
        owners = self._on(tensor.device).repeat_interleave(moved.shape[1])
        return Rows(moved.flatten(0, 1), owners)

    def ends_before(self, ndim: int, kept: int) -> bool:
        """Whether the dimension is none of the last ones."""
        return self.dim < ndim - kept

    @cached_property
    def is_complete(self) -> bool:
        """Whether no owner is -1."""
        return bool((self.owners >= 0).all())

    def with_scale(self, cause: str) -> "Listed":
        """See `Apart`."""
        return Listed(self.dim, self.owners, cause)

    def _on(self, device: torch.device) -> Tensor:
        return self._by_device.setdefault(device, self.owners.to(device))

    @cached_property
    def _by_device(self) -> dict[torch.device, Tensor]:
        return {}


@final
@dataclass(frozen=True)
class Single(Apart):
    """The complete tensor belongs to one example.

    Args:
        example: Which one.
        scaled: See `Apart`.
    """

    example: int
    scaled: str = ""

    def labels(self, shape: torch.Size, size: int) -> Tensor:
        """A constant."""
        return torch.full((), self.example + 1.0).expand(shape)

    def rows(self, tensor: Tensor, kept: int, size: int) -> Rows:
        """All vectors, with a single owner."""
        count = math.prod(tensor.shape[: tensor.ndim - kept])
        values = tensor.reshape(count, *tensor.shape[tensor.ndim - kept :])
        return Rows(values, torch.full((len(values),), self.example, device=tensor.device))

    def ends_before(self, ndim: int, kept: int) -> bool:
        """Always."""
        return True

    @property
    def is_complete(self) -> bool:
        """Always."""
        return True

    def with_scale(self, cause: str) -> "Single":
        """See `Apart`."""
        return Single(self.example, cause)


SHARED: Final = Shared()
EMPTY: Final = torch.empty(0, dtype=torch.int64)


def layout_of(labels: Tensor, size: int) -> Layout:
    """The layout that has given labels.

    Entries that depend on no example may have any owner: `cat` with a constant leaves the examples where they are.

    Args:
        labels: Shape of the tensor.
        size: Number of examples B.

    Returns:
        `Several`, without a cause, where no dimension separates the examples.
    """
    if not labels.numel():
        return Listed(next(dim for dim, length in enumerate(labels.shape) if not length), EMPTY)
    low, high = (float(bound) for bound in labels.aminmax())
    if low < NO_EXAMPLE:
        return Several(additive=False, cause="")
    if high == NO_EXAMPLE:
        return SHARED
    if low == high:
        return Single(int(high) - 1)
    for dim in range(labels.ndim):
        moved = labels.movedim(dim, 0).flatten(1) if labels.ndim > 1 else labels[:, None]
        owners = moved.amax(1)
        if bool(((moved == owners[:, None]) | (moved == NO_EXAMPLE)).all()):
            return _along(dim, owners.long() - 1, size)
    return Several(additive=False, cause="")


def _along(dim: int, owners: Tensor, size: int) -> Layout:
    """The layout for owners along a dimension: `Regular`, if it can be."""
    if int(owners.max()) == int(owners.min()):
        return Single(int(owners[0]))
    for inner in inners(len(owners), size):
        regular = torch.arange(len(owners)) // inner % size
        if bool(((owners == regular) | (owners < 0)).all()):
            return Regular(dim, inner)
    return Listed(dim, owners)


def inners(length: int, size: int) -> list[int]:
    """How many neighbours may belong to an example along a dimension of some length, the most first."""
    quotient, rest = divmod(length, size)
    return [] if rest or not quotient else [inner for inner in range(quotient, 0, -1) if quotient % inner == 0]

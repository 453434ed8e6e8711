"""Sources of examples: a distribution or a finite data set, drawn in minibatches or used in full."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from noetherflow._batch import cast, tensors_of, with_tensors
from noetherflow._errors import EmptyDataError, SettingsError
from noetherflow._types import Batch

# A distribution: `sample(count, generator)` returns a batch of `count` new examples.
Sampler = Callable[[int, torch.Generator], Batch]


class Stream(ABC):
    """Minibatches for many replicas at once, drawn independently for each replica."""

    @abstractmethod
    def draw(self, steps: int, replicas: int, size: int, generator: torch.Generator) -> list[Tensor]:
        """The tensors of the next minibatches, each of shape (steps, replicas, size, ...)."""

    @abstractmethod
    def rebuild(self, tensors: list[Tensor]) -> Batch:
        """A batch of these tensors, in the containers of the user's batches."""


@final
class OnlineStream(Stream):
    """New examples from a distribution for every minibatch."""

    def __init__(self, sample: Sampler, dtype: torch.dtype, device: torch.device) -> None:
        self._sample, self._dtype, self._device = sample, dtype, device
        self._template: Any = None

    def draw(self, steps: int, replicas: int, size: int, generator: torch.Generator) -> list[Tensor]:
        """The tensors of the next minibatches, each of shape (steps, replicas, size, ...)."""
        count = steps * replicas * size
        batch = cast(self._sample(count, generator), self._dtype, self._device)
        tensors = tensors_of(batch)
        for tensor in tensors:
            if tensor.shape[:1] != (count,):
                raise SettingsError(
                    f"the data stream was asked for {count} examples, so every tensor must have that leading "
                    f"dimension; got shapes {[tuple(t.shape) for t in tensors]}"
                )
        if not tensors:
            raise EmptyDataError(f"the data stream returned no tensor: {type(batch).__name__}")
        self._template = batch
        # Contiguous, so that the tensors of a step have equal strides, however many steps are drawn together.
        return [tensor.contiguous().unflatten(0, (steps, replicas, size)) for tensor in tensors]

    def rebuild(self, tensors: list[Tensor]) -> Batch:
        """A batch of these tensors, in the containers of the user's batches."""
        return with_tensors(self._template, tensors)


@final
class FiniteStream(Stream):
    """Minibatches from a data set.

    Args:
        data: The data set: tensors of shape (N, ...) in any containers.
        dtype: Type of floating-point tensors.
        device: Device of the tensors.
        replacement: True draws every example independently; False goes through the data set in epochs, in a random
            order for each replica.

    Raises:
        SettingsError: If the tensors differ in their leading dimension.
        EmptyDataError: If there is no example.
    """

    def __init__(self, data: Batch, dtype: torch.dtype, device: torch.device, *, replacement: bool) -> None:
        self._data = cast(data, dtype, device)
        self.tensors = tensors_of(self._data)
        sizes = {tensor.shape[0] if tensor.ndim else None for tensor in self.tensors}
        if len(sizes) != 1 or None in sizes:
            shapes = [tuple(tensor.shape) for tensor in self.tensors]
            raise SettingsError(
                "expected a data set of tensors with one leading dimension in common, an entry per example; "
                f"got shapes {shapes}"
            )
        self.count = len(self.tensors[0])
        if self.count == 0:
            raise EmptyDataError("the data set is empty")
        self._replacement = replacement
        # The indices left in the epoch of every replica, shape (replicas, examples left).
        self._queue: Tensor | None = None

    def draw(self, steps: int, replicas: int, size: int, generator: torch.Generator) -> list[Tensor]:
        """The tensors of the next minibatches, each of shape (steps, replicas, size, ...)."""
        if self._replacement:
            index = torch.randint(self.count, (steps, replicas, size), generator=generator, device=generator.device)
        else:
            index = torch.stack([self._next(replicas, size, generator) for _ in range(steps)])
        index = index.to(self.tensors[0].device)
        return [tensor[index] for tensor in self.tensors]

    def rebuild(self, tensors: list[Tensor]) -> Batch:
        """A batch of these tensors, in the containers of the user's batches."""
        return with_tensors(self._data, tensors)

    def _next(self, replicas: int, size: int, generator: torch.Generator) -> Tensor:
        """Indices of the next minibatch in the epoch of every replica, shape (replicas, size)."""
        # An incomplete minibatch at the end of an epoch is dropped, as with `drop_last=True`.
        if self._queue is None or self._queue.shape[1] < size:
            order = torch.rand(replicas, self.count, generator=generator, device=generator.device)
            self._queue = order.argsort(dim=1)
        chosen, self._queue = self._queue[:, :size], self._queue[:, size:]
        return chosen


# The minibatches of several steps are drawn together, because a draw costs more than a small step. Largest size of a
# draw in bytes, and largest number of steps.
_BLOCK_BYTES = 2**24
_BLOCK_STEPS = 256


@final
class Minibatches:
    """The minibatches of one step after another, drawn many steps at a time."""

    shared = False

    def __init__(self, stream: Stream, replicas: int, size: int, generator: torch.Generator) -> None:
        self._stream, self._replicas, self.size, self._generator = stream, replicas, size, generator
        # The first draw is one step, whose size in bytes tells how many steps fit into later draws.
        self._block = stream.draw(1, replicas, size, generator)
        self._position = 0
        step_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._block)
        self._steps = max(1, min(_BLOCK_STEPS, _BLOCK_BYTES // max(1, step_bytes)))

    def next(self) -> list[Tensor]:
        """The tensors of the next step's minibatches, shape (R, S, ...)."""
        if self._position == len(self._block[0]):
            self._block = self._stream.draw(self._steps, self._replicas, self.size, self._generator)
            self._position = 0
        self._position += 1
        return [tensor[self._position - 1] for tensor in self._block]


@final
class FullBatch:
    """All examples of the data set in every step, for all replicas."""

    shared = True

    def __init__(self, stream: FiniteStream) -> None:
        self._tensors = stream.tensors
        self.size = stream.count

    def next(self) -> list[Tensor]:
        """The tensors of the data set, shape (N, ...)."""
        return self._tensors

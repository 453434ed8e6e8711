"""Tensors that are made of parameters alone, and tensors that hold examples."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from noetherflow.noise.uses import Use, View


@final
@dataclass(eq=False, slots=True)
class Source:
    """A tensor whose per-example gradient is collected: a parameter, or what a forward pass makes of parameters alone.

    Args:
        name: Of the parameter, or None.
        shape: Of the tensor.
        parents: What it was made of.
        function: How: the tensor as a function of its parents'.
        ids: If it is made of the rows of a table, which ones.
        uses: Noted in the backward pass.
        unknown: The operation that stands in the way, if there is one.
    """

    name: str | None
    shape: torch.Size
    parents: tuple["Tracked", ...] = ()
    function: Callable[..., Tensor] | None = None
    ids: Tensor | None = None
    uses: list[Use] = field(default_factory=list)
    unknown: str | None = None

    def refuse(self, operation: str) -> None:
        """Note that the per-example gradient cannot be had."""
        self.unknown = self.unknown or operation
        for parent in self.parents:
            parent.source.refuse(operation)


@final
@dataclass(eq=False, slots=True)
class Tracked:
    """A tensor of the forward pass that is a source or a view of one.

    Args:
        source: Which one.
        tensor: The tensor.
        root: The source as a tensor.
        zero: Zeros of its shape.
        views: What leads from the source to the tensor.
    """

    source: Source
    tensor: Tensor
    root: Tensor
    zero: Tensor
    views: tuple[View, ...] = ()

    def note(self, use: Use) -> Tensor | None:
        """Keep a use until the last one of its source is there.

        Returns:
            What to hand on to the source as a gradient. Where the whole one takes its place something has to arrive,
            but only once, or autograd would add up zeros.
        """
        uses = self.source.uses
        uses.append(use)
        return self.zero if len(uses) == 1 else None


@final
@dataclass(frozen=True)
class Layout:
    """Where in a tensor the examples are: along its first dimension, with or without tokens, or along its second.

    Args:
        size: Number of examples.
        second: Whether tokens come first.
    """

    size: int
    second: bool

    def fits(self, tensor: Tensor, kept: int = 1) -> bool:
        """Whether `examples_first` can be asked for."""
        before = tensor.ndim - kept
        if self.second and before >= 2:
            return tensor.shape[1] == self.size
        return before >= 1 and tensor.shape[0] > 0 and tensor.shape[0] % self.size == 0

    def examples_first(self, tensor: Tensor, kept: int = 1) -> Tensor:
        """A tensor of tokens as (B, T, *its last `kept` dimensions); a view, if possible.

        A leading dimension of several times B is that of examples and tokens, or of tokens and examples.

        Returns:
            Shape (B, T, ...).
        """
        last = tensor.shape[tensor.ndim - kept :]
        if self.second:
            tokens = tensor if tensor.ndim - kept >= 2 else tensor.reshape(-1, self.size, *last)
            return tokens.transpose(0, 1).reshape(self.size, -1, *last)
        return tensor.reshape(self.size, -1, *last)


def roots_of(*tracked: Tracked | None) -> list[Tensor]:
    """The tensors to which the gradients of some uses go on."""
    return [one.root for one in tracked if one is not None]


def leaves_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments."""
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from leaves_of(one)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A function of every tensor in an argument, or in all of them."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(function, one) for one in value)
    if type(value) is dict:
        return {name: mapped(function, one) for name, one in value.items()}
    return value


def is_view(tensor: Tensor, of: Tensor) -> bool:
    """Whether a tensor shares the memory of another, every entry at a place of its own."""
    overlapping = any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True))
    return not overlapping and tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def as_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *given: Tensor) -> Callable[..., Any]:
    """A call as a function of some of the tensors that it was given."""

    def function(*tensors: Tensor) -> Any:
        stand_ins = {id(one): tensor for one, tensor in zip(given, tensors, strict=True)}

        def put(leaf: Tensor) -> Tensor:
            return stand_ins.get(id(leaf), leaf)

        return func(*mapped(put, args), **mapped(put, kwargs))

    return function


def part_of(function: Callable[..., Any], index: int) -> View:
    """One of several views that a function returns."""
    return lambda tensor: list(leaves_of((function(tensor),)))[index]

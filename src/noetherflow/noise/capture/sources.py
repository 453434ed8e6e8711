"""Tensors of a forward pass that are computed from parameters alone, and the uses that are recorded of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from noetherflow.noise.capture.owned import Record
from noetherflow.noise.uses import View


@final
@dataclass(eq=False, slots=True)
class Source:
    """A tensor whose gradient by example is collected: a parameter, or what a forward pass makes of parameters alone.

    Args:
        name: Of the parameter, or None.
        shape: Of the tensor.
        parents: What it was computed from.
        function: How: the tensor as a function of its parents'.
        call: The function and its arguments, if it has parents.
        uses: Recorded in the backward pass.
        refused: Why its gradient cannot be taken apart by example, if it cannot.
        constant: Whether it enters the loss as a term that does not depend on the batch, such as a penalty.
        arrived: Whether a gradient arrived in this backward pass.
    """

    name: str | None
    shape: torch.Size
    parents: tuple["Tracked", ...] = ()
    function: Callable[..., Tensor] | None = None
    call: "Call | None" = None
    uses: list[Record] = field(default_factory=list)
    refused: str = ""
    constant: bool = False
    arrived: bool = False

    def refuse(self, cause: str) -> None:
        """Note that the gradient cannot be taken apart by example, nor those of the parents."""
        self.refused = self.refused or cause
        for parent in self.parents:
            parent.source.refuse(cause)

    def take(self) -> list[Record]:
        """The uses recorded so far, which are forgotten."""
        uses, self.uses = self.uses, []
        return uses


@final
@dataclass(frozen=True, slots=True)
class Call:
    """A linear map of a constant, or a table that is read at constant places: of a row for each example, perhaps.

    Args:
        kind: `linear` or `table`.
        constant: The inputs (..., m), or the ids (...).
        weight: Which of the parents is the weight or the table.
        bias: Which is the bias, or None.
    """

    kind: str
    constant: Tensor
    weight: int
    bias: int | None = None


@final
@dataclass(eq=False, slots=True)
class Tracked:
    """A tensor of the forward pass that is a source or a view of a source.

    Args:
        source: Which source.
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

    def note(self, use: Record) -> Tensor | None:
        """Keep a use until the last use of its source is there.

        Returns:
            The gradient to hand on to the source. The complete gradient is added where this arrives; so something has
            to arrive, but only once, or autograd would add up zeros.
        """
        uses = self.source.uses
        uses.append(use)
        return self.zero if len(uses) == 1 else None


def roots_of(*tracked: Tracked | None) -> list[Tensor]:
    """The tensors to which the gradients of some uses go on."""
    return [use.root for use in tracked if use is not None]


def is_view(tensor: Tensor, of: Tensor) -> bool:
    """Whether a tensor shares the numbers of another, every entry at a place of its own."""
    if tensor.dtype is not of.dtype or tensor.is_conj() or tensor.is_neg():
        return False
    overlapping = any(step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True))
    return not overlapping and tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()

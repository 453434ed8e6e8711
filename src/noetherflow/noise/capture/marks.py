"""The layouts of the tensors of a forward pass: attached to tensors that it makes, kept aside for those of the user."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from noetherflow.noise.capture.calls import leaves_of
from noetherflow.noise.capture.layouts import SHARED, Layout, Lost, Regular, Single


@final
class Marks:
    """Where the examples are in every tensor that depends on the batch.

    Args:
        batch: The tensors of the batch that have an entry per example, along their first dimension.
        size: Number of examples B.

    Attributes:
        again: Whether layers under a checkpoint are computed again: what these keep of inner checkpoints is detached
            unseen, and recognised by its memory.
    """

    def __init__(self, batch: Iterable[Tensor], size: int) -> None:
        first = Regular(0) if size > 1 else Single(0)
        # Strong references, so that no identity is used twice.
        self._given: dict[int, tuple[Tensor, Layout]] = {id(leaf): (leaf, first) for leaf in batch}
        self._token = object()
        self.again = False

    def layout(self, leaf: Tensor) -> Layout:
        """Where the examples are in a tensor that is not computed from parameters alone."""
        entry = getattr(leaf, "_examples", None)
        if entry is not None and entry[0] is self._token:
            layout: Layout = entry[1]
            return layout
        if id(leaf) in self._given:
            return self._given[id(leaf)][1]
        if _is_wrapped(leaf):
            return Lost("a transform of torch.func")
        if self.again and (known := self._layout_of_memory(leaf)) is not None:
            return known
        if leaf.is_leaf or not leaf.requires_grad:
            return SHARED
        return Lost(f"{type(leaf.grad_fn).__name__}, of a forward pass that was not seen")

    def place(self, leaf: Tensor, layout: Layout) -> None:
        """Attach the layout to a tensor that the forward pass made."""
        leaf._examples = (self._token, layout)  # type: ignore[attr-defined]
        if self.again and leaf.layout is torch.strided:
            leaf.untyped_storage()._examples = (self._token, _place_of(leaf), layout)  # type: ignore[attr-defined]

    def place_result(self, leaf: Tensor, layout: Layout, args: Iterable[Any]) -> None:
        """The same for a result, perhaps a written argument; nothing is attached to tensors of the user."""
        if not self.is_placed(leaf) and any(leaf is given for given in leaves_of(args)):
            self._given[id(leaf)] = (leaf, layout)
        else:
            self.place(leaf, layout)

    def is_placed(self, leaf: Tensor) -> bool:
        """Whether a layout is attached to a tensor."""
        entry = getattr(leaf, "_examples", None)
        return entry is not None and entry[0] is self._token

    def clear(self) -> None:
        """Let go of all tensors."""
        self._given.clear()

    def _layout_of_memory(self, leaf: Tensor) -> Layout | None:
        if leaf.layout is not torch.strided:
            return None
        entry = getattr(leaf.untyped_storage(), "_examples", None)
        if entry is None or entry[0] is not self._token or entry[1] != _place_of(leaf):
            return None
        layout: Layout = entry[2]
        return layout


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func wraps a tensor, which then has no memory of its own."""
    unwrap = getattr(torch.func, "debug_unwrap", None)  # since PyTorch 2.7
    if unwrap is not None:
        return unwrap(tensor) is not tensor
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return tensor.layout is torch.strided
    return False


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()

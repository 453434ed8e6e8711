"""The layouts of the tensors of a forward pass: attached to tensors that it makes, kept aside for those of the user."""

import weakref
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
        # Memory that was written through a view: what was known of it before holds no more.
        self._written: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._serial = 0
        self._placed: list[weakref.ref[Any]] = []
        self.again = False

    def layout(self, leaf: Tensor) -> Layout:
        """Where the examples are in a tensor that is not computed from parameters alone."""
        entry: Any = getattr(leaf, "_examples", None)
        mine = entry is not None and entry[0] is self._token
        if self._written and self._is_overwritten(leaf, entry[2] if mine else 0):
            return Lost("a write through a view of the same memory")
        if mine:
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
        self._serial += 1
        leaf._examples = (self._token, layout, self._serial)  # type: ignore[attr-defined]
        self._placed.append(weakref.ref(leaf))
        if self.again and leaf.layout is torch.strided:
            memory = leaf.untyped_storage()
            memory._examples = (self._token, _place_of(leaf), layout)  # type: ignore[attr-defined]
            self._placed.append(weakref.ref(memory))

    def place_result(self, leaf: Tensor, layout: Layout, args: Iterable[Any]) -> None:
        """The same for a result, perhaps a written argument; nothing is attached to tensors of the user."""
        argument = any(leaf is given for given in leaves_of(args))
        if argument and self.layout(leaf) != layout and leaf.layout is torch.strided and not _is_wrapped(leaf):
            self._serial += 1
            memory = leaf.untyped_storage()
            self._written[memory.data_ptr()] = (memory, self._serial)
        if argument and not self.is_placed(leaf):
            self._given[id(leaf)] = (leaf, layout)
        else:
            self.place(leaf, layout)

    def is_placed(self, leaf: Tensor) -> bool:
        """Whether a layout is attached to a tensor."""
        entry = getattr(leaf, "_examples", None)
        return entry is not None and entry[0] is self._token

    def clear(self) -> None:
        """Let go of all tensors, and leave nothing at those that the user keeps."""
        for reference in self._placed:
            if (kept := reference()) is not None:
                vars(kept).pop("_examples", None)
        for known in (self._placed, self._given, self._written):
            known.clear()

    def _is_overwritten(self, leaf: Tensor, serial: int) -> bool:
        if leaf.layout is not torch.strided or _is_wrapped(leaf):
            return False
        written = self._written.get(leaf.untyped_storage().data_ptr())
        return written is not None and serial < written[1] and id(leaf) not in self._given

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

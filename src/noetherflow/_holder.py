"""A model and its loss in one module, which `functional_call` evaluates at given parameters and buffers."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow._types import Batch, Loss


@final
class Holder(nn.Module):
    """A model and its loss in one module, whose forward pass runs an action while given parameters are in place.

    Args:
        model: The model.
        loss: `loss(model, batch)`, shape (B,). A loss may be a module with further parameters and buffers.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def losses(self, batch: Batch) -> Tensor:
        """The losses of a batch, shape (B,)."""
        return self.loss(self.model, batch)

    def forward(self, action: Callable[[], Any]) -> Any:
        """Run the action, and return its result."""
        return action()


def places_of(holder: nn.Module, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The keys of the state that `functional_call` has to be given, one for every place of a tensor.

    A tied weight has a place in each module that uses it. A module that is registered under several names has the
    places of its first name only: at a second place, functional_call would take the tensor that it has just put there
    for the original, and restore that tensor at the end.

    Args:
        holder: The module that is evaluated.
        model: The model in it.

    Returns:
        Canonical name by place for the parameters of the model, and tensor by place for all further parameters and
        buffers.
    """
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    places, others = {}, {}
    for prefix, module in holder.named_modules():
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(recurse=False, remove_duplicate=False):
                place = f"{prefix}.{name}" if prefix else name
                if id(tensor) in canonical:
                    places[place] = canonical[id(tensor)]
                else:
                    others[place] = tensor
    return places, others


def eager() -> AbstractContextManager[Any, Any]:
    """A block in which compiled modules run uncompiled, because modes and `torch.func` cannot see compiled code."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing is compiled, and to load the compiler takes a second and much memory
    return torch.compiler.set_stance("force_eager")

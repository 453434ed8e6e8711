"""A model and its loss in one module, in which `functional_call` puts parameters and buffers into place."""

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from noetherflow._types import Batch, Loss


@final
class Holder(nn.Module):
    """A model and its loss in one module, whose forward pass is whatever has to happen with parameters in place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def losses(self, batch: Batch) -> Tensor:
        """The losses of a batch."""
        return self.loss(self.model, batch)

    def forward(self, action: Callable[[], Any]) -> Any:
        """Run the action."""
        return action()


def places_of(holder: nn.Module, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Where every parameter and buffer has to be put.

    A tied weight has several places. A module that is itself registered under several names has one: functional_call
    would take what it put there first for the original, and leave it there.

    Returns:
        Canonical name by place, for the parameters of the model; the tensor by place, for all others.
    """
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    places, others = {}, {}
    for prefix, module in holder.named_modules():
        for listed in (module.named_parameters, module.named_buffers):
            for name, tensor in listed(recurse=False, remove_duplicate=False):
                place = f"{prefix}.{name}" if prefix else name
                if id(tensor) in canonical:
                    places[place] = canonical[id(tensor)]
                else:
                    others[place] = tensor
    return places, others

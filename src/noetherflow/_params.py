"""Named parameters: snapshots, strict checks, and a model's loss as a plain function of them."""

import copy
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from noetherflow._errors import NonFiniteError, ParameterNameError
from noetherflow._types import Batch, Loss, Params


def snapshot(source: nn.Module | Params, dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
    """A copy of named parameters, detached, that a later optimizer step cannot change.

    Args:
        source: A module, or tensors by name (such as `dict(model.named_parameters())`).
        dtype: The floating-point type of the copy; None keeps each tensor's own.

    Returns:
        Tensors by canonical name: a tied weight appears once.
    """
    named = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    return {name: tensor.detach().to(dtype or tensor.dtype, copy=True) for name, tensor in named.items()}


def aliases(model: nn.Module) -> dict[str, str]:
    """Every name under which a parameter appears, with the canonical one that `named_parameters()` uses."""
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    return {name: canonical[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}


def require_names(available: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Raise unless every wanted name is there."""
    have = set(available)
    missing = [name for name in wanted if name not in have]
    if missing:
        shown = sorted(have)
        listing = ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")
        raise ParameterNameError(f"{what} names {missing}, which are not among the parameters: {listing}")


def require_finite(params: Params, what: str) -> None:
    """Raise if any tensor holds NaN or infinity, naming the first."""
    for name, tensor in params.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{what} {name!r} holds {_count_bad(tensor)} non-finite entries of {tensor.numel()}")


def bind(model: nn.Module, loss: Loss, dtype: torch.dtype | None = None) -> Callable[[Params, Batch], Tensor]:
    """A model's per-example loss as a function of (params, batch), of the parameters by canonical name.

    The user's module is never touched: parameters are passed in, and buffers are copies (so that a running mean does
    not move), in the given dtype.

    Returns:
        The function.
    """
    holder = _Holder(model, loss)
    buffers = {name: _as(buffer.detach().clone(), dtype) for name, buffer in model.named_buffers()}
    places = _places(model)
    canonical = set(places.values())

    def losses(params: Params, batch: Batch) -> Tensor:
        require_names(canonical, params, "the parameters of a call")
        # A copy per call: a module in train mode may write into its buffers.
        values = {name: buffer.clone() for name, buffer in buffers.items()} | dict(params)
        require_names(values, canonical, "the model")
        state = {f"model.{place}": values[name] for place, name in places.items()}
        result: Tensor = functional_call(holder, state, (batch,), tie_weights=False)
        return result

    return losses


def _places(model: nn.Module) -> dict[str, str]:
    """Where every parameter and buffer has to be put, with its canonical name.

    A tied weight has several places. A module that is itself registered under several names has one: functional_call
    would take what it put there first for the original, and leave it there.

    Returns:
        Canonical name by place.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    canonical = {id(tensor): name for name, tensor in named}
    places = {}
    for prefix, module in model.named_modules():
        own = [
            listed(recurse=False, remove_duplicate=False) for listed in (module.named_parameters, module.named_buffers)
        ]
        for name, tensor in itertools.chain(*own):
            places[f"{prefix}.{name}" if prefix else name] = canonical[id(tensor)]
    return places


def copy_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An independent copy of a model in another floating-point type."""
    return copy.deepcopy(model).to(dtype)


class _Holder(nn.Module):
    """Lets `functional_call` swap the parameters of a model that is used inside a loss function."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that a loss which is itself a module does not register its own state here.
        self.loss = (loss,)

    def forward(self, batch: Batch) -> Tensor:
        return self.loss[0](self.model, batch)


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _count_bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())

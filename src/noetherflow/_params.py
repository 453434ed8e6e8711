"""Named parameters: snapshots, conversions and strict checks."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from noetherflow._errors import NonFiniteError, ParameterNameError
from noetherflow._types import Params


def snapshot(source: nn.Module | Params, dtype: torch.dtype | None = torch.float64) -> dict[str, Tensor]:
    """A copy of named parameters, detached, that a later optimizer step cannot change.

    Args:
        source: A module, or tensors by name (such as `dict(model.named_parameters())`).
        dtype: The type of the copies of floating-point tensors; None keeps each tensor's own. Integers stay integers.

    Returns:
        Tensors by canonical name: a tied weight appears once.
    """
    named = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    converted = {name: (tensor.detach(), in_dtype(tensor.detach(), dtype)) for name, tensor in named.items()}
    return {name: new if new.dtype != old.dtype else old.clone() for name, (old, new) in converted.items()}


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in a type; a complex one with parts in that type; any other, or for None, as it is."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


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


def copy_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An independent copy of a model in another floating-point type."""
    result = copy.deepcopy(model)
    for tensor in (*result.parameters(), *result.buffers()):
        tensor.data = in_dtype(tensor.data, dtype)
    return result


def _count_bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())

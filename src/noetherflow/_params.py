"""Parameters by name: copies, conversions and checks."""

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from noetherflow._errors import NonFiniteError, ParameterNameError, SettingsError
from noetherflow._types import Params

# What wrappers put in front of the names of parameters: DistributedDataParallel and PEFT in front of the first module,
# torch.compile in front of any.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+|(?<=\.)_orig_mod\.")


def snapshot(
    source: nn.Module | Params, dtype: torch.dtype | None = torch.float64, *, device: torch.device | None = None
) -> dict[str, Tensor]:
    """A detached copy of named parameters, which later steps of an optimizer do not change.

    Args:
        source: A module, or tensors by name (such as `dict(model.named_parameters())`).
        dtype: The type of the copies of floating-point tensors; None keeps the type of each tensor. Integers stay
            integers.
        device: The device of the copies; None keeps the device of each tensor.

    Returns:
        Tensors by canonical name: a tied weight appears once.
    """
    named = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    result = {}
    for name, tensor in named.items():
        given = tensor.detach()
        # Moved first: another device may have a type that the device of the tensor lacks.
        copied = in_dtype(given if device is None else given.to(device), dtype)
        result[name] = copied.clone() if copied is given else copied
    return result


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor converted to a floating-point type, or if it is complex to the complex type with parts of that type.

    Args:
        tensor: Any tensor.
        dtype: The floating-point type, or None.

    Returns:
        The converted tensor; integers and booleans, and every tensor if the dtype is None, as they are.
    """
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def aliases(model: nn.Module) -> dict[str, str]:
    """Canonical name, as in `named_parameters()`, by every name under which a parameter appears.

    Returns:
        Names by name.

    Raises:
        SettingsError: If the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(
            f"expected a torch.nn.Module as model, got {type(model).__name__}: the order of arguments is model, loss, "
            "data, symmetries, settings"
        )
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    return {name: canonical[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}


def padding_rows(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The padding rows of embeddings, `padding_idx`, by canonical name of the weight: a lookup gives them no gradient.

    Returns:
        Indices of rows by name; weights without a padding row are left out.
    """
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    rows: dict[str, set[int]] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            name = canonical.get(id(module.weight))
            if name is not None:
                rows.setdefault(name, set()).add(module.padding_idx % len(module.weight))
    return {name: tuple(sorted(indices)) for name, indices in rows.items()}


def canonical_names(model: nn.Module, names: Iterable[str], what: str) -> dict[str, str]:
    """The canonical names of parameters that were named in a model, or in that model inside a wrapper or out of it.

    Prefixes of DistributedDataParallel, torch.compile and PEFT are left out of the comparison, unless the model has
    parameters that differ only by such a prefix.

    Args:
        model: The model.
        names: The names.
        what: Subject of the error message.

    Returns:
        Canonical name by name.

    Raises:
        ParameterNameError: If a name belongs to no parameter.
    """
    known, names = aliases(model), tuple(names)
    inner: dict[str, set[str]] = {}
    for name in known:
        inner.setdefault(_WRAPPERS.sub("", name), set()).add(known[name])
    matches = {name: inner.get(_WRAPPERS.sub("", name), set()) for name in names}
    if all(len(match) == 1 for match in matches.values()):
        return {name: next(iter(match)) for name, match in matches.items()}
    # A module of the user may be called `module`: then only the names as they are tell parameters apart.
    require_names(known, names, what)
    return {name: known[name] for name in names}


def require_names(available: Iterable[str], required: Iterable[str], what: str) -> None:
    """Raise `ParameterNameError` unless every required name is available; `what` is the subject of the message."""
    known = set(available)
    missing = [name for name in required if name not in known]
    if missing:
        shown = sorted(known)
        listing = ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")
        raise ParameterNameError(f"{what} names {missing}, which are not among the parameters: {listing}")


def require_finite(params: Params, what: str) -> None:
    """Raise `NonFiniteError` if a tensor holds NaN or infinity; `what` and a name are the subject of the message."""
    for name, tensor in params.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{what} {name!r} holds {_count_bad(tensor)} non-finite entries of {tensor.numel()}")


def copy_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An independent copy of a model, converted to a floating-point type."""
    # A module may keep a result of its last call, which is part of a graph and cannot be copied as it is.
    kept = [value for module in model.modules() for value in tree_leaves(vars(module)) if isinstance(value, Tensor)]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    result = copy.deepcopy(model, memo)
    for tensor in (*result.parameters(), *result.buffers()):
        tensor.data = in_dtype(tensor.data, dtype)
    return result


def _count_bad(tensor: Tensor) -> int:
    """The number of entries that are NaN or infinite."""
    return int((~torch.isfinite(tensor)).sum())

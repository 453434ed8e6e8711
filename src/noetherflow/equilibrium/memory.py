"""The memory that the search for an equilibrium takes, and what would fit into a limit."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.noise.exact import resolve
from noetherflow.noise.statistics import names_with_variances
from noetherflow.symmetry import Symmetry

_FLOAT64 = 8
# Tensors in float64 that the search holds at its peak, compared with GPT-2: mean gradients (of the present point, and
# of the first where `analyze` keeps these); parameters on which symmetries act (at the first, this and the next point);
# variances of the entries of scaled parameters (of a batch, their sum, centred, and as for the means).
_MEANS, _POINTS, _VARIANCES = 2, 3, 6
# Tensors in the type of the gradients: parameters, gradients of a batch, and of the last batches.
_GRADIENTS = 3


def required_bytes(
    params: Params, trained: Collection[str], symmetries: Mapping[str, Symmetry], dtype: torch.dtype
) -> int:
    """An estimate of the memory beyond that of the model and of its activations, in bytes.

    Args:
        params: All parameters.
        trained: The names of those that are trained.
        symmetries: By name, with canonical parameter names.
        dtype: The floating-point type of the gradients.

    Returns:
        Bytes.
    """
    sizes = {name: tensor.numel() for name, tensor in params.items()}
    every, learned = sum(sizes.values()), sum(sizes[name] for name in trained)
    moved = sum(sizes[name] for name in {name for symmetry in symmetries.values() for name in symmetry.names})
    scaled = sum(sizes[name] for name in names_with_variances(symmetries))
    in_float64 = every + _MEANS * learned + _POINTS * moved + _VARIANCES * scaled
    return _FLOAT64 * in_float64 + dtype.itemsize * (every + _GRADIENTS * learned)


def require_memory(model: nn.Module, symmetries: Mapping[str, Symmetry], dtype: torch.dtype, limit: int | None) -> None:
    """Raise `SettingsError` if the search needs more memory than a limit, with what would fit."""
    if limit is None:
        return
    params = dict(model.named_parameters())
    trained = [name for name, parameter in params.items() if parameter.requires_grad]
    resolved = resolve(model, symmetries)
    names = list(resolved)

    def bytes_of(count: int) -> int:
        return required_bytes(params, trained, {name: resolved[name] for name in names[:count]}, dtype)

    needed = bytes_of(len(names))
    if needed <= limit:
        return
    fitting = max((count for count in range(len(names)) if bytes_of(count) <= limit), default=0)
    if fitting:
        remedy = f"the first {fitting} of the {len(names)} symmetries fit: give them as symmetries="
    else:
        least = bytes_of(1 if names else 0)
        remedy = (
            f"a single symmetry needs {_shown(least)}; freeze parameters (requires_grad_(False)), or raise max_bytes"
        )
    raise SettingsError(
        f"the search needs about {_shown(needed)} beyond the model in {dtype}, more than max_bytes = {_shown(limit)}: "
        f"{remedy}"
    )


def _shown(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"

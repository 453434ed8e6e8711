"""The floating-point type in which a model is evaluated: float64, or a coarser type where float64 is not possible."""

import warnings
from typing import NamedTuple

import torch
from torch import nn

from noetherflow._batch import cast
from noetherflow._errors import SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._precision import coarsest
from noetherflow._types import Batch, Loss

# Models of more parameters are evaluated in their type: a copy in float64 would take twice the memory and time.
_LARGE = 20_000_000


class Working(NamedTuple):
    """A floating-point type, a sentence that says why it is not float64, and whether the reason is the model's size."""

    dtype: torch.dtype
    note: str = ""
    by_size: bool = False


def working_dtype(model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype | None = None) -> Working:
    """Choose the floating-point type in which losses and gradients are computed.

    float64 unless the model has more than 20 million parameters, or unless losses or gradients of the batch cannot be
    computed in float64. Then it is the type of the parameters, float32 at least.

    Args:
        model: The model.
        loss: One loss per example, shape (B,).
        batch: The batch that is tried.
        dtype: The type that the user asks for, which is returned without a trial.

    Returns:
        The type, and why it is not float64.

    Raises:
        LossError: If the loss can be computed in neither type: the error in float64.
    """
    if dtype is not None:
        return Working(dtype)
    parameters = [tensor for tensor in model.parameters() if tensor.is_floating_point() or tensor.is_complex()]
    native = torch.promote_types(coarsest(tensor.dtype for tensor in parameters), torch.float32)
    if native == torch.float64 or not parameters:
        return Working(torch.float64)
    count = sum(tensor.numel() for tensor in parameters)
    if count > _LARGE:
        note = f"computed in {native}, because the model has {count:,} parameters; dtype=torch.float64 overrides this"
        return Working(native, note, by_size=True)
    try:
        _evaluate(model, loss, batch, torch.float64)
    except Exception as error:
        try:
            _evaluate(model, loss, batch, native)
        except Exception:
            raise error from None
        # An explanation with advice is made from the error of PyTorch, which says what does not fit.
        first = str(error.__cause__ or error)
        reason = next((line.strip() for line in first.splitlines() if line.strip()), type(error).__name__)
        return Working(native, f"computed in {native}, because the loss cannot be computed in float64: {reason[:200]}")
    return Working(torch.float64)


def announced_dtype(model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype | None = None) -> torch.dtype:
    """As `working_dtype`, with a warning if float64 is not possible, and `SettingsError` for types of 16 bits."""
    if dtype is not None and dtype not in (torch.float64, torch.float32):
        raise SettingsError(
            f"dtype={dtype}: expected torch.float64 or torch.float32, because coarser types do not tell a false "
            "symmetry from rounding. A model in 16 bits is proved in float64; leave dtype out"
        )
    working = working_dtype(model, loss, batch, dtype)
    if working.note and not working.by_size:
        warnings.warn(working.note, stacklevel=3)
    return working.dtype


def _evaluate(model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype) -> None:
    """Compute the losses of a batch and their gradient in a floating-point type."""
    function = ModelFunction(model, loss, dtype)
    device = next(model.parameters()).device
    with own_randomness(device):
        given = cast(batch, dtype, device)
        require_losses(function.losses(function.trained, given), "the first batch")
        function.gradient(function.trained, given)

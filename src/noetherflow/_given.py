"""What callers give: checks of the model, of the batch and of the loss, before any work begins."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import DataLoader, Dataset

from noetherflow._autograd import leaf
from noetherflow._batch import cast
from noetherflow._device import require_float64
from noetherflow._errors import (
    HiddenParameterError,
    LossError,
    NoetherflowError,
    SettingsError,
    TraceError,
)
from noetherflow._model_function import ModelFunction
from noetherflow._other_roads import OtherRoads, Roads
from noetherflow._params import aliases
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._precision import coarsest
from noetherflow._types import Batch, Loss

_NO_GRADIENTS = (
    "the loss can be computed, but not with gradients at other values of the parameters ({}: {}), as with torch.cond. "
    "Nothing can be proved about it: write torch.where, or declare symmetries by hand with nf.Axis"
)
_RAISED = "loss(model, batch) raised {}: {}"


def require_model(model: nn.Module) -> torch.device:
    """Raise `SettingsError` unless the model is a module with parameters that hold numbers.

    Args:
        model: What the user gives.

    Returns:
        The device of the first parameter.

    Raises:
        SettingsError: See above, or if a device has no float64.
    """
    if not aliases(model):
        raise SettingsError(
            f"the model ({type(model).__name__}) has no parameters, so it has no symmetries: expected a model with "
            "parameters. Layers in a Python list are not registered; use nn.ModuleList"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise SettingsError(f"{name!r} of a lazy layer has no shape yet: call the model on a batch first")
        if tensor.is_meta:
            raise SettingsError(
                f"{name!r} is on the meta device and holds no numbers: load the weights, for example with "
                'model.to_empty(device="cpu") and model.load_state_dict(...)'
            )
    require_float64(tensor.device for tensor in model.parameters())
    return next(model.parameters()).device


def require_batch(batch: Batch) -> None:
    """Raise `SettingsError` if a loader, a data set or an iterator is in the place of a batch."""
    kind = type(batch).__name__
    if isinstance(batch, DataLoader):
        raise SettingsError(f"got a {kind}, expected one batch: next(iter(loader))")
    if isinstance(batch, Dataset):
        raise SettingsError(
            f"got a {kind}, expected one batch: next(iter(DataLoader(dataset, batch_size=32))), with DataLoader from "
            "torch.utils.data"
        )
    if isinstance(batch, Iterator):
        raise SettingsError(f"got an iterator ({kind}), expected one batch: next(batches)")


def require_loss(model: nn.Module, loss: Loss, batch: Batch, where: str) -> None:
    """Compute the losses of a batch once, before anything else uses them.

    Args:
        model: The model.
        loss: `loss(model, batch)`, shape (B,).
        batch: The batch.
        where: Subject of error messages about the losses.

    Raises:
        SettingsError: If the model has no parameters or no numbers, or if the batch is a loader.
        NoetherflowError: If the loss raises it.
        LossError: If the loss raises another error, or does not return one number per example.
        NonFiniteError: If a loss is NaN or infinite.
        HiddenParameterError: If the loss reaches a parameter by another road than the attribute of its module.
        TraceError: If the loss has no gradients at other values of the parameters.
    """
    device = require_model(model)
    require_batch(batch)
    try:
        losses, roads = _evaluate(model, loss, batch, device)
    except NoetherflowError:
        raise
    except Exception as error:
        raise LossError(_RAISED.format(type(error).__name__, error)) from error
    require_losses(losses, where)
    _require_attributes(roads)


def require_loader(model: nn.Module, loss: Loss, loader: object, first: Batch) -> None:
    """Compute the losses of the first batch of a loader once, before anything else uses them.

    Args:
        model: The model.
        loss: `loss(model, batch)`, shape (B,).
        loader: What the user gives in the place of a loader.
        first: The first batch.

    Raises:
        SettingsError: If the model has no parameters or no numbers, or if the loader is a batch.
        NoetherflowError: If the loss raises it.
        LossError: If the loss raises another error.
        HiddenParameterError: If the loss reaches a parameter by another road than the attribute of its module.
        TraceError: If the loss has no gradients at other values of the parameters.
    """
    device = require_model(model)
    try:
        roads = _evaluate(model, loss, first, device)[1]
    except NoetherflowError:
        raise
    except Exception as error:
        if isinstance(loader, tuple | list) and _is_batch(model, loss, loader, device):
            raise SettingsError(
                f"got a batch ({type(loader).__name__} of {len(loader)}) in the place of a loader, expected an "
                "iterable of batches: a DataLoader, or a list with this batch, [batch]"
            ) from error
        raise LossError(_RAISED.format(type(error).__name__, error)) from error
    _require_attributes(roads)


def _is_batch(model: nn.Module, loss: Loss, value: object, device: torch.device) -> bool:
    """Whether a loss can be computed of a value."""
    try:
        losses, _ = _evaluate(model, loss, value, device)
    except Exception:
        return False
    return isinstance(losses, Tensor)


def _evaluate(model: nn.Module, loss: Loss, batch: Batch, device: torch.device) -> tuple[Tensor, Roads]:
    """The losses, and what the loss reaches by other roads; or the error of the loss."""
    native = coarsest(tensor.dtype for tensor in model.parameters())
    errors = []
    # The types of the model and of the data; the data in the type of the model; and float64 for both, as in a proof.
    for of_batch, of_model in ((None, None), (native, None), (torch.float64, torch.float64)):
        function = ModelFunction(model, loss, of_model)
        given = cast(batch, of_batch, device)
        leaves = {name: leaf(tensor) for name, tensor in function.params.items()}
        with own_randomness(device, seed=0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.enable_grad(), OtherRoads(model, (batch, given), leaves.values()) as roads:
                    losses = function(leaves, given)
                if roads.has_cond:
                    function.gradient(function.trained, given)
                return losses, roads.of(losses) if isinstance(losses, Tensor) else Roads([], [], [])
            except Exception as error:
                errors.append(error)
            if _is_computable(function, given):
                raise TraceError(_NO_GRADIENTS.format(type(errors[0]).__name__, errors[0])) from errors[0]
    raise errors[0]


def _is_computable(function: ModelFunction, batch: Batch) -> bool:
    """Whether the losses can be computed without gradients."""
    try:
        function.losses(function.params, batch)
    except Exception:
        return False
    return True


def _require_attributes(roads: Roads) -> None:
    """Raise for parameters, and warn of further tensors, that the loss reaches by another road."""
    if roads.parameters:
        first, more = roads.parameters[0], len(roads.parameters) - 1
        raise HiddenParameterError(
            f"the loss reaches parameter {first!r}{f' and {more} more' if more else ''} by another road than the "
            "attribute of its module, such as a Python list, a closure or functools.partial: no other values can be "
            f"put in its place, so nothing can be proved about it. Use the attribute in forward (self.{first}), "
            "and keep parameters in nn.ParameterList and modules in nn.ModuleList"
        )
    if roads.detached:
        warnings.warn(
            f"the memory of {roads.detached} is read by another road than the attribute of the module and without a "
            "gradient, such as by a kept .data: symmetries are proved as if these numbers were constants",
            stacklevel=4,
        )
    if roads.unregistered:
        shapes = [tuple(tensor.shape) for tensor in roads.unregistered[:4]]
        more = len(roads.unregistered) - len(shapes)
        warnings.warn(
            f"tensors of shapes {shapes}{f' and {more} more' if more else ''} that require gradients enter the loss "
            "and are no parameters of the model: their symmetries are not looked for. Register them (nn.Parameter, "
            "nn.ParameterList, nn.ModuleList), or call requires_grad_(False) if they are constants",
            stacklevel=4,
        )

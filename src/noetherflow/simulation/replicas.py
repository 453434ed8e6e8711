"""The parameters of all replicas at the start of a simulation."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._device import require_float64
from noetherflow._errors import FrozenParameterError, ParameterShapeError, SettingsError
from noetherflow._params import require_finite, require_names, snapshot
from noetherflow._types import Params


@final
@dataclass(frozen=True)
class Replicas:
    """Stacked parameters, shape (R, *parameter) by name.

    Args:
        moving: The parameters that train.
        fixed: The parameters that are frozen, equal for all replicas.
    """

    moving: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @property
    def count(self) -> int:
        """The number of replicas."""
        return len(next(iter(self.moving.values())))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.moving.values())).device


def replicate(model: nn.Module, start: Params | None, count: int | None, dtype: torch.dtype) -> Replicas:
    """Stack the parameters of all replicas.

    Args:
        model: The model, whose parameters replace those that `start` lacks.
        start: Parameters of every replica, shape (R, *parameter) by name, or None.
        count: The number of replicas R; None takes it from `start`, or 1.
        dtype: Floating-point type of the stacks.

    Returns:
        The stacks; changing them changes neither the model nor `start`.

    Raises:
        SettingsError: If there is no replica, no parameter that trains, or no float64 on the device.
        FrozenParameterError: If `start` gives a parameter that does not require gradients.
        ParameterNameError: If `start` names parameters that the model does not have.
        ParameterShapeError: If the shapes do not fit.
        NonFiniteError: If a parameter of the model is NaN or infinite.
    """
    require_float64(tensor.device for tensor in model.parameters())
    of_model = snapshot(model, dtype)
    require_finite(of_model, "parameter")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise SettingsError("the model has no parameter that requires gradients: there is nothing to simulate")
    given = snapshot(start, dtype) if start is not None else {}
    require_names(of_model, given, "start")
    if frozen := sorted(set(given) - trained):
        raise FrozenParameterError(
            f"start gives {frozen}, which do not require gradients: all replicas share the model's values. Leave "
            f"{frozen} out of start"
        )
    if count is None:
        count = next((len(stack) if stack.ndim else 0 for stack in given.values()), 1)
    if not isinstance(count, int) or count < 1:
        raise SettingsError(f"replicas must be a whole number, 1 or more, got {count!r}")
    for name, stack in given.items():
        if stack.shape != (count, *of_model[name].shape):
            raise ParameterShapeError(
                f"start[{name!r}] must have shape {(count, *of_model[name].shape)}, one parameter per replica, got "
                f"{tuple(stack.shape)}"
            )
    stacks = {
        name: given.get(name, tensor.expand(count, *tensor.shape).clone()).to(tensor.device)
        for name, tensor in of_model.items()
    }
    return Replicas(
        {name: stack for name, stack in stacks.items() if name in trained},
        {name: stack for name, stack in stacks.items() if name not in trained},
    )

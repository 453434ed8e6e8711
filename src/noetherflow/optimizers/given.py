"""The settings that a public function was given, checked."""

from collections.abc import Mapping

import torch
from torch import nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.optimizers.base import Optimizer
from noetherflow.optimizers.sgd import SGD


def require_settings(settings: object, params: nn.Module | Params | None = None) -> Optimizer:
    """The argument `settings` of a public function, checked, with the names of the parameters.

    Args:
        settings: The argument.
        params: The model, or its tensors by name; None leaves settings by parameter as they are.

    Returns:
        The settings.

    Raises:
        SettingsError: If the argument is neither an `SGD` nor an `AdamW`, or as `named_by` does.
    """
    if isinstance(settings, Optimizer):
        return settings if params is None else settings.named_by(params)
    if isinstance(settings, torch.optim.Optimizer):
        kind = "AdamW" if isinstance(settings, torch.optim.Adam) else "SGD"
        raise SettingsError(
            f"expected nf.SGD or nf.AdamW, the settings of an optimizer, got the optimizer torch.optim."
            f"{type(settings).__name__}, which does not know the batch size: give "
            f"nf.{kind}.from_optimizer(optimizer, batch_size=...)"
        )
    raise SettingsError(
        f"expected nf.SGD or nf.AdamW, the settings of an optimizer, got {type(settings).__name__}: give "
        "nf.SGD(lr=..., batch_size=...)"
    )


def require_sgd(settings: object, params: nn.Module | Params | None, purpose: str) -> SGD:
    """The settings of a limit of SGD.

    Args:
        settings: The argument.
        params: As for `require_settings`.
        purpose: What needs SGD, such as "the Noether flow".

    Returns:
        The settings.

    Raises:
        SettingsError: If the settings are not those of SGD, have lr by parameter, or count the mean gradient.
    """
    settings = require_settings(settings, params)
    if not isinstance(settings, SGD):
        raise SettingsError(f"{purpose} is defined for nf.SGD alone, got nf.{type(settings).__name__}")
    if settings.finite_step:
        raise SettingsError(f"{purpose} is the limit of small steps, in which finite_step=True has no meaning")
    if isinstance(settings.lr, Mapping):
        raise SettingsError(f"{purpose} has a single learning rate, got lr by parameter")
    return settings

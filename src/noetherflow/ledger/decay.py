"""How an optimizer shrinks the parameters by weight decay, read from its parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from noetherflow._errors import SettingsError
from noetherflow.optimizers.by_parameter import number

DecayKind = Literal["decoupled", "coupled"]

_NOTE = "The weight decay of {kind} passes through its preconditioner and cannot be told apart: it is part of broken."
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Muon", "Adafactor") if hasattr(torch.optim, name))
_COUPLED = (
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


def decay_rates(
    optimizers: Sequence[torch.optim.Optimizer], params: Mapping[str, nn.Parameter], kind: DecayKind | None
) -> dict[str, float]:
    r"""By which fraction weight decay shrinks each parameter in a step, $u = -c\,\theta$, at the present settings.

    For decoupled weight decay c = lr * weight_decay. For SGD, whose weight decay is coupled but linear,
    c = lr * weight_decay * (1 - dampening) / (1 - momentum): the decay to which a step leads once the momentum buffer
    has forgotten it.

    Args:
        optimizers: The optimizers.
        params: The parameters by name.
        kind: How weight decay acts, or None to tell by the class of the optimizer.

    Returns:
        The fractions by name; 0 where a parameter is in no group, or where weight decay cannot be told apart.

    Raises:
        SettingsError: If it is not known how an optimizer with weight decay applies it.
    """
    names = {id(parameter): name for name, parameter in params.items()}
    rates = dict.fromkeys(params, 0.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            members = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            if members:
                rates |= dict.fromkeys(members, _rate(optimizer, group, kind) or 0.0)
    return rates


def decay_notes(optimizers: Sequence[torch.optim.Optimizer], kind: DecayKind | None) -> list[str]:
    """A sentence for every optimizer whose weight decay cannot be told apart."""
    names = [
        type(optimizer).__name__
        for optimizer in optimizers
        if any(_rate(optimizer, group, kind) is None for group in optimizer.param_groups)
    ]
    return [_NOTE.format(kind=name) for name in dict.fromkeys(names)]


def _rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], kind: DecayKind | None) -> float | None:
    """The fraction for a parameter group; None if its weight decay cannot be told apart."""
    decay = number(group.get("weight_decay", 0.0))
    if not decay:
        return 0.0
    shrinkage = float(number(group["lr"]) * decay)
    if kind is not None:
        return shrinkage if kind == "decoupled" else None
    if isinstance(optimizer, torch.optim.SGD):
        momentum = number(group["momentum"])
        if not momentum < 1:
            raise SettingsError(f"weight decay under momentum={momentum} never ends: expected momentum below 1")
        return shrinkage * (1 - (number(group["dampening"]) if momentum else 0.0)) / (1 - momentum)
    if isinstance(optimizer, _DECOUPLED) or (isinstance(optimizer, _COUPLED) and group.get("decoupled_weight_decay")):
        return shrinkage
    if isinstance(optimizer, _COUPLED):
        return None
    raise SettingsError(
        f'it is not known how {type(optimizer).__name__} applies weight_decay={decay}: give decay="decoupled" if it '
        'multiplies parameters by 1 - lr * weight_decay, and decay="coupled" if it adds weight_decay * theta to the '
        "gradient"
    )

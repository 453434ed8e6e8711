"""The metric in which an adaptive optimizer steps: the diagonal P of its step -lr P g."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.noise.sharded import gathered
from noetherflow.optimizers.by_parameter import number

# Where optimizers of PyTorch keep second moments of gradients, and whether these are averages that start at zero.
_SECOND_MOMENTS = (("max_exp_avg_sq", True), ("exp_avg_sq", True), ("square_avg", False), ("sum", False))
_ADAPTIVE = (
    torch.optim.Adam,  # with AdamW
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)


def has_metric(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether an optimizer divides every entry by the root of a second moment that it keeps."""
    return isinstance(optimizer, _ADAPTIVE)


def metric_of(optimizer: torch.optim.Optimizer, params: Params) -> dict[str, Tensor] | None:
    r"""The metric $p_i = \eta_i / (\eta \sqrt{\hat v_i} + \eta\epsilon)$ at the next step, up to a factor.

    Args:
        optimizer: An optimizer that `has_metric`.
        params: The measured parameters.

    Returns:
        Weights by name, with $\eta$ the largest learning rate of a group, and 0 for entries that never had a gradient;
        or None before the first step of all.
    """
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    largest = max(float(number(group["lr"])) for group in optimizer.param_groups)
    metric, stepped = {}, False
    for name, parameter in params.items():
        group = group_of.get(id(parameter))
        inverse = None if group is None else _inverse_root(optimizer.state.get(parameter, {}), group)
        if group is None or inverse is None:
            # This optimizer has not moved it yet, or never does.
            metric[name] = gathered(torch.zeros_like(parameter))
            continue
        stepped = True
        # During a warmup from 0 all rates are 0, and nothing tells the groups apart.
        share = float(number(group["lr"])) / largest if largest > 0 else 1.0
        metric[name] = gathered(inverse.mul_(share))
    return metric if stepped else None


def _inverse_root(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """The inverse of the denominator of the step of a parameter; None before the first step."""
    key, decays = next((pair for pair in _SECOND_MOMENTS if pair[0] in state), ("", False))
    steps = float(number(state["step"])) if "step" in state else 1.0
    if not key or not steps:
        return None
    correction = -math.expm1(steps * math.log(number(group["betas"][1]))) if decays and group["betas"][1] else 1.0
    square = state[key].detach()
    # An entry that never had a gradient, as in the row of a token that did not occur, gets 0: its second moment is not
    # known, and epsilon as denominator would give its first gradient more weight than everything else together.
    known = square > 0
    if group.get("centered"):
        average = state["grad_avg"].detach()
        square = square.addcmul(average, average, value=-1).clamp_min_(0)
    return (square / correction).sqrt_().add_(float(group["eps"])).reciprocal_().mul_(known)

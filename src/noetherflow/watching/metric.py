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
        Weights by name, with $\eta$ the largest learning rate of a group, and 0 for a parameter that has not taken a
        step; or None before the first step of all.
    """
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    largest = max(float(number(group["lr"])) for group in optimizer.param_groups)
    metric, stepped = {}, False
    for name, parameter in params.items():
        group = group_of.get(id(parameter))
        root = None if group is None else _root(optimizer.state.get(parameter, {}), group)
        if group is None or root is None:
            # This optimizer has not moved it yet, or never does.
            metric[name] = gathered(torch.zeros_like(parameter))
            continue
        stepped = True
        # During a warmup from 0 all rates are 0, and nothing tells the groups apart.
        share = float(number(group["lr"])) / largest if largest > 0 else 1.0
        metric[name] = gathered(share / root)
    return metric if stepped else None


def _root(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """The denominator of the step of a parameter; None before the first step."""
    key, decays = next((pair for pair in _SECOND_MOMENTS if pair[0] in state), ("", False))
    steps = float(number(state["step"])) if "step" in state else 1.0
    if not key or not steps:
        return None
    correction = -math.expm1(steps * math.log(number(group["betas"][1]))) if decays and group["betas"][1] else 1.0
    return (state[key].detach() / correction).sqrt_().add_(float(group["eps"]))

r"""Norms of scale-invariant weights under weight decay: where they come to rest, and when.

A symmetry with a plus side alone scales weights in front of a normalisation. Gradients are orthogonal to these weights
and fall as $1/|\theta|$. For SGD a step of mean square $\mathrm{lr}^2 s / |\theta|^2$ gives, per step,
$d|\theta|^4 = 2\,\mathrm{lr}^2 s - 4\,\mathrm{lr}\,w\,|\theta|^4$ with PyTorch's weight decay w; for AdamW, whose
step has the mean square $\eta^2 C$ for C entries, $d|\theta|^2 = \eta^2 C - 2\,\eta\lambda\,|\theta|^2$.
"""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow._params import snapshot
from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium, Status
from noetherflow.forecasting.metric import shrinkage
from noetherflow.optimizers import SGD, AdamW, Optimizer
from noetherflow.symmetry import Action, AxisSymmetry

# A norm counts as come to rest within this share of its equilibrium.
NEAR = 0.05


@final
class Norm(NamedTuple):
    """The norm of scale-invariant weights: by row, or a number for all rows.

    Args:
        now: |theta| now.
        then: |theta| at the equilibrium; infinite where nothing keeps the norm from growing.
        error: Standard error of `then`.
        lr_now: The effective learning rate: for SGD lr / |theta|^2, for AdamW lr sqrt(C) / |theta|, which is the angle
            of a step.
        lr_then: The effective learning rate at the equilibrium.
        steps: The number of steps until the norm is within 5 % of the equilibrium.
    """

    now: Tensor
    then: Tensor
    error: Tensor
    lr_now: Tensor
    lr_then: Tensor
    steps: Tensor


def norms_of(equilibrium: Equilibrium, settings: Optimizer, params: Params) -> dict[str, Norm]:
    """The norms of all symmetries with a plus side alone, by name."""
    theta, there = (snapshot(each, device=torch.device("cpu")) for each in (params, equilibrium.params))
    result = {}
    for name, symmetry in equilibrium.symmetries.items():
        if not isinstance(symmetry, AxisSymmetry) or symmetry.minus or symmetry.action is not Action.SCALES_ENTRIES:
            continue
        outcome = equilibrium.outcomes[name]
        x, now = equilibrium.coordinates[name].double(), symmetry.grams(theta).plus.double().sqrt()
        held = torch.zeros(x.shape, dtype=torch.bool)
        if outcome.directions:
            held.view(-1)[list(outcome.directions)] = True
        if outcome.status in (Status.NON_FINITE, Status.NOT_CONVERGED, Status.NO_CHARGE, Status.DEGENERATE):
            held.fill_(True)
        rate, power = _rate(settings, symmetry.names)
        entries = symmetry.grams({n: torch.ones_like(theta[n]) for n in symmetry.names}).plus.double()
        # Not now e^x: other symmetries may act on the same tensor.
        then = torch.where(held, math.inf, symmetry.grams(there).plus.double().sqrt())
        lr_now, lr_then = (_effective(settings, symmetry.names, size, entries) for size in (now, then))
        steps = torch.where(held | (rate == 0), math.inf, _time((now / then) ** power, power) / max(rate, 1e-300))
        result[name] = Norm(now, then, then * equilibrium.standard_error[name], lr_now, lr_then, steps)
    return result


def _rate(settings: Optimizer, names: tuple[str, ...]) -> tuple[float, int]:
    """The rate per step at which a power of the norm relaxes, for the slowest parameter, and that power."""
    power = 4 if isinstance(settings, SGD) else 2
    return power / 2 * min(shrinkage(settings, name) for name in names), power


def _effective(settings: Optimizer, names: tuple[str, ...], size: Tensor, entries: Tensor) -> Tensor:
    if isinstance(settings, SGD):
        return max(settings.step_of(name) for name in names) / size.square()
    assert isinstance(settings, AdamW)
    return max(settings.lr_of(name) for name in names) * entries.sqrt() / size


def _time(start: Tensor, power: int) -> Tensor:
    """The time until a power of the norm, 1 at the equilibrium, has relaxed from a start to within `NEAR`."""
    allowed = torch.where(start > 1, (1 + NEAR) ** power - 1, 1 - (1 - NEAR) ** power)
    return ((start - 1).abs() / allowed).clamp_min(1).log()

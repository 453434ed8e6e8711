r"""Whether the loss still falls along the mean gradient, from moments that an analysis has anyway.

Without noise, a step of SGD lowers the loss by
$\sum_p \eta_p\,(G_p\cdot G_p + 2\gamma_p\,G_p\cdot\theta_p)$ to first order, with the mean gradient G. The mean
gradient of n examples has the excess $\mathrm{Tr}\,\Sigma/n$ in its square, which is taken out. Where the loss does not
fall, the variance of that number is $2\,\mathrm{Tr}\,\Sigma^2/n^2 + c^T\Sigma\,c/n$ with the weight decay
$c = 2\gamma\theta$. $\mathrm{Tr}\,\Sigma$ bounds both the root of $\mathrm{Tr}\,\Sigma^2$ and the largest eigenvalue of
$\Sigma$, so that the error is a bound.
"""

import math
from typing import NamedTuple, final

import torch

from noetherflow._types import Params
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import SGD, Optimizer

# What distances and relaxation times stand on.
WHILE_IT_STAYS = (
    "Distances and steps are those of the present function of the network. Where training still changes the function, "
    "it changes the distances too"
)
# A rate would say little: the fall is to first order in a step, and slows down.
STILL_FALLS = (
    "The loss still falls along the mean gradient, by more than two standard errors: expect distances to change with "
    "the function"
)


@final
class Fall(NamedTuple):
    """The fall of the loss per step along the mean gradient, and a bound of its standard error."""

    value: float
    error: float

    @property
    def certain(self) -> bool:
        """Whether the loss falls by more than two errors."""
        return self.value > 2 * self.error


def fall_of(noise: NoiseMoments, settings: Optimizer, params: Params) -> Fall | None:
    """The fall of the loss along the mean gradient.

    Args:
        noise: The moments of the gradients of single examples.
        settings: The settings of the optimizer.
        params: The parameters at which the noise was measured.

    Returns:
        The fall; None where it is not known: for an optimizer other than SGD, whose steps need second moments of every
        entry, and for noise between batches, which has no mean gradient.
    """
    means = {name: mean for name, mean in noise.mean.items() if settings.trains(name)}
    if not isinstance(settings, SGD) or noise.unmeasured or noise.count < 2 or not means:
        return None
    if any(bool(torch.isnan(mean).any()) for mean in means.values()):
        return None
    of_mean = float(noise.total_scatter) / (noise.count - 1) / noise.count
    value, pulled = 0.0, 0.0
    for name, mean in means.items():
        decayed = 2 * settings.gamma_of(name) * params[name].double()
        value += settings.step_of(name) * float((mean * (mean + decayed)).sum())
        pulled += (settings.step_of(name) * float(decayed.norm())) ** 2
    largest = max(settings.step_of(name) for name in means)
    return Fall(value - largest * of_mean, math.sqrt(2 * (largest * of_mean) ** 2 + pulled * of_mean))


def remarks(noise: NoiseMoments, settings: Optimizer, params: Params) -> tuple[str, ...]:
    """What distances stand on, and that the loss still falls where that is certain."""
    fall = fall_of(noise, settings, params)
    return (WHILE_IT_STAYS, STILL_FALLS) if fall is not None and fall.certain else (WHILE_IT_STAYS,)

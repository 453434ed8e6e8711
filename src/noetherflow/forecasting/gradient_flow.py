r"""Learning without noise: the gradient flow of the mean loss for the time of many steps, from few gradients.

Gradient descent for n steps of a small learning rate is the flow $\dot\theta = -m\,\nabla F$ for the time
$\mathrm{lr}\,n$, with the multipliers m of the optimizer. A Runge-Kutta-Legendre step of s gradients is stable for a
time up to $(s^2 + s)/\lambda$, where $\lambda$ is the largest curvature in the metric, and damps all fast directions:
the steps of plain descent for that time would be s times as many.

Source: Meyer, Balsara and Aslam (2012), the scheme RKL1.
"""

import math
from collections.abc import Callable

from torch import Tensor

from noetherflow._types import Params

# Steps into which the time is divided: what is left of a displacement is right within 0.05 of the displacement.
STEPS = 4
# Gradients of a step, at most: learning is followed for as long as these allow.
STAGES = 28


def stages(time: float, curvature: float) -> int:
    """The number of gradients of a step for which a flow for a time is stable.

    Args:
        time: The time.
        curvature: The largest curvature in the metric.

    Returns:
        The gradients of each of the steps into which the time is divided, 2 or more.
    """
    return max(2, math.ceil((math.sqrt(1 + 4 * time * curvature / STEPS) - 1) / 2))


def reach(curvature: float) -> float:
    """The longest time for which a flow is stable with `STAGES` gradients in each step; infinite without curvature."""
    return STEPS * (STAGES**2 + STAGES) / curvature if curvature > 0 else math.inf


def flow(force: Callable[[Params], Params], start: Params, time: float, stages: int) -> dict[str, Tensor]:
    """The point at the end of a flow.

    Args:
        force: m times the gradient, by parameter.
        start: The start.
        time: The time.
        stages: The gradients of each step.

    Returns:
        The parameters.
    """
    point = dict(start)
    scale = 2 / (stages**2 + stages) * time / STEPS
    for _ in range(STEPS):
        before, here = point, _ahead(point, force(point), -scale)
        for j in range(2, stages + 1):
            # The recursion of Legendre polynomials: j P_j = (2j - 1) z P_(j-1) - (j - 1) P_(j-2).
            more, less = (2 * j - 1) / j, (j - 1) / j
            slope = force(here)
            there = {n: more * (t - scale * slope[n]) - less * before[n] for n, t in here.items()}
            before, here = here, there
        point = here
    return point


def _ahead(point: Params, slope: Params, length: float) -> dict[str, Tensor]:
    return {name: tensor + length * slope[name] for name, tensor in point.items()}

"""How far the equilibrium depends on the sample of data."""

from dataclasses import replace

import torch
from torch import Tensor

from noetherflow._forces import forces, has_charge
from noetherflow._minibatch import minibatches
from noetherflow.equilibrium.descent import Course
from noetherflow.noise.measurement import Measurement
from noetherflow.optimizers import Optimizer


def standard_errors(
    measurement: Measurement, course: Course, settings: Optimizer, *, progress: bool
) -> dict[str, Tensor]:
    r"""The standard errors of the coordinates, from the spread between groups of examples.

    With $c_k$ the drift of group k at the equilibrium of all examples, the equilibrium of the group is displaced by
    $x_k = H^{-1} c_k$ to first order. H is the Hessian of the potential: that of every block, corrected by what the
    last points of the descent say of the effect of one block on another. Over K groups of shares $w_k$ the variance of
    the mean displacement is $\frac{K}{K - 1} \sum_k w_k^2 (x_k - \bar x)^2$.

    Args:
        measurement: How the noise is measured.
        course: The descent to the equilibrium.
        settings: The settings of the optimizer.
        progress: Show a progress bar on a terminal.

    Returns:
        By symmetry, of the shape of the coordinates; NaN where there are too few examples.

    Source: the delta method; the groups are those of a random-groups estimator, Wolter (2007).
    """
    end = course.end
    unknown = {name: torch.full_like(x, torch.nan) for name, x in end.coordinates.items()}
    if not unknown:
        return {}
    counts: list[int] = []
    displacements: list[dict[str, Tensor]] = []
    charged = [name for name, symmetry in measurement.symmetries.items() if has_charge(symmetry, settings)]
    for moments in measurement.by_group(end.params, progress=progress):
        # The group is centred by its mean, which takes a degree of freedom: a divisor less by 1.
        gradients = minibatches(replace(moments, count=moments.count - 1), settings)
        drifts = {name: torch.zeros_like(x) for name, x in end.coordinates.items()}
        for name in charged:
            push, pull = forces(name, end.params, gradients)
            drifts[name] = push - pull
        displacements.append(course.acceleration.respond(end.blocks.respond(drifts)))
        counts.append(moments.count)
        del moments, gradients  # they have the size of the model
    if len(counts) < 2:
        return unknown
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    errors = dict(unknown)
    for name in charged:
        x = torch.stack([displacement[name] for displacement in displacements])
        weights = shares.to(x).reshape(-1, *(1,) * (x.ndim - 1))
        deviations = x - (weights * x).sum(0)
        errors[name] = (len(counts) / (len(counts) - 1) * (weights * deviations).square().sum(0)).sqrt()
    return errors

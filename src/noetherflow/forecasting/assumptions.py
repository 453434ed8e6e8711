"""What the numbers of a forecast stand on, in sentences."""

import math

from noetherflow.forecasting.learning import Learning
from noetherflow.forecasting.metric import reference_lr
from noetherflow.forecasting.sides import Sides
from noetherflow.forecasting.traces import scales_entries
from noetherflow.optimizers import SGD, AdamW, Optimizer

# Share of the largest stable step from which fluctuations of the function count.
_SMALL = 0.1


def assumptions_of(settings: Optimizer, sides: Sides, learning: Learning) -> tuple[str, ...]:
    """The assumptions of a forecast.

    Args:
        settings: The settings of the optimizer.
        sides: The numbers.
        learning: How far the model still learns.

    Returns:
        A sentence for each.
    """
    result = [
        "The function of the network and the noise of its gradients on the orbit stay as they are now: only the "
        f"position on the orbit changes. {_learnt(learning)}",
        "H is the Hessian of the mean loss of these examples, without weight decay",
        *(_traces(sides) if sides.traces is not None else ()),
        f"{_way(sides)}, at a constant learning rate; the error of the half time is that of the traces alone",
        "The stable step with noise is that of a step along the sharpest direction; the critical sharpness follows the "
        "mean gradient, without weight decay",
    ]
    result += _turns(sides)
    share = _share_of_limit(settings, sides)
    if share > _SMALL:
        result.append(
            f"The learning rate is {share:.0%} of the largest stable step with noise, here or at the equilibrium: the "
            "function fluctuates, which adds noise and sharpness. The motion is faster than forecast, and "
            "the sharpness ends higher"
        )
    if isinstance(settings, SGD) and settings.momentum:
        result.append("With momentum, the stable step with noise interpolates between the limits of no noise and noise")
    if isinstance(settings, AdamW):
        result.append(
            f"The metric of AdamW is from v as {_source(sides)}, and is held during a step; its averages lag behind by "
            "about 1 / (1 - beta2) steps, so that times are too short"
        )
    return tuple(result)


def _traces(sides: Sides) -> tuple[str, str]:
    """Where the traces come from, now and at the equilibrium."""
    return (
        (
            "Traces are exact: the network is piecewise linear in every single parameter, which was compared with "
            "second derivatives of entries of each block"
            if sides.exact
            else f"Traces are from random vectors, because {sides.why}"
        ),
        (
            "Traces at the equilibrium are carried along the symmetries, which is exact"
            if scales_entries(sides.equilibrium)
            else "Traces at the equilibrium are measured at the moved parameters; the error of the equilibrium is not "
            "in their errors"
        ),
    )


def _turns(sides: Sides) -> list[str]:
    """A sentence if Tr H passes the value that it has at the equilibrium by more than two errors."""
    if sides.in_time is None:
        return []
    steps, farthest = sides.in_time.turn()
    now, then, _ = sides.trace()
    error = 0.0 if math.isnan(then.total) else then.total
    if not abs(farthest - now.value) - abs(then.value - now.value) > 2 * error:
        return []
    return [
        f"Tr H passes its end: after {steps:,.0f} steps it is {farthest:.4g}, and then comes back to {then.value:.4g}. "
        "The half time is that of the first half of the change, and depends on where the end is"
    ]


def _way(sides: Sides) -> str:
    """How the coordinates get to the equilibrium."""
    joint = "The way to the equilibrium is that of the drift along the orbit, with the noise of now carried exactly"
    apart = () if sides.in_time is None else sides.in_time.path.apart
    if not apart:
        return joint
    named = ", ".join(apart[:3]) + (f" and {len(apart) - 3} more" if apart[3:] else "")
    return f"Each coordinate of {named} relaxes as if all others were at the equilibrium"


def _source(sides: Sides) -> str:
    """Where v of AdamW comes from."""
    if sides.measured_moments:
        return "the gradients of these batches give it, scaled to the batch size"
    return "the optimizer keeps it, carried along the orbit to the equilibrium"


def _learnt(learning: Learning) -> str:
    """What is known of the first assumption."""
    said = f"{learning}"[0].upper() + f"{learning}"[1:]
    if not learning.trace.known:
        return said
    if not learning.learns:
        return f"{said}: neither the fall of the loss nor that change is known to be beyond two errors"
    return f"{said}: the model still learns" + (
        ", so that this assumption does not hold" if learning.dominates else ", and that comes on top of the forecast"
    )


def _share_of_limit(settings: Optimizer, sides: Sides) -> float:
    """The learning rate over the largest stable step with noise, the larger of both sides; 0 where it is not known."""
    lr = reference_lr(settings, sides.mean_loss.names)
    limits = (sides.noisy_step.now, sides.noisy_step.then)
    return max((lr / limit.value for limit in limits if limit.known), default=0.0)

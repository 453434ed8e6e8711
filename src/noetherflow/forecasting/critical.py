r"""The critical sharpness $2 / \mathrm{lr}_c$ along the update of an optimizer, from forward passes alone.

With the update d, $\mathrm{lr}_c$ is the largest step that does not raise the loss, $L(\theta - t\,d) \le L(\theta)$.
With the slope $a = \nabla L\cdot d$ at the start, the curvature takes back the share

$$q(t) = 1 + \frac{L(\theta - t\,d) - L(\theta)}{a\,t}$$

of the descent, and $q(\mathrm{lr}_c) = 1$. For a quadratic loss q is proportional to t, and for any smooth loss log q
is almost a straight line over log t: interpolation in logarithms needs few evaluations, from a start that is wrong by
orders of magnitude.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, final

from noetherflow._types import Params
from noetherflow.forecasting.estimate import Estimate, unknown
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import Metric

# Forward passes over the data, at most. The loss and the gradient at the start are known.
MAX_PASSES = 8
# The search ends if the interpolated zero lies within this distance of the last trial, in log t.
_CLOSE = 0.02
# Exponents of t that are believed outside a bracket; from a single trial far above the zero, the second of the pair.
_EXPONENTS, _STEEP = (0.7, 6.0), 2.0
# A trial lies at most this far from the last, in log t.
_FARTHEST = math.log(1e4)
# Distance of the next trial from one that says nothing, and the least distance outside a bracket, in log t.
_BLIND, _LEAST = math.log(30), math.log(1.5)
# log q from which a single trial is far above the zero.
_FAR = math.log(10)


@final
class _Trial(NamedTuple):
    """log t and log q; q is infinite where the loss overflows, and -inf where curvature adds to the descent."""

    step: float
    share: float


def critical_sharpness(mean_loss: MeanLoss, params: Params, metric: Metric, start: float) -> Estimate:
    """The critical sharpness.

    Args:
        mean_loss: The mean loss.
        params: The parameters.
        metric: The update of the optimizer, with the loss and the gradient at the parameters.
        start: The first step that is tried, such as the learning rate.

    Returns:
        The sharpness; `error` is the distance of the last trial from the interpolated zero, in units of the sharpness.
    """
    direction = metric.direction
    descent = sum(float((metric.gradient[name].double() * part.double()).sum()) for name, part in direction.items())
    if not descent > 0:
        return unknown("the gradient is zero: there is no update to follow")

    def share(log_step: float) -> float:
        step = math.exp(log_step)
        value = mean_loss.value({**params, **{n: params[n] - step * part for n, part in direction.items()}})
        if not math.isfinite(value):
            return math.inf
        q = 1 + (value - metric.loss) / (descent * step)
        return math.log(q) if q > 0 else -math.inf

    found_step, distance = _zero(share, math.log(start))
    if distance > math.log(2):
        return unknown(f"no step at which the loss is as high as now within {MAX_PASSES} forward passes")
    sharpness = 2 / math.exp(found_step)
    return Estimate(sharpness, sharpness * distance)


def _zero(share: Callable[[float], float], start: float) -> tuple[float, float]:
    """The zero of log q as a function of log t.

    Args:
        share: log q at log t.
        start: log t of the first trial.

    Returns:
        The zero, and its distance from the last trial.
    """
    trials: list[_Trial] = []
    step = start
    distance = math.inf
    for _ in range(MAX_PASSES):
        trials.append(_Trial(step, share(step)))
        following = _next(trials)
        distance = abs(following - step)
        if distance <= _CLOSE and abs(trials[-1].share) <= _CLOSE * _EXPONENTS[1]:
            return following, distance
        step = following
    # The last interpolation was not tried; a bracket that is narrower says more.
    low, high = _bracket(trials)
    width = high.step - low.step if low and high else math.inf
    return step, min(distance, width)


def _next(trials: list[_Trial]) -> float:
    """Log t of the next trial."""
    low, high = _bracket(trials)
    if low and high:
        return _inside(low, high, trials)
    # Outside a bracket the search goes on from the outermost trial.
    edge = low or high
    assert edge is not None
    sign = math.copysign(1.0, -edge.share)
    if not math.isfinite(edge.share):
        return edge.step + sign * _BLIND
    exponent = _STEEP if edge.share > _FAR else 1.0
    others = [t for t in trials if t.step != edge.step and math.isfinite(t.share)]
    if others:
        second = min(others, key=lambda t: abs(t.step - edge.step))
        exponent = (edge.share - second.share) / (edge.step - second.step)
        exponent = min(max(exponent, _EXPONENTS[0]), _EXPONENTS[1])
    # A little more than the interpolated distance closes the bracket.
    distance = abs(edge.share) / exponent + _CLOSE / 2
    if others and distance > _CLOSE:
        distance = max(distance, _LEAST)
    return edge.step + sign * min(distance, _FARTHEST)


def _bracket(trials: list[_Trial]) -> tuple[_Trial | None, _Trial | None]:
    """The trials on both sides of the first zero: the smallest step that is too large, and the largest below it."""
    high = min((t for t in trials if t.share >= 0), default=None)
    low = max((t for t in trials if t.share < 0 and (high is None or t.step < high.step)), default=None)
    return low, high


def _inside(low: _Trial, high: _Trial, trials: list[_Trial]) -> float:
    """A step inside a bracket, as Chandrupatla (1997) chooses it.

    The zero of a parabola through three trials where the parabola is monotone between them, else that of a straight
    line, with the Illinois rule; the middle where the loss overflows.

    Args:
        low: The lower end.
        high: The upper end.
        trials: All trials in order; the last is an end of the bracket.

    Returns:
        log t.
    """
    last = trials[-1]
    other = high if last is low else low
    middle = (low.step + high.step) / 2
    if not all(math.isfinite(trial.share) for trial in (low, high)):
        return middle
    line = low.step - low.share * (high.step - low.step) / (high.share - low.share)
    older = [t for t in trials[:-1] if t is not other and math.isfinite(t.share)]
    if not older:
        return line
    third = older[-1]
    if len({last.share, other.share, third.share}) == 3 and third.step != other.step:
        place = (last.step - other.step) / (third.step - other.step)
        level = (last.share - other.share) / (third.share - other.share)
        if level**2 < place and (1 - level) ** 2 < 1 - place:
            return _parabola(last, other, third)
    if (third.share < 0) != (last.share < 0):
        return line
    # Two trials on a side in turn: the other end counts half, so that the next trial passes the zero.
    low, high = (t._replace(share=t.share / 2) if t is other else t for t in (low, high))
    return low.step - low.share * (high.step - low.step) / (high.share - low.share)


def _parabola(*trials: _Trial) -> float:
    """The zero of the parabola through log t as a function of log q."""
    total = 0.0
    for trial in trials:
        others = [other for other in trials if other is not trial]
        total += trial.step * math.prod(other.share / (other.share - trial.share) for other in others)
    return total

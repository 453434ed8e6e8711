r"""Whether a learning rate is stable now and at the equilibrium, and the warmup that leads from here to there.

A warmup that moves along the orbit stays below the largest stable step $\ell(x)$, which is measured at points of the
way. Its learning rate is $r = c\,\ell$ with a share c that is 1/2 now, and 1/2 or a little above
$\mathrm{lr}/\ell^*$ at the equilibrium; in between $\log r$ is linear in $\log\ell$. The time between points is that of
`motion` at the learning rates in between. A scale-invariant weight without weight decay has $\ell\propto|\theta|^2$
and $d|\theta|^4/dn = 2 r^2 s$ under SGD, so that its warmup is exponential: $r \propto \exp(n\,s\,r^2/|\theta|^4)$.

What can be told without the equilibrium: a learning rate that is stable now needs no warmup, whatever becomes of it
later, because a smaller learning rate at the start does not change what is stable later. A learning rate that is
unstable now needs a smaller one at the start.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, final

from torch import Tensor

from noetherflow.forecasting.estimate import NEVER_UNSTABLE, Estimate
from noetherflow.forecasting.motion import Motion

# Share of the largest stable step that a warmup takes, if the learning rate leaves that room at the equilibrium; and
# the room that is left above the learning rate if not.
_SAFE, _ROOM = 0.5, 1.1
# Distance between two points of the way at which the stable step is measured, as a change of the fastest coordinate,
# and the points of the schedule from one to the next.
_STRIDE, _PARTS = 0.75, 4
# Points at which the stable step is measured, at most.
_MOST = 24
# Factor of the learning rate between two points of the schedule, and the points that are printed.
_APART, _SHOWN = 1.25, 12


@final
class Need(Enum):
    """Whether a warmup is needed; the value is the sentence to read."""

    NONE = "no warmup is needed: the learning rate is stable now and at the equilibrium"
    NONE_NOW = "no warmup is needed: the learning rate is stable now; whether it stays stable cannot be told"
    WARMUP = "a warmup is needed: the learning rate is unstable now and stable at the equilibrium"
    BEGIN = (
        "a warmup is needed: the learning rate is unstable now; whether it is stable later cannot be told. Begin with "
        "the schedule, and ask for another forecast at its end"
    )
    TOO_LARGE = "no warmup helps: the learning rate is unstable now and at the equilibrium"
    SHARPENS = "the learning rate is stable now and becomes unstable on the way to the equilibrium: lower it"
    UNKNOWN = "cannot be told"


@final
class Warmup(NamedTuple):
    """The verdict on the learning rate, and the schedule.

    Args:
        need: The kind of verdict.
        schedule: Steps and learning rates, linear between them; a single point is a constant learning rate; empty
            without a warmup.
        why: What the verdict stands on, or why there is none.
    """

    need: Need
    schedule: tuple[tuple[int, float], ...]
    why: str

    @property
    def steps(self) -> int:
        """The length of the warmup; 0 without a warmup."""
        return self.schedule[-1][0] if self.schedule else 0

    def lr_at(self, step: int) -> float:
        """The learning rate of the schedule at a step, that of its last point after its end.

        Args:
            step: The number of steps that were made.

        Returns:
            The learning rate; NaN without a schedule.
        """
        if not self.schedule:
            return math.nan
        before = max((point for point in self.schedule if point[0] <= step), default=self.schedule[0])
        after = next((point for point in self.schedule if point[0] > step), before)
        share = (step - before[0]) / (after[0] - before[0]) if after != before else 0.0
        return before[1] + share * (after[1] - before[1])

    def __str__(self) -> str:
        if not self.schedule:
            return f"{self.need.value} ({self.why})"
        every = math.ceil(len(self.schedule) / _SHOWN)
        listed = "; ".join(f"step {step:,}: {lr:.3g}" for step, lr in [*self.schedule[:-1:every], self.schedule[-1]])
        which = "" if every == 1 else f" (every {every} points of {len(self.schedule)})"
        return f"{self.need.value} ({self.why}). Learning rates, linear in between{which}: {listed}"


@final
@dataclass(frozen=True)
class Way:
    """The way to the equilibrium.

    Args:
        motion: How fast coordinates move.
        stable: The largest stable step at given coordinates.
    """

    motion: Motion
    stable: Callable[[Mapping[str, Tensor]], Estimate]


def warmup_of(lr: float, now: Estimate, then: Estimate, way: Way | None, doubt: str = "") -> Warmup:
    """Whether a warmup is needed, and its schedule.

    Args:
        lr: The learning rate that is to be used.
        now: The largest stable step now.
        then: The largest stable step at the equilibrium.
        way: The way to the equilibrium; None if it is not known.
        doubt: Why the model may not get to this equilibrium; empty if there is no reason.

    Returns:
        The warmup.
    """
    first, second = _compare(lr, now), None if doubt else _compare(lr, then)
    why = f"learning rate {lr:.3g}; largest stable step {now} now, {then} at the equilibrium"
    near = "the learning rate is within two errors of the largest stable step"
    if first is None:
        return Warmup(Need.UNKNOWN, (), f"{now.why or near}; {why}")
    if second is None:
        why = f"{doubt or then.why or near + ' at the equilibrium'}; {why}"
    if first:
        return Warmup({True: Need.NONE, None: Need.NONE_NOW, False: Need.SHARPENS}[second], (), why)
    if second is False:
        return Warmup(Need.TOO_LARGE, (), why)
    if second is None:
        far = min(lr, _SAFE * then.value) if then.known else 0.0
        points = [] if way is None or far <= _SAFE * now.value else _climb(lr, far, now.value, then.value, way)
        return Warmup(Need.BEGIN, _thinned(points or [(0.0, _SAFE * now.value)]), why)
    end = math.inf if NEVER_UNSTABLE in then.why else then.value
    points = _climb(lr, lr, now.value, end, way) if way else []
    if not points or points[-1][1] < lr:
        return Warmup(Need.WARMUP, (), f"its length cannot be told, because the way in time is not known; {why}")
    return Warmup(Need.WARMUP, _thinned(points), why)


def _compare(lr: float, limit: Estimate) -> bool | None:
    """Whether a learning rate is below a limit by two errors (True), above (False), or neither (None).

    The inverse of a limit is a curvature, which is what was measured with an error: both are compared as inverses.

    Args:
        lr: The learning rate.
        limit: The limit.

    Returns:
        The verdict.
    """
    if not limit.known:
        # Where no direction curves up, every step is stable.
        return True if NEVER_UNSTABLE in limit.why else None
    curvature = limit.over(1.0)
    room = 0.0 if math.isnan(curvature.total) else 2 * curvature.total
    return True if 1 / lr >= curvature.value + room else False if 1 / lr < curvature.value - room else None


def _climb(lr: float, goal: float, now: float, then: float, way: Way) -> list[tuple[float, float]]:
    """The climb to a learning rate.

    Args:
        lr: The learning rate for which the motion is.
        goal: The learning rate at which the climb ends, at most `lr`.
        now: The largest stable step now.
        then: The largest stable step at the equilibrium.
        way: The way to the equilibrium.

    Returns:
        Steps and learning rates; the last is below the goal if the way ends before.
    """
    left, limit, steps = way.motion.start, now, 0.0
    points = [(0.0, min(goal, _rate(goal, limit, now, then)))]
    for _ in range(_MOST):
        first = points[-1][1]
        if first >= goal:
            break
        stage = way.motion.walk(left, first / lr, _STRIDE)
        if stage is None:
            break
        ahead = way.stable(way.motion.coordinates(stage.left))
        if not ahead.known and NEVER_UNSTABLE not in ahead.why:
            break
        limit = ahead.value if ahead.known else math.inf
        last = _rate(goal, limit, now, then)
        distance = max(float((left[name] - end).abs().max()) for name, end in stage.left.items() if end.numel())
        for part in range(_PARTS):
            middle, rate = (min(goal, first * (last / first) ** ((part + more) / _PARTS)) for more in (0.5, 1.0))
            walked = None if points[-1][1] >= goal else way.motion.walk(left, middle / lr, distance / _PARTS)
            if walked is None:
                break
            left, steps = walked.left, steps + walked.steps
            points.append((steps, rate))
    return points


def _rate(goal: float, limit: float, now: float, then: float) -> float:
    """The learning rate of a schedule to a goal where the largest stable step is `limit`."""
    share = _SAFE
    if goal * _ROOM > _SAFE * then and then > now:
        place = min(max(math.log(limit / now) / math.log(then / now), 0.0), 1.0)
        share *= (min(1.0, _ROOM * goal / then) / _SAFE) ** place
    return share * limit


def _thinned(points: list[tuple[float, float]]) -> tuple[tuple[int, float], ...]:
    """Points whose learning rates differ by a factor, at different steps; the first and the last are kept."""
    kept = [(0, points[0][1])]
    for place, (step, rate) in enumerate(points[1:], 2):
        apart = max(rate / kept[-1][1], kept[-1][1] / rate) >= _APART and round(step) > kept[-1][0]
        if apart or place == len(points):
            kept.append((max(round(step), kept[-1][0] + 1), rate))
    return tuple(kept)

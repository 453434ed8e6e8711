r"""Whether a learning rate is stable now and at the equilibrium, and the warmup that leads from here to there.

On the way the largest stable step is interpolated between its values now and at the equilibrium, in logarithms, by
the share of the change of $\log \mathrm{Tr} H$ that is made. Motion along the orbit takes $\mathrm{lr}^2$ per step, so
a warmup at a fraction of the learning rate lasts longer.
"""

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, final

from noetherflow.forecasting.estimate import NEVER_UNSTABLE, Estimate

# Share of the largest stable step that a warmup takes, if the learning rate leaves that room at the equilibrium.
_SAFE = 0.5
# Points of the way, in units of the longest relaxation time, and points of the schedule.
_GRID = [10 ** (k / 8) for k in range(-32, 13)]
_POINTS = 9


@final
class Need(Enum):
    """Whether a warmup is needed; the value is the sentence to read."""

    NONE = "no warmup is needed: the learning rate is stable now and at the equilibrium"
    WARMUP = "a warmup is needed: the learning rate is unstable now and stable at the equilibrium"
    TOO_LARGE = "no warmup helps: the learning rate is unstable now and at the equilibrium"
    SHARPENS = "the learning rate is stable now and becomes unstable on the way to the equilibrium: lower it"
    UNKNOWN = "cannot be told"


@final
class Warmup(NamedTuple):
    """The verdict on the learning rate, and the schedule.

    Args:
        need: The kind of verdict.
        schedule: Steps and learning rates, linear between them; empty without a warmup.
        why: What the verdict stands on, or why there is none.
    """

    need: Need
    schedule: tuple[tuple[int, float], ...]
    why: str

    @property
    def steps(self) -> int:
        """The length of the warmup; 0 without a warmup."""
        return self.schedule[-1][0] if self.schedule else 0

    def __str__(self) -> str:
        if not self.schedule:
            return f"{self.need.value} ({self.why})"
        points = "; ".join(f"step {step:,}: {lr:.3g}" for step, lr in self.schedule)
        return f"{self.need.value} ({self.why}). Learning rates, linear in between: {points}"


def warmup_of(
    lr: float, now: Estimate, then: Estimate, made: Callable[[float], float] | None, longest: float
) -> Warmup:
    """Whether a warmup is needed, and its schedule.

    Args:
        lr: The learning rate that is to be used.
        now: The largest stable step now.
        then: The largest stable step at the equilibrium.
        made: The share of the change of log Tr H that is made after a number of steps at `lr`; None if unknown.
        longest: The longest relaxation time on the way, in steps at `lr`.

    Returns:
        The warmup.
    """
    first, second = _compare(lr, now), _compare(lr, then)
    why = f"learning rate {lr:.3g}; largest stable step {now} now, {then} at the equilibrium"
    if first is None or second is None:
        reason = now.why or then.why or "the learning rate is within two errors of the largest stable step"
        return Warmup(Need.UNKNOWN, (), f"{reason}; {why}")
    if first and second:
        return Warmup(Need.NONE, (), why)
    if first:
        return Warmup(Need.SHARPENS, (), why)
    if not second:
        return Warmup(Need.TOO_LARGE, (), why)
    if made is None or not longest:
        return Warmup(Need.WARMUP, (), f"its length cannot be told, because the way in time is not known; {why}")
    return Warmup(Need.WARMUP, _schedule(lr, now.value, then.value, made, longest), why)


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


def _schedule(
    lr: float, now: float, then: float, made: Callable[[float], float], longest: float
) -> tuple[tuple[int, float], ...]:
    """Points of the schedule: the step is a share of the stable step, until the learning rate is reached."""
    safe = min(1.0, max(_SAFE, 1.1 * lr / then))
    points, elapsed, before, rate = [(0, min(lr, safe * now))], 0.0, 0.0, min(lr, safe * now)
    for unit in _GRID:
        at = unit * longest
        elapsed += (at - before) * (lr / rate) ** 2
        share = min(max(made(at), 0.0), 1.0)
        rate, before = min(lr, safe * math.exp((1 - share) * math.log(now) + share * math.log(then))), at
        points.append((round(elapsed), rate))
        if rate >= lr:
            break
    return _thinned([point for k, point in enumerate(points) if k == 0 or point[0] > points[k - 1][0]])


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A few points, evenly in the logarithm of the learning rate; the first and the last are kept."""
    first, last = math.log(points[0][1]), math.log(points[-1][1])
    kept = [points[0]]
    for point in points[1:-1]:
        if math.log(point[1]) - math.log(kept[-1][1]) >= (last - first) / (_POINTS - 1):
            kept.append(point)
    return tuple([*kept, *points[-1:]]) if len(points) > 1 else tuple(kept)

r"""The way to the equilibrium in time: which part of every coordinate is left after a number of steps.

Of a single coordinate with the distance $y = x^* - x$, the forces are $P e^{-kx}$ and $R e^{kx}$, and the charge has
the slope $C' \propto p\,e^{-ky} + m\,e^{ky}$ with the Grams p and m of both sides at the equilibrium. With the time
$\tau$ of relaxation at the equilibrium

$$\frac{dy}{dn} = -\frac{\sinh(k y)}{k\,\tau}\,\frac{p + m}{p\,e^{-ky} + m\,e^{ky}} , \qquad
\frac{n}{\tau} = \ln\frac{\sinh k y_0}{\sinh k y} + k\,\frac{m - p}{p + m}\,(y_0 - y) .$$

k = 2 for SGD, k = 1 for AdamW. That is exact for a coordinate that shares no entry with others. Coordinates that move
each other have a joint way from `courses`; without such a way they are taken by themselves, with all others at the
equilibrium.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy
import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium
from noetherflow.forecasting.coupled import Course
from noetherflow.forecasting.courses import Courses
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Action, Grams

# Bisections of a fraction, which determine the fraction to rounding.
_BISECTIONS = 60
# Steps between which a time is sought, in units of the longest relaxation time.
_SHORTEST, LONGEST = 1e-6, 60.0
# Times at which a crossing is sought, everywhere and within a factor of an expected time.
_GRID, _FINE, _NEAR = 61, 11, 20.0


@final
@dataclass(frozen=True)
class Path:
    """Where the coordinates are after a number of steps.

    Args:
        ends: The coordinates at the equilibrium, for a matrix its eigenvalues.
        frames: The eigenvectors of a matrix; empty for a coordinate that is no matrix.
        times: The relaxation time of every coordinate.
        lean: (m - p) / (p + m) at the equilibrium, of every coordinate.
        exponent: k.
        courses: The joint ways of symmetries that move each other, by symmetry.
        apart: Symmetries that move each other without a joint way: each of their coordinates is taken by itself.
    """

    ends: dict[str, Tensor]
    frames: dict[str, Tensor]
    times: dict[str, Tensor]
    lean: dict[str, Tensor]
    exponent: int
    courses: dict[str, Course]
    apart: tuple[str, ...]

    def at(self, steps: float) -> dict[str, Tensor]:
        """The coordinates after a number of steps, in the form that the symmetries take."""
        result = {}
        for name, end in self.ends.items():
            if name in self.courses:
                result[name] = self.courses[name].at(steps)[name]
                continue
            x = end * (1 - self._left(name, steps))
            frame = self.frames.get(name)
            result[name] = x if frame is None else (frame * x) @ frame.mT
        return result

    @property
    def longest(self) -> float:
        """The longest time that a coordinate away from its equilibrium needs; 0 if all are there."""
        finite = [
            float(times[torch.isfinite(times) & (end != 0)].max())
            for times, end in ((self.times[name], self.ends[name]) for name in self.ends)
            if bool((torch.isfinite(times) & (end != 0)).any())
        ]
        return max(finite, default=0.0)

    def earliest(self, distance: float) -> float:
        """The steps after which the first coordinate has moved by a distance; infinite if none gets there."""
        result = math.inf
        for name, end in self.ends.items():
            there = (end.abs() > distance) & torch.isfinite(self.times[name])
            if bool(there.any()):
                start = end.abs().clamp_min(distance)
                steps = self._elapsed(start, 1 - distance / start, self.lean[name] * end.sign()) * self.times[name]
                result = min(result, float(steps[there].min()))
        return result

    def _left(self, name: str, steps: float) -> Tensor:
        """The share of the distance that is left, by bisection."""
        end, lean = self.ends[name].abs(), self.lean[name] * self.ends[name].sign()
        elapsed = steps / self.times[name]
        low, high = torch.zeros_like(end), torch.ones_like(end)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            late = self._elapsed(end, middle, lean) > elapsed
            low, high = torch.where(late, middle, low), torch.where(late, high, middle)
        return torch.where(end > 0, (low + high) / 2, torch.ones_like(end))

    def _elapsed(self, start: Tensor, left: Tensor, lean: Tensor) -> Tensor:
        """The time, in relaxation times, after which a share of the distance is left."""
        full, rest = self.exponent * start, self.exponent * start * left
        # ln sinh x = x + ln(1 - e^-2x) - ln 2: for a lean of -1 the terms linear in x cancel.
        return (full - rest) * (1 + lean) + _log_decay(full) - _log_decay(rest)


def path_of(equilibrium: Equilibrium, settings: Optimizer, multipliers: Params, courses: Courses | None = None) -> Path:
    """The way to an equilibrium.

    Args:
        equilibrium: The equilibrium.
        settings: The settings of the optimizer.
        multipliers: The metric of the optimizer at the equilibrium; a charge counts squares over these.
        courses: The joint ways of symmetries that move each other.

    Returns:
        The path.
    """
    theta = {
        name: tensor / multipliers[name].cpu().double().sqrt() if name in multipliers else tensor
        for name, tensor in equilibrium.params.items()
    }
    theta = {name: torch.where(torch.isfinite(t), t, 0.0) if t.is_floating_point() else t for name, t in theta.items()}
    ends, frames, times, lean = {}, {}, {}, {}
    for name, symmetry in equilibrium.symmetries.items():
        x = equilibrium.coordinates[name].double()
        grams = symmetry.grams(theta)
        if symmetry.action is Action.MIXES_ROWS and x.ndim == 2:
            ends[name], frames[name] = torch.linalg.eigh(x)
            frame = frames[name]
            grams = Grams(*((frame.mT @ side.double() @ frame).diagonal() for side in grams))
        else:
            ends[name] = x
        plus, minus = (side.double() for side in grams)
        if plus.shape != ends[name].shape:  # eigenspaces of a dense generator
            plus, minus = plus.sum(), minus.sum()
        total = plus + minus
        lean[name] = torch.where(total > 0, (minus - plus) / total, 0.0).expand_as(ends[name])
        slow = equilibrium.relaxation_steps[name].double()
        times[name] = slow.expand_as(ends[name]) if slow.ndim < 2 else slow.max().expand_as(ends[name])
    courses = courses or Courses({}, ())
    return Path(ends, frames, times, lean, settings.exponents.noise, courses.by_name, courses.apart)


def half_time(trace: Callable[[float], float], then: float, longest: float, *, near: float | None = None) -> float:
    """The steps after which half of the change of the trace is made, for the first time.

    Args:
        trace: Tr H after a number of steps.
        then: Tr H at the equilibrium.
        longest: The longest relaxation time.
        near: A number of steps near which the result is sought; None seeks everywhere.

    Returns:
        The steps; NaN if nothing changes.
    """
    now = trace(0.0)
    if not longest or now == then:
        return math.nan
    sign = 1.0 if then > now else -1.0

    def made(place: float) -> bool:
        return sign * (trace(math.exp(place)) - (now + then) / 2) >= 0

    shortest, last = (_SHORTEST * longest, LONGEST * longest) if near is None else (near / _NEAR, near * _NEAR)
    # The change may pass its end and come back: the first of all crossings is sought.
    grid = numpy.linspace(math.log(shortest), math.log(last), _GRID if near is None else _FINE).tolist()
    first = next((k for k, place in enumerate(grid) if made(place)), len(grid) - 1)
    low, high = grid[max(first - 1, 0)], grid[first]
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if made(middle) else (middle, high)
    return math.exp((low + high) / 2)


def interpolated(trace: Callable[[float], float], longest: float, points: int) -> Callable[[float], float]:
    """A function of time as straight lines in its logarithm over log time, from a few evaluations; constant outside."""
    first, last = math.log(1e-3 * longest), math.log(20 * longest)
    grid = [first + (last - first) * k / (points - 1) for k in range(points)]
    values = [trace(0.0), *(trace(math.exp(at)) for at in grid)]
    grid = [first - 3, *grid]

    def at(steps: float) -> float:
        place = math.log(steps) if steps > 0 else grid[0]
        return float(numpy.interp(place, grid, values))

    return at


def _log_decay(x: Tensor) -> Tensor:
    """ln(1 - e^-2x) for x >= 0, without loss of digits."""
    return torch.where(x > 0.5, torch.log1p(-torch.exp(-2 * x)), torch.log(-torch.expm1(-2 * x)))

"""F12: what was predicted and what was measured for a problem, over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from noetherflow.forecasting import Forecast
from noetherflow.paper.measure import standard_error

# Points of the curve that is stored.
_STORED = 60


@final
class Mean(NamedTuple):
    """A mean over seeds and its standard error; NaN without a seed that has the number."""

    value: float
    error: float


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """The forecasts of a problem, and Tr H along training. A number that a forecast does not tell is NaN.

    Args:
        name: The problem.
        steps: The recorded steps, shape (T,).
        curves: Tr H at the recorded steps, shape (T, seeds).
        ends: Tr H at the end of training, shape (seeds,).
        then: Predicted Tr H at the equilibrium, shape (seeds,).
        ratio: Predicted change of Tr H, shape (seeds,).
        ratio_error: The error of the predicted change that the forecast states, shape (seeds,).
        half: Predicted number of steps to half of the change, shape (seeds,).
        share: The learning rate over the largest stable step with noise, at the start or at the equilibrium.
        why: Why the change is not told, by seed; empty where the change is told.
    """

    name: str
    steps: Tensor
    curves: Tensor
    ends: Tensor
    then: Tensor
    ratio: Tensor
    ratio_error: Tensor
    half: Tensor
    share: float
    why: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        steps: Tensor,
        curves: Tensor,
        ends: Tensor,
        forecasts: Sequence[Forecast],
        *,
        lr: float,
        unit: float = 1.0,
    ) -> "Measured":
        """Forecasts and measurements of a problem; `unit` is the factor of the loss that the forecasts saw."""

        def column(number: Callable[[Forecast], float]) -> Tensor:
            return torch.tensor([number(forecast) for forecast in forecasts], dtype=torch.float64)

        def limit(forecast: Forecast) -> float:
            sides = (forecast.noisy_step.now, forecast.noisy_step.then)
            return min((side.value for side in sides if side.known), default=math.nan)

        return cls(
            name=name,
            steps=steps,
            curves=curves,
            ends=ends,
            # Where the change is not told, the trace at the equilibrium is that of a function that learning changes.
            then=column(lambda f: f.trace.then.value / unit if f.trace.ratio.known else math.nan),
            ratio=column(lambda f: f.trace.ratio.value),
            ratio_error=column(lambda f: f.trace.ratio.total),
            half=column(lambda f: f.half_steps.value),
            share=lr / mean_of(column(limit)).value,
            why=tuple(f.trace.ratio.why for f in forecasts),
        )

    @property
    def told(self) -> Tensor:
        """Whether the forecast tells the change of Tr H, shape (seeds,)."""
        return ~self.ratio.isnan()

    @property
    def compared(self) -> Tensor:
        """The seeds that measurements are averaged over: those that are told, or all if none is; shape (seeds,)."""
        return self.told if bool(self.told.any()) else torch.ones_like(self.told)

    @property
    def sure(self) -> Tensor:
        """Whether the predicted change is told and more than two of its errors from 1, shape (seeds,)."""
        return self.told & ((self.ratio - 1).abs() > 2 * self.ratio_error)

    @property
    def wrong(self) -> int:
        """The number of seeds that are sure, and whose Tr H changes in the opposite direction."""
        return int((self.sure & ((self.ratio > 1) != (self.change > 1))).sum())

    @property
    def change(self) -> Tensor:
        """Measured change of Tr H, shape (seeds,)."""
        return self.ends / self.curves[0]

    @property
    def half_measured(self) -> Mean:
        """Measured number of steps to half of the change of the mean over seeds; the error leaves out a seed a time."""

        def half(seeds: list[int]) -> float:
            return half_time(self.steps, self.curves[:, seeds], self.ends[seeds])

        count = len(self.ends)
        return Mean(half([*range(count)]), jackknife(half, count))

    def summary(self) -> dict[str, Any]:
        """Means over the compared seeds with errors, in plain JSON types; the time to half is of all seeds."""
        sure = int(self.sure.sum())
        return {
            "problem": self.name,
            "seeds": len(self.ends),
            "told": int(self.told.sum()),
            "why": sorted({why for why in self.why if why}),
            "sure": sure,
            "right": sure - self.wrong,
            "change predicted": mean_of(self.ratio),
            "change error": mean_of(self.ratio_error).value,
            "change measured": mean_of(self.change[self.compared]),
            "start": mean_of(self.curves[0, self.compared]),
            "end predicted": mean_of(self.then),
            "end measured": mean_of(self.ends[self.compared]),
            "half predicted": mean_of(self.half),
            "half measured": self.half_measured,
            "share": self.share,
            "curve": self._curve(),
        }

    def _curve(self) -> list[list[float]]:
        """Step and mean Tr H over its start at a few records."""
        last = len(self.steps) - 1
        kept = sorted({round(k * last / _STORED) for k in range(_STORED + 1)})
        return [[float(self.steps[k]), float((self.curves[k] / self.curves[0]).mean())] for k in kept]


def mean_of(values: Tensor) -> Mean:
    """The mean over the seeds that have the number."""
    known = values[~values.isnan()]
    return Mean(float(known.mean()), standard_error(known)) if len(known) else Mean(math.nan, math.nan)


def half_time(steps: Tensor, curves: Tensor, ends: Tensor) -> float:
    """The step at which the mean of curves, each over its start, has made half of its change.

    Args:
        steps: The steps, shape (T,).
        curves: The sharpness, shape (T, seeds).
        ends: The sharpness at the end, shape (seeds,).

    Returns:
        The first such step, between records by interpolation; NaN if there is none.
    """
    mean, end = (curves / curves[0]).mean(1), float((ends / curves[0]).mean())
    share = (mean - 1) / (end - 1)
    reached = share >= 0.5
    if not bool(reached.any()):
        return math.nan
    after = int(reached.double().argmax())
    left, right = float(share[after - 1]), float(share[after])
    first, second = float(steps[after - 1]), float(steps[after])
    return first + (second - first) * (0.5 - left) / (right - left)


def jackknife(statistic: Callable[[list[int]], float], count: int) -> float:
    """The standard error of a statistic of seeds, from its values with a seed left out; NaN for a single seed."""
    if count < 2:
        return math.nan
    left_out = torch.tensor([statistic([k for k in range(count) if k != j]) for j in range(count)], dtype=torch.float64)
    return float(((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt())

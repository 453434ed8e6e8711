"""Tr H after a number of steps on the way to the equilibrium."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium
from noetherflow.forecasting.estimate import Estimate, spread_of, unknown
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.path import LONGEST, Path, half_time, interpolated
from noetherflow.forecasting.traces import Traces, carried, moved, trace_at
from noetherflow.symmetry import Action, Grams

# Points of the way at which the trace is measured where it cannot be carried, and random vectors at each.
_POINTS, _VECTORS = 10, 8
# Times at which the farthest point of the way is sought.
_TIMES = 41


@final
@dataclass(frozen=True)
class InTime:
    r"""The trace of H on the way.

    Args:
        mean_loss: The mean loss.
        equilibrium: The equilibrium.
        path: The way of the coordinates.
        traces: The traces on both sides.
        grams: Grams of H for double rotations, each from a part of the random vectors: the trace of the block of a side
            is carried as $\mathrm{Tr}[e^{\mp2x} K_\pm]$. None if the trace cannot be carried.
        exactly: The exact diagonal of the Hessian; None for random vectors.
        seed: The seed of the random vectors.
    """

    mean_loss: MeanLoss
    equilibrium: Equilibrium
    path: Path
    traces: Traces
    grams: list[dict[str, Grams]] | None
    exactly: Exact | None
    seed: int

    def after(self) -> Callable[[float], float] | None:
        """Tr H after a number of steps; None if nothing moves."""
        if self.grams is not None:
            diagonals, grams = self.traces.diagonals, self.grams
            mean = {n: torch.stack([part[n] for part in diagonals]).mean(0) for n in diagonals[0]}
            both = {
                n: Grams(*(torch.stack([part[n][side] for part in grams]).mean(0) for side in (0, 1)))
                for n in (grams[0] if grams else {})
            }
            return self._carried(mean, both)
        if not self.path.longest:
            return None

        def measured(steps: float) -> float:
            params = moved_params(self.equilibrium, self.mean_loss, self.path.at(steps))
            return trace_at(self.mean_loss, self.exactly, params, _VECTORS, self.seed)

        return interpolated(measured, self.path.longest, _POINTS)

    def half(self) -> Estimate:
        """The number of steps after which half of the change of the trace is made."""
        after = self.after()
        if not self.path.longest or after is None:
            return unknown("no coordinate has both a distance from its equilibrium and a finite relaxation time")
        far = LONGEST * self.path.longest
        value = half_time(after, after(far), self.path.longest)
        if math.isnan(value):
            return unknown("Tr H does not change")
        if self.grams is None:
            return Estimate(value)
        each = []
        for k in range(max(len(self.traces.diagonals), len(self.grams))):
            # Exact diagonals have parts by batch, Grams by vector.
            diagonal = self.traces.diagonals[k % len(self.traces.diagonals)]
            carry = self._carried(diagonal, self.grams[k % len(self.grams)] if self.grams else {})
            each.append(half_time(carry, carry(far), self.path.longest, near=value))
        return Estimate(value, spread_of(torch.tensor(each, dtype=torch.float64)))

    def turn(self) -> tuple[float, float]:
        """The steps after which Tr H is farthest from now, on the side of the equilibrium, and Tr H then."""
        after, longest = self.after(), self.path.longest
        if after is None or not longest:
            return math.nan, math.nan
        times = torch.logspace(-4, math.log10(LONGEST), _TIMES, dtype=torch.float64) * longest
        seen = {time: after(time) for time in times.tolist()}
        now, then = after(0.0), seen[float(times[-1])]
        farthest = max(seen, key=lambda time: (seen[time] - now) * (1 if then > now else -1))
        return farthest, seen[farthest]

    def _carried(self, diagonal: Params, grams: dict[str, Grams]) -> Callable[[float], float]:
        full = full_diagonal(self.mean_loss, diagonal)
        scalings = {
            name: x
            for name, x in self.equilibrium.coordinates.items()
            if self.equilibrium.symmetries[name].action is Action.SCALES_ENTRIES
        }

        def after(steps: float) -> float:
            x = self.path.at(steps)
            total = sum(
                float(part.sum())
                for part in carried(self.equilibrium, {name: x[name] for name in scalings}, full).values()
            )
            for name, (plus, minus) in grams.items():
                # The diagonal has the trace at the start.
                grown = _spd.expm(2 * x[name])
                unit = torch.eye(len(grown), dtype=grown.dtype)
                total += float(((torch.linalg.inv(grown) - unit) * plus).sum() + ((grown - unit) * minus).sum())
            return total

        return after


def full_diagonal(mean_loss: MeanLoss, diagonal: Params) -> dict[str, Tensor]:
    """A diagonal with zeros for parameters that are not trained, float64, on the CPU."""
    return {
        name: diagonal[name].double().cpu() if name in diagonal else torch.zeros(tensor.shape, dtype=torch.float64)
        for name, tensor in mean_loss.function.params.items()
    }


def moved_params(
    equilibrium: Equilibrium, mean_loss: MeanLoss, coordinates: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The trained parameters at a point of the orbit, by default at the equilibrium, moved in float64."""
    wide = {name: tensor.double().cpu() for name, tensor in mean_loss.function.params.items()}
    there = moved(equilibrium, equilibrium.coordinates if coordinates is None else coordinates, wide)
    like = mean_loss.params
    return {name: there[name].to(like[name].device, like[name].dtype) for name in mean_loss.names}

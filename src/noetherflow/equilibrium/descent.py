"""The descent of the potential along all symmetries of a model, with a measurement of the noise at every point."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._errors import NonFiniteError
from noetherflow._minibatch import minibatches
from noetherflow._progress import track
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.equilibrium.anderson import Anderson
from noetherflow.equilibrium.blocks import Blocks, moved, potential_of
from noetherflow.equilibrium.orbit import Residual
from noetherflow.equilibrium.result import OrbitMinimum, Outcome, Status
from noetherflow.noise import NoiseMoments
from noetherflow.noise.measurement import Measurement
from noetherflow.optimizers import Optimizer

# A step is halved at most this often.
_HALVINGS = 8
# The next step of the search changes weights by factors below e^0.01, or the search has not ended.
_SHORT = 0.01


@final
@dataclass(frozen=True)
class Point:
    """A point of the orbit, and the measurement there.

    Args:
        coordinates: The group elements that lead there from the model, by symmetry.
        params: The parameters.
        potential: The potential there.
        trace: Tr Sigma there.
        blocks: The symmetries in blocks, with the noise there.
        minimum: The minimum of every block, seen from there.
        residuals: The drift of every symmetry there.
    """

    coordinates: dict[str, Tensor]
    params: dict[str, Tensor]
    potential: float
    trace: float
    blocks: Blocks
    minimum: OrbitMinimum
    residuals: dict[str, Residual]


class Course(NamedTuple):
    """The first and the last point of a descent, how the search ended, and what the iterates know of the Jacobian."""

    start: Point
    end: Point
    outcomes: dict[str, Outcome]
    acceleration: Anderson


@final
class Descent:
    """Moves from point to point, each with a lower potential than the last.

    Args:
        measurement: How the noise is measured.
        origin: The parameters at the start, float64.
        settings: The settings of the optimizer.
        rounding: Relative differences of forces that are rounding in the type of the parameters.
        slack: Relative differences of forces and of the potential that are rounding in the coarsest type in which the
            loss is computed: they neither stop the search nor count as a failure at its end.

    Attributes:
        passes: The number of measurements.
        noise: The first measurement, if it is to be kept. No further one is, since noise has the size of the model.
    """

    def __init__(
        self,
        measurement: Measurement,
        origin: Params,
        settings: Optimizer,
        *,
        rounding: float,
        slack: float,
        progress: bool,
        keep_noise: bool,
    ) -> None:
        self._measurement, self._origin, self._settings = measurement, origin, settings
        self._symmetries, self._progress = measurement.symmetries, progress
        self._rounding, self._slack = rounding, max(rounding, slack)
        self._groups = entangled(self._symmetries, origin)
        self._keep_noise = keep_noise
        self.noise: NoiseMoments | None = None
        self.passes = 0

    def run(self, tolerance: float, max_passes: int) -> Course:
        """Measure and move until every residual is at most a share of its start."""
        identity = {name: symmetry.identity(self._origin) for name, symmetry in self._symmetries.items()}
        start = here = self.measure(identity)
        acceleration = Anderson()
        reason = f"in {max_passes} passes, the most that max_passes allows"
        for _ in track(range(max_passes - 1), "equilibrium", total=max_passes - 1, shown=self._progress):
            step = acceleration.next(here.coordinates, _image(here)) if identity else {}
            short = all(bool(((step[name] - x).abs() <= _SHORT).all()) for name, x in here.coordinates.items())
            if (
                short and all(self._reached(start, here, tolerance, self._rounding).values())
            ) or self.passes >= max_passes:
                break
            there = self._step(here, step, acceleration, max_passes)
            if there is None:
                reason = f"in {self.passes} passes, and no shorter step lowers the potential"
                break
            here = there
        return Course(start, here, self._outcomes(start, here, tolerance, reason), acceleration)

    def measure(self, coordinates: dict[str, Tensor]) -> Point:
        """The point of the orbit with given coordinates, and the noise there."""
        self.passes += 1
        params = moved(self._symmetries, self._origin, coordinates)
        noise = self._measurement.at(params, progress=self._progress)
        gradients = minibatches(noise, self._settings)
        blocks = Blocks.of(params, gradients, groups=self._groups)
        potential = float(potential_of(params, gradients, blocks))
        if self._keep_noise and self.noise is None:
            self.noise = noise
        return Point(
            coordinates,
            params,
            potential,
            float(noise.trace),
            blocks,
            blocks.minimise(),
            blocks.residuals(),
        )

    def _step(self, here: Point, step: dict[str, Tensor], acceleration: Anderson, max_passes: int) -> Point | None:
        """The next point: accelerated if that lowers the potential, else the step of the blocks, halved if need be."""
        ceiling = here.potential + self._slack * abs(here.potential)
        there, error = self._attempt(step)
        length = 1.0
        while not (there and there.potential <= ceiling) and self.passes < max_passes and length > 2**-_HALVINGS:
            acceleration.restart()
            there, error = self._attempt(_image(here, length))
            length /= 2
        if there is None and error is not None:
            largest = max(here.minimum.coordinates, key=lambda name: float(here.minimum.coordinates[name].abs().max()))
            size = float(here.minimum.coordinates[largest].abs().max())
            raise NonFiniteError(
                f"pass {self.passes}: {error}. The move from the point before changes {largest!r} most, by factors up "
                f"to e^{size:.2g}; the model itself is unchanged. Look for overflow in the loss, or compute with "
                "dtype=torch.float64"
            ) from error
        return there if there and there.potential <= ceiling else None

    def _attempt(self, coordinates: dict[str, Tensor]) -> tuple[Point | None, NonFiniteError | None]:
        """A measurement, or the reason why there is no number."""
        try:
            point = self.measure(coordinates)
        except NonFiniteError as error:
            return None, error
        return point, None

    def _reached(self, start: Point, here: Point, tolerance: float, rounding: float) -> dict[str, bool]:
        """Whether the residual of each symmetry is at most a share of its start, or rounding."""
        reached = {}
        for name, residual in here.residuals.items():
            before = start.residuals[name]
            limit = torch.maximum(tolerance * before.rate.abs(), rounding * residual.size)
            reached[name] = bool((residual.rate.abs() <= limit).all())
        return reached

    def _outcomes(self, start: Point, here: Point, tolerance: float, reason: str) -> dict[str, Outcome]:
        """How the search ended for every symmetry."""
        limited = Outcome(Status.NOT_CONVERGED, f"the drift was not reduced to {tolerance:.0e} of its start {reason}")
        reached = self._reached(start, here, tolerance, self._slack)
        return {name: here.minimum.outcomes[name] if reached[name] else limited for name in self._symmetries}


def _image(point: Point, length: float = 1.0) -> dict[str, Tensor]:
    """The coordinates after the step of every block, or a part of that step."""
    steps: Mapping[str, Tensor] = point.minimum.coordinates
    return {name: _spd.compose(x, length * steps[name]) for name, x in point.coordinates.items()}

"""The equilibrium of any set of symmetries: measure, solve block by block, move, measure again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow import _spd
from noetherflow._batch import peek
from noetherflow._errors import SettingsError
from noetherflow._optimizers import SGD
from noetherflow._params import copy_of, snapshot
from noetherflow._progress import track
from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.equilibrium.anderson import Anderson
from noetherflow.equilibrium.blocks import Blocks, moved
from noetherflow.equilibrium.orbit import Residual
from noetherflow.equilibrium.result import Equilibrium, Imbalance, OrbitMinimum, Outcome, Status
from noetherflow.noise import NoiseMoments, estimate_noise
from noetherflow.noise.exact import resolve
from noetherflow.symmetry import Symmetry

# A residual below this share of the forces on a coordinate is rounding.
_ROUNDING = 1e-12
# Differences of the potential below this share of it are rounding.
_SLACK = 1e-12
# A step is halved at most this often.
_HALVINGS = 8


def equilibrate(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    sgd: SGD,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    tolerance: float = 1e-6,
    max_passes: int = 40,
    progress: bool = True,
) -> Equilibrium:
    r"""Find the noise equilibrium of a model, whatever its symmetries, by measuring the noise along the way.

    The potential $\Phi(x) = 2\gamma|\theta_x|^2 + \sigma^2\,\mathrm{Tr}\,\Sigma(\theta_x)$ is convex along every
    symmetry. Where symmetries share no entry of a tensor, or all of them scale entries, the noise at a single point
    determines $\Phi$ on the orbit; see `solve_equilibrium`. Elsewhere (the gain of a norm against the heads that read
    the norm, consecutive linear layers, LoRA on attention) every block of symmetries is solved by itself, all blocks
    are moved, and the noise is measured again at the new point, with Anderson acceleration between passes. A step that
    raises the measured potential is halved. The last measurement proves the end point.

    Args:
        model: The model, in the mode in which it trains. It is not changed: the search runs on a copy in float64.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: Batches of the training data. They are kept in memory, since every pass measures the same examples.
        sgd: The settings of the optimizer.
        symmetries: By name; None finds them on the first batch.
        tolerance: The drift of every coordinate is reduced to this share of its start.
        max_passes: The largest number of measurements.
        progress: Show a progress bar on a terminal.

    Returns:
        The equilibrium. `passes` counts the measurements; `outcomes` says for every symmetry whether it came to rest.

    Raises:
        SettingsError: If `tolerance` or `max_passes` is out of range.
        EmptyDataError: If the loader yields nothing.
        NoetherflowError: For bad input, as `find_symmetries` and `estimate_noise` raise it.

    Examples:
        Three linear layers, whose rotations share the middle weight:

        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
        >>> batches = [(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(4)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> equilibrium = nf.equilibrate(net, loss, batches, nf.SGD(lr=0.1, batch_size=8))
        >>> equilibrium.status.name, equilibrium.trace_after < equilibrium.trace_before
        ('CONVERGED', True)

    Source: Ziyin et al. (2024) for the equilibrium; Kempf and Ness (1979) for convexity along groups; Anderson (1965)
        for the acceleration. Their combination is this package's own.
    """
    if not 0 < tolerance < 1 or max_passes < 2:
        raise SettingsError(
            f"tolerance must lie between 0 and 1 and max_passes be 2 or more, got tolerance={tolerance}, "
            f"max_passes={max_passes}"
        )
    first, loader = peek(loader)
    if symmetries is None:
        symmetries = find_symmetries(model, loss, first)
    course = _Course(copy_of(model, torch.float64), loss, list(loader), dict(symmetries), sgd)
    return course.descend(tolerance, max_passes, progress)


@final
@dataclass(frozen=True)
class _Point:
    """A point of the orbit, and what was measured there."""

    coordinates: dict[str, Tensor]
    params: dict[str, Tensor]
    noise: NoiseMoments
    potential: float
    blocks: Blocks
    residuals: dict[str, Residual]


@final
class _Course:
    """The descent of the potential of a model along its symmetries."""

    def __init__(
        self, model: nn.Module, loss: Loss, batches: list[Batch], symmetries: dict[str, Symmetry], sgd: SGD
    ) -> None:
        self._model, self._loss, self._batches, self._sgd = model, loss, batches, sgd
        self._symmetries = resolve(model, symmetries)
        self._origin = snapshot(model)
        self.passes = 0

    def descend(self, tolerance: float, max_passes: int, progress: bool) -> Equilibrium:
        """Measure and move until every residual is small enough."""
        origin = {name: symmetry.identity(self._origin) for name, symmetry in self._symmetries.items()}
        start = here = self._measure(origin)
        acceleration = Anderson()
        for _ in track(range(max_passes - 1), "equilibrium", shown=progress):
            if all(self._reached(start, here, tolerance).values()) or self.passes >= max_passes:
                break
            here = self._step(here, here.blocks.minimise(), acceleration, max_passes)
        return self._result(start, here, tolerance)

    def _step(self, here: _Point, minimum: OrbitMinimum, acceleration: Anderson, max_passes: int) -> _Point:
        """The next point: accelerated if that lowers the potential, else the step of the blocks, halved if need be."""
        ceiling = here.potential + _SLACK * abs(here.potential)
        image = {name: _spd.compose(x, minimum.coordinates[name]) for name, x in here.coordinates.items()}
        there = self._measure(acceleration.next(here.coordinates, image))
        length = 1.0
        while not there.potential <= ceiling and self.passes < max_passes and length > 2**-_HALVINGS:
            acceleration.restart()
            shorter = {
                name: _spd.compose(x, length * minimum.coordinates[name]) for name, x in here.coordinates.items()
            }
            there = self._measure(shorter)
            length /= 2
        return there if there.potential <= ceiling else here

    def _measure(self, coordinates: dict[str, Tensor]) -> _Point:
        """Move the copy to a point of the orbit, and measure the noise there."""
        self.passes += 1
        params = moved(self._symmetries, self._origin, coordinates)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(params[name])
        noise = estimate_noise(
            self._model, self._loss, self._batches, self._symmetries, dtype=torch.float64, progress=False
        )
        norm = torch.stack([params[name].square().sum() for name in noise.mean]).sum()
        potential = 2 * self._sgd.gamma * norm + self._sgd.temperature * noise.trace
        blocks = Blocks.of(params, noise, self._sgd)
        residuals = {name: residual for orbit in blocks.orbits for name, residual in orbit.residuals().items()}
        return _Point(coordinates, params, noise, float(potential), blocks, residuals)

    def _reached(self, start: _Point, here: _Point, tolerance: float) -> dict[str, bool]:
        """Whether the residual of each symmetry is at most a share of its start, or rounding."""
        reached = {}
        for name, residual in here.residuals.items():
            before = start.residuals[name]
            limit = torch.maximum(tolerance * before.rate.abs(), _ROUNDING * residual.size)
            reached[name] = bool((residual.rate.abs() <= limit).all())
        return reached

    def _result(self, start: _Point, here: _Point, tolerance: float) -> Equilibrium:
        minimum = here.blocks.minimise()
        reached = self._reached(start, here, tolerance)
        limited = Outcome(
            Status.NOT_CONVERGED, f"the drift was not reduced to {tolerance:.0e} of its start in {self.passes} passes"
        )
        outcomes = {name: minimum.outcomes[name] if reached[name] else limited for name in here.noise.symmetries}
        return Equilibrium(
            params=here.params,
            coordinates=here.coordinates,
            outcomes=outcomes,
            drift={name: here.residuals[name].drift for name in outcomes},
            relaxation_steps={name: minimum.relaxation[name] / self._sgd.effective_lr for name in outcomes},
            potential_before=start.potential,
            potential_after=here.potential,
            trace_before=float(start.noise.trace),
            trace_after=float(here.noise.trace),
            iterations=minimum.iterations,
            symmetries=here.noise.symmetries,
            passes=self.passes,
            standard_error={name: torch.full_like(x, torch.nan) for name, x in here.coordinates.items()},
            imbalance={n: Imbalance(start.residuals[n].imbalance, here.residuals[n].imbalance) for n in outcomes},
        )

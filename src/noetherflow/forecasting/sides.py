"""All numbers of a forecast on both sides: where the model is, and at the equilibrium."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch

from noetherflow._forces import has_charge
from noetherflow._second_moments import SecondMoments
from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium, Status
from noetherflow.forecasting.courses import Groups, courses_of
from noetherflow.forecasting.critical import critical_sharpness
from noetherflow.forecasting.estimate import Change, Estimate, change_of, unknown
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.in_time import InTime, full_diagonal, moved_params
from noetherflow.forecasting.learner import Learner
from noetherflow.forecasting.learning import Learning, no_learning
from noetherflow.forecasting.mean_loss import MeanLoss, NoDoubleBackwardError
from noetherflow.forecasting.metric import Metric, metric_at, reference_lr
from noetherflow.forecasting.motion import motion_of
from noetherflow.forecasting.path import path_of
from noetherflow.forecasting.schedule import Warmup, Way, warmup_of
from noetherflow.forecasting.spectrum import largest, stable_steps
from noetherflow.forecasting.traces import (
    Traces,
    carried,
    curvature_grams,
    equilibrium_errors,
    measure,
    scales_entries,
    with_error,
)
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Action, AxisSymmetry, Grams

# Endings of the search after which there is no point to go to.
_NOWHERE = (Status.NON_FINITE, Status.NOT_CONVERGED)
# Relative accuracy of the stable step on the way.
_COARSE = 1e-3


@final
class _Side(NamedTuple):
    """The numbers at a point; `steepest` is the largest eigenvalue in the metric of the optimizer."""

    metric: Metric
    steepest: Estimate
    largest: Estimate
    critical: Estimate
    stable_step: Estimate
    noisy_step: Estimate


@final
@dataclass(frozen=True)
class Sides:
    """The numbers of a forecast.

    Args:
        mean_loss: The mean loss.
        equilibrium: The equilibrium.
        settings: The settings of the optimizer.
        now: The numbers where the model is.
        then: The numbers at the equilibrium; None if there is none.
        traces: The traces; None if they cannot be told.
        exactly: The exact diagonal of the Hessian; None for random vectors.
        why: Why there are no traces, and why they are not exact.
        seed: The seed of the random vectors.
        measured_moments: Whether v of AdamW is from the gradients of the batches.
        in_time: Tr H on the way to the equilibrium; None if there is no way.
    """

    mean_loss: MeanLoss
    equilibrium: Equilibrium
    settings: Optimizer
    now: _Side
    then: _Side | None
    traces: Traces | None
    exactly: Exact | None
    why: str
    seed: int
    measured_moments: bool
    in_time: InTime | None

    @classmethod
    def measure(
        cls,
        mean_loss: MeanLoss,
        equilibrium: Equilibrium,
        settings: Optimizer,
        vectors: int,
        seed: int,
        *,
        microbatches: bool = False,
        moments: SecondMoments | None = None,
    ) -> "Sides":
        """Measure on both sides."""
        exactly, why = Exact.if_valid(mean_loss)
        nowhere = equilibrium.status in _NOWHERE
        there = {} if nowhere else moved_params(equilibrium, mean_loss)
        traces = None
        try:
            traces = measure(mean_loss, exactly, equilibrium, there or mean_loss.params, vectors, seed)
        except NoDoubleBackwardError as error:
            why = str(error)
        kept = None if moments is None else moments.values
        now = _side(mean_loss, mean_loss.params, settings, seed, kept)
        then = None if nowhere else _side(mean_loss, there, settings, seed, _carried_moments(equilibrium, kept))
        in_time = None
        if then is not None and traces is not None:
            courses = courses_of(mean_loss, equilibrium, settings, microbatches=microbatches, moments=moments)
            path = path_of(equilibrium, settings, then.metric.multipliers, courses)
            grams = _grams(mean_loss, equilibrium, settings, vectors, seed)
            in_time = InTime(mean_loss, equilibrium, path, traces, grams, exactly, seed)
        return cls(mean_loss, equilibrium, settings, now, then, traces, exactly, why, seed, moments is None, in_time)

    @property
    def exact(self) -> bool:
        """Whether the traces are exact."""
        return self.traces is not None and self.traces.exact

    @property
    def largest(self) -> Change:
        """The largest eigenvalue of H."""
        return self._change("largest")

    @property
    def critical(self) -> Change:
        """The critical sharpness."""
        return self._change("critical")

    @property
    def stable_step(self) -> Change:
        """The largest stable step without noise."""
        return self._change("stable_step")

    @property
    def noisy_step(self) -> Change:
        """The largest stable step with noise."""
        return self._change("noisy_step")

    def trace(self) -> Change:
        """Tr H."""
        if self.traces is None:
            return Change(*(unknown(self.why) for _ in range(3)))
        return self._with_errors({"": self.traces.total()}, self._equilibrium_errors()[0])[""]

    def blocks(self) -> dict[str, Change]:
        """Tr H by block."""
        if self.traces is None:
            return {name: Change(*(unknown(self.why) for _ in range(3))) for name in self.mean_loss.names}
        return self._with_errors(self.traces.blocks(), self._equilibrium_errors()[1])

    def half_steps(self) -> Estimate:
        """The number of steps after which half of the change of the trace is made."""
        return unknown(self._nowhere()) if self.in_time is None else self.in_time.half()

    def learning(self, half: Estimate) -> Learning:
        """How far the model still learns within a half time."""
        after, steepest = self._trace_after(), self.now.steepest
        if after is None or not half.known:
            return no_learning(half.why or self._nowhere())
        if not steepest.known:
            return no_learning(steepest.why)
        charged = {n: s for n, s in self.equilibrium.symmetries.items() if has_charge(s, self.settings)}
        learner = Learner(
            self.mean_loss, self.exactly, self.settings, self.now.metric, charged, steepest.value, self.seed
        )
        steps = learner.horizon(half.value)
        return learner.after(steps, after(steps) - after(0.0))

    def warmup(self, doubt: str = "") -> Warmup:
        """Whether a warmup is needed; `doubt` says why the model may not get to the equilibrium."""
        lr = reference_lr(self.settings, self.mean_loss.names)
        quiet = not self.noisy_step.now.known
        given, settings = self.mean_loss, self.settings

        def stable(coordinates: Mapping[str, torch.Tensor]) -> Estimate:
            params = moved_params(self.equilibrium, given, dict(coordinates))
            metric = metric_at(given, params, settings)
            top = largest(given, params, metric, self.seed, tolerance=_COARSE)
            return stable_steps(given, params, metric, top, settings)[0 if quiet else 1]

        limits = self.stable_step if quiet else self.noisy_step
        way = None
        if self.in_time is not None and self.in_time.path.longest:
            way = Way(motion_of(self.in_time.path, self.equilibrium, settings), stable)
        return warmup_of(lr, limits.now, limits.then, way, self._endless() or doubt)

    def _endless(self) -> str:
        """Why the norm of scale-invariant weights has no end; empty if it has."""
        for name, symmetry in self.equilibrium.symmetries.items():
            grows = isinstance(symmetry, AxisSymmetry) and not symmetry.minus
            if grows and self.equilibrium.outcomes[name].status is Status.AT_INFINITY:
                return f"without weight decay the norm of {name!r} grows for ever, and the stable step with it"
        return ""

    def _trace_after(self) -> Callable[[float], float] | None:
        """Tr H after a number of steps; None if it cannot be told."""
        return None if self.in_time is None else self.in_time.after()

    def _equilibrium_errors(self) -> tuple[dict[str, float], dict[str, float]]:
        """The errors of the trace and of its blocks from the errors of the coordinates."""
        if self.traces is None or not scales_entries(self.equilibrium):
            return {}, {}
        diagonals = self.traces.diagonals
        mean = {n: torch.stack([part[n] for part in diagonals]).mean(0) for n in diagonals[0]}
        total, blocks = equilibrium_errors(self.equilibrium, full_diagonal(self.mean_loss, mean))
        return {"": total}, blocks

    def _with_errors(self, changes: dict[str, Change], errors: dict[str, float]) -> dict[str, Change]:
        if self.then is None:
            none = unknown(self._nowhere())
            return {name: Change(change.now, none, none) for name, change in changes.items()}
        return {n: with_error(c, errors[n]) if errors.get(n) and c.now.value else c for n, c in changes.items()}

    def _change(self, what: str) -> Change:
        now: Estimate = getattr(self.now, what)
        return change_of(now, unknown(self._nowhere()) if self.then is None else getattr(self.then, what))

    def _nowhere(self) -> str:
        if self.then is None:
            return f"there is no equilibrium to go to: {self.equilibrium.status.value}"
        return self.why


def _grams(
    mean_loss: MeanLoss, equilibrium: Equilibrium, settings: Optimizer, vectors: int, seed: int
) -> list[dict[str, Grams]] | None:
    """Grams of H for the double rotations, empty if there is none; None if Tr H cannot be carried along the orbit."""
    moving = {n: s for n, s in equilibrium.symmetries.items() if bool(equilibrium.coordinates[n].any())}
    groups = Groups.of(equilibrium, settings)
    if groups.mixed or any(symmetry.action is Action.SCALES_EIGENSPACES for symmetry in moving.values()):
        return None
    if not groups.rotating:
        return []
    return curvature_grams(mean_loss, {name: moving[name] for name in groups.rotating}, vectors, seed)


def _carried_moments(equilibrium: Equilibrium, kept: Params | None) -> Params | None:
    """The second moments that Adam keeps, at the equilibrium: squares of gradients fall as the curvature does."""
    if kept is None:
        return None
    missing = {n: torch.zeros_like(t) for n, t in equilibrium.params.items() if n not in kept}
    there = carried(equilibrium, equilibrium.coordinates, {**missing, **kept})
    return {name: there[name] for name in kept}


def _side(mean_loss: MeanLoss, params: Params, settings: Optimizer, seed: int, kept: Params | None = None) -> _Side:
    """The numbers at given parameters."""
    metric = metric_at(mean_loss, params, settings, kept)
    critical = critical_sharpness(mean_loss, params, metric, reference_lr(settings, mean_loss.names))
    try:
        plain = top = largest(mean_loss, params, None, seed)
        if not all(bool((part == 1).all()) for part in metric.multipliers.values()):
            top = largest(mean_loss, params, metric, seed)
        return _Side(metric, top.value, plain.value, critical, *stable_steps(mean_loss, params, metric, top, settings))
    except NoDoubleBackwardError as error:
        none = unknown(str(error))
        return _Side(metric, none, none, critical, none, none)

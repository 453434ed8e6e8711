"""The search for the equilibrium of a model: what is prepared before the descent, and measured after it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noetherflow._batch import cast, read
from noetherflow._device import CPU
from noetherflow._dtype import working_dtype
from noetherflow._errors import NonFiniteError, SettingsError
from noetherflow._given import require_loader
from noetherflow._minibatch import minibatches
from noetherflow._model_function import ModelFunction
from noetherflow._params import aliases, snapshot
from noetherflow._per_example import own_randomness, require_losses, require_uncoupled
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow._verify import Residual
from noetherflow.detect.find import explain_axes, warn_of_rejected
from noetherflow.equilibrium.blocks import Blocks
from noetherflow.equilibrium.descent import Descent, Point
from noetherflow.equilibrium.memory import require_memory
from noetherflow.equilibrium.result import Equilibrium, Imbalance
from noetherflow.equilibrium.standard_errors import standard_errors
from noetherflow.noise import NoiseMoments
from noetherflow.noise.exact import resolve
from noetherflow.noise.measurement import Measurement
from noetherflow.optimizers import Optimizer, require_settings
from noetherflow.symmetry import Symmetry

# Relative differences of forces that are rounding, by floating-point type.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Memory that stacked gradients of examples may take, in bytes.
_STACKS = 2**28


@final
@dataclass(frozen=True)
class Options:
    """The keyword arguments of `equilibrate`, checked."""

    tolerance: float
    max_passes: int
    microbatches: bool
    holdout: Iterable[Batch] | None
    dtype: torch.dtype | None
    max_bytes: int | None
    progress: bool
    keep_noise: bool = False

    def __post_init__(self) -> None:
        numbers = isinstance(self.tolerance, float | int) and isinstance(self.max_passes, int)
        if not numbers or not 0 < self.tolerance < 1 or self.max_passes < 2:
            raise SettingsError(
                "tolerance must be a number between 0 and 1, and max_passes an integer, 2 or more; got "
                f"tolerance={self.tolerance!r}, max_passes={self.max_passes!r}"
            )
        if self.max_bytes is not None and (not isinstance(self.max_bytes, int) or self.max_bytes < 1):
            raise SettingsError(f"max_bytes must be a positive integer or None, got {self.max_bytes!r}")
        if self.dtype is not None and self.dtype not in _ROUNDING:
            raise SettingsError(f"dtype must be a floating-point type, {[*_ROUNDING]} or None, got {self.dtype!r}")


class Search(NamedTuple):
    """The equilibrium, with the first batch, the noise and the parameters at the start, and residuals of the finder.

    The settings have the names of the parameters.
    """

    first: Batch
    equilibrium: Equilibrium
    noise: NoiseMoments | None
    initial: dict[str, Tensor]
    residuals: dict[str, Residual]
    settings: Optimizer


def search(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    settings: Optimizer,
    symmetries: Mapping[str, Symmetry] | None,
    options: Options,
) -> Search:
    """Find the equilibrium of a copy of a model; see `equilibrate`."""
    aliases(model)  # raises unless the model is a module
    settings = require_settings(settings, model)
    if not options.microbatches:
        require_uncoupled(model)
    elif settings.with_mean:
        raise SettingsError(
            "microbatches=True measures differences between batches, and no mean gradient: it is for nf.SGD without "
            f"finite_step, got nf.{type(settings).__name__}. Leave microbatches out, if every example has a loss"
        )
    resolve(model, symmetries or {})  # raises for symmetries that do not fit, and if nothing is trained
    # The data is read once: a loader may yield other examples the next time.
    with own_randomness(next(model.parameters()).device):
        batches = read(loader, "loader")
        unused = [] if options.holdout is None else read(options.holdout, "holdout")
    first = batches[0]
    require_loader(model, loss, loader, first)
    working = working_dtype(model, loss, first, options.dtype)
    precision = _precision(model, loss, first, working.dtype)
    notes = [working.note] if working.note else []
    rounding, slack = _ROUNDING[working.dtype], _ROUNDING[precision]
    if precision.itemsize == 2:
        notes.append(f"the loss is computed in {precision}: a drift below {slack:.0e} of the forces is rounding")
    notes += _running_statistics(model)
    residuals: dict[str, Residual] = {}
    if symmetries is None:
        symmetries, residuals, left_out = _detected(
            model, loss, first, working.dtype, settings, progress=options.progress
        )
        notes += left_out
    require_memory(model, symmetries, working.dtype, options.max_bytes)
    measurement = Measurement(
        model,
        loss,
        batches,
        symmetries,
        dtype=working.dtype,
        microbatches=options.microbatches,
        max_bytes=_STACKS if options.max_bytes is None else min(_STACKS, options.max_bytes),
    )
    initial = snapshot(model, device=CPU)
    descent = Descent(
        measurement,
        initial,
        settings,
        rounding=rounding,
        slack=slack,
        progress=options.progress,
        keep_noise=options.keep_noise,
    )
    course = descent.run(options.tolerance, options.max_passes)
    start, end, outcomes, _ = course
    equilibrium = Equilibrium(
        params=end.params,
        coordinates=end.coordinates,
        outcomes=outcomes,
        drift={name: end.residuals[name].drift for name in outcomes},
        relaxation_steps={name: end.minimum.relaxation[name] for name in outcomes},
        potential_before=start.potential,
        potential_after=end.potential,
        trace_before=start.trace,
        trace_after=end.trace,
        iterations=end.minimum.iterations,
        symmetries=measurement.symmetries,
        passes=descent.passes,
        standard_error=standard_errors(measurement, course, settings, progress=options.progress),
        imbalance={n: Imbalance(start.residuals[n].imbalance, end.residuals[n].imbalance) for n in outcomes},
        holdout=_carried_over(measurement, unused, start, end, settings),
        notes=tuple(notes),
    )
    return Search(first, equilibrium, descent.noise, initial, residuals, settings)


def _precision(model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype) -> torch.dtype:
    """The coarsest type in which the loss is computed, as under autocast."""
    device = next(model.parameters()).device
    function, given = ModelFunction(model, loss, dtype), cast(batch, dtype, device)
    with own_randomness(device):
        require_losses(function.losses(function.params, given), "the first batch")
        return function.observe(given).precision


def _running_statistics(model: nn.Module) -> list[str]:
    """A note if a layer normalises with running statistics, which is not how it trains."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not module.training and module.running_mean is not None
    ]
    if not names:
        return []
    return [
        f"{names[0]} {f'and {len(names) - 1} more layers normalise' if names[1:] else 'normalises'} with running "
        "statistics (eval mode). Training normalises with the statistics of the batch, and its gradient noise is "
        "another: call model.train() and set microbatches=True to measure that"
    ]


def _detected(
    model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype, settings: Optimizer, *, progress: bool
) -> tuple[dict[str, Symmetry], dict[str, Residual], list[str]]:
    """The symmetries of the graph less those of parameters that do not move, their residuals, and notes."""
    for _ in track(range(1), "symmetries", total=1, shown=progress):
        explanation = explain_axes(model, loss, batch, dtype=dtype)
    warn_of_rejected(explanation)
    still = _still(model, loss, batch, dtype, settings)
    notes = [f"left out, because {reason}: {', '.join(names)}" for reason, names in still.items() if names]
    excluded = {name for names in still.values() for name in names}
    kept = {name: s for name, s in explanation.symmetries.items() if excluded.isdisjoint(s.names)}
    if not kept:
        notes.append("no symmetry was detected: nothing has to be brought to rest")
    residuals = {finding.name: finding.residual for finding in explanation.found if finding.name in kept}
    return kept, residuals, notes


def _still(model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype, settings: Optimizer) -> dict[str, list[str]]:
    """The trainable parameters that do not move, by the reason."""
    function = ModelFunction(model, loss, dtype)
    device = next(model.parameters()).device
    with own_randomness(device):
        unreached = function.unreached(function.trained, cast(batch, dtype, device))
    groupless = [name for name in function.trained if not settings.trains(name)]
    return {
        "no gradient of the loss reaches them": sorted(unreached),
        "no parameter group of the optimizer holds them": sorted(groupless),
    }


def _carried_over(
    measurement: Measurement, batches: list[Batch], start: Point, end: Point, settings: Optimizer
) -> dict[str, Imbalance]:
    """The relative drift on data that was held out, at both ends of the way; empty without such data."""
    if not batches:
        return {}
    unused = measurement.on(batches)
    try:
        before, after = (_imbalances(unused, point.params, settings) for point in (start, end))
    except NonFiniteError as error:
        raise NonFiniteError(f"holdout, {error}") from error
    return {name: Imbalance(before[name], after[name]) for name in before}


def _imbalances(measurement: Measurement, params: Params, settings: Optimizer) -> dict[str, float]:
    """The relative drift of every symmetry, measured at a point."""
    residuals = Blocks.of(params, minibatches(measurement.at(params), settings)).residuals()
    return {name: residual.imbalance for name, residual in residuals.items()}

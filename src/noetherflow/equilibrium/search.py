"""The search for the equilibrium of a model: what is prepared before the descent, and measured after it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noetherflow._batch import cast, peek
from noetherflow._dtype import working_dtype
from noetherflow._errors import SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._optimizers import SGD, require_settings
from noetherflow._params import aliases, snapshot
from noetherflow._per_example import own_randomness, require_uncoupled
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow._verify import Residual
from noetherflow.detect.find import explain, warn_of_rejected
from noetherflow.equilibrium.blocks import Blocks
from noetherflow.equilibrium.descent import Descent
from noetherflow.equilibrium.result import Equilibrium, Imbalance
from noetherflow.equilibrium.standard_errors import standard_errors
from noetherflow.noise import NoiseMoments
from noetherflow.noise.measurement import Measurement
from noetherflow.symmetry import Symmetry

# Relative differences of forces that are rounding, by the type in which gradients are computed.
_ROUNDING = {torch.float64: 1e-12}
_COARSE = 1e-5


@final
@dataclass(frozen=True)
class Options:
    """The keyword arguments of `equilibrate`, checked."""

    tolerance: float
    max_passes: int
    microbatches: bool
    holdout: Iterable[Batch] | None
    dtype: torch.dtype | None
    max_bytes: int
    progress: bool

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or self.max_passes < 2:
            raise SettingsError(
                f"tolerance must lie between 0 and 1 and max_passes be 2 or more, got tolerance={self.tolerance}, "
                f"max_passes={self.max_passes}"
            )


class Search(NamedTuple):
    """The equilibrium, with the first batch, the noise and the parameters at the start, and residuals of the finder.

    The weight decay of the settings has the names of the parameters.
    """

    first: Batch
    equilibrium: Equilibrium
    noise: NoiseMoments
    initial: dict[str, Tensor]
    residuals: dict[str, Residual]
    sgd: SGD


def search(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    sgd: SGD,
    symmetries: Mapping[str, Symmetry] | None,
    options: Options,
) -> Search:
    """Find the equilibrium of a copy of a model; see `equilibrate`."""
    aliases(model)  # raises unless the model is a module
    sgd = require_settings(sgd, model)
    if not options.microbatches:
        require_uncoupled(model)
    # The data is read once: a loader may yield other examples the next time.
    batches = list(loader)
    first, _ = peek(batches)
    working = working_dtype(model, loss, first, options.dtype)
    notes = [working.note] if working.note else []
    notes += _running_statistics(model)
    residuals: dict[str, Residual] = {}
    if symmetries is None:
        symmetries, residuals, unreached = _detected(model, loss, first, working.dtype, options.progress)
        notes += unreached
    measurement = Measurement(
        model,
        loss,
        batches,
        symmetries,
        dtype=working.dtype,
        microbatches=options.microbatches,
        max_bytes=options.max_bytes,
    )
    initial = snapshot(model)
    rounding = _ROUNDING.get(working.dtype, _COARSE)
    descent = Descent(measurement, initial, sgd, rounding, options.progress)
    course = descent.run(options.tolerance, options.max_passes)
    start, end, outcomes, _ = course
    holdout = {}
    if options.holdout is not None:
        unused = measurement.on(list(options.holdout))
        before, after = (_imbalances(unused, point.params, sgd) for point in (start, end))
        holdout = {name: Imbalance(before[name], after[name]) for name in outcomes}
    equilibrium = Equilibrium(
        params=end.params,
        coordinates=end.coordinates,
        outcomes=outcomes,
        drift={name: end.residuals[name].drift for name in outcomes},
        relaxation_steps={name: end.minimum.relaxation[name] / sgd.effective_lr for name in outcomes},
        potential_before=start.potential,
        potential_after=end.potential,
        trace_before=start.trace,
        trace_after=end.trace,
        iterations=end.minimum.iterations,
        symmetries=measurement.symmetries,
        passes=descent.passes,
        standard_error=standard_errors(measurement, course, sgd, progress=options.progress),
        imbalance={n: Imbalance(start.residuals[n].imbalance, end.residuals[n].imbalance) for n in outcomes},
        holdout=holdout,
        notes=tuple(notes),
    )
    return Search(first, equilibrium, start.noise, initial, residuals, sgd)


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
    model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype, progress: bool
) -> tuple[dict[str, Symmetry], dict[str, Residual], list[str]]:
    """The symmetries of the graph without those of parameters that no gradient reaches, residuals, and notes."""
    for _ in track(range(1), "symmetries", total=1, shown=progress):
        explanation = explain(model, loss, batch, dtype=dtype)
    warn_of_rejected(explanation)
    function = ModelFunction(model, loss, dtype)
    device = next(model.parameters()).device
    with own_randomness(device):
        unreached = set(function.unreached(function.trained, cast(batch, dtype, device)))
    kept: dict[str, Symmetry] = {}
    notes = []
    if unreached:
        notes.append(f"left out, because no gradient of the loss reaches them: {', '.join(sorted(unreached))}")
    for name, symmetry in explanation.symmetries.items():
        if unreached.isdisjoint(symmetry.names):
            kept[name] = symmetry
    if not kept:
        notes.append("no symmetry was detected: nothing has to be brought to rest")
    residuals = {finding.name: finding.residual for finding in explanation.found if finding.name in kept}
    return kept, residuals, notes


def _imbalances(measurement: Measurement, params: Params, sgd: SGD) -> dict[str, float]:
    """The relative drift of every symmetry, measured at a point."""
    residuals = Blocks.of(params, measurement.at(params), sgd).residuals()
    return {name: residual.imbalance for name, residual in residuals.items()}

"""The public function `analyze`: symmetries, noise, drift and equilibrium of a model in one call."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from noetherflow._analysis import Analysis, SymmetryReport
from noetherflow._batch import cast
from noetherflow._drift import drift
from noetherflow._dtype import working_dtype
from noetherflow._errors import NotASymmetryError
from noetherflow._forces import conserved_charge
from noetherflow._minibatch import minibatches
from noetherflow._params import copy_of
from noetherflow._precision import TOLERANCES
from noetherflow._rebalance import rebalance_
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual
from noetherflow.detect.proof import prove
from noetherflow.equilibrium.result import Imbalance, median_and_slowest, root_mean_square
from noetherflow.equilibrium.search import Options, Search, search
from noetherflow.noise import NoiseMoments
from noetherflow.noise.table import halves, total
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Grams, Symmetry

# Largest residual of a declared symmetry. That of an exact symmetry is about 1e-14 in float64.
_EXACT = 1e-9


def analyze(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    settings: Optimizer,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    tolerance: float = 1e-6,
    max_passes: int = 40,
    microbatches: bool = False,
    holdout: Iterable[Batch] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
) -> Analysis:
    r"""Verify the symmetries of a model, measure their gradient noise, and compute their equilibrium.

    Args:
        model: The model, in the mode (train or eval) in which it trains; it is not changed. The analysis runs on a
            copy.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: The training data in batches, which are kept in memory: every measurement is of the same examples.
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        symmetries: Symmetries by name; None finds them from the graph of the loss of the first batch.
        tolerance: See `equilibrate`, as for all further options.
        max_passes: The largest number of measurements on the way to the equilibrium.
        microbatches: Measure the noise between batches instead of between examples.
        holdout: Batches that are not used, to see how far the equilibrium carries over.
        dtype: Floating-point type of the gradients.
        max_bytes: Memory that the search may take; None sets no limit.
        progress: Show a progress bar on a terminal.

    Returns:
        The analysis. A symmetry without an equilibrium is a row with a status, not an error. `print` shows it as a
        table; `save` and `save_json` write it to a file.

    Raises:
        EmptyDataError: If the loader yields no batch.
        NotASymmetryError: If a declared symmetry changes the loss of an example.
        SettingsError: If the settings say nothing of a parameter on which a symmetry acts.
        NoetherflowError: For bad input, as `estimate_noise` does.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> nf.analyze(net, loss, batches, nf.SGD(lr=0.1, batch_size=8)).reports[0].dimension
        3

    Source: Ziyin et al. (2024).
    """
    options = Options(tolerance, max_passes, microbatches, holdout, dtype, max_bytes, progress, keep_noise=True)
    result = search(model, loss, loader, settings, symmetries, options)
    noise = result.noise
    assert noise is not None  # as asked for
    # The noise is measured before declared symmetries are proved, because its errors name the batch with bad data.
    declared = noise.symmetries if symmetries is not None else {}
    residuals = result.residuals | _proved(model, loss, result.first, declared, dtype)
    rates = drift(noise, result.settings, result.initial)
    reports = tuple(_report(name, residuals[name], rates[name], noise, result) for name in noise.symmetries)
    return Analysis(reports, result.equilibrium, noise, result.settings, result.initial)


def _proved(
    model: nn.Module, loss: Loss, batch: Batch, symmetries: Mapping[str, Symmetry], dtype: torch.dtype | None
) -> dict[str, Residual]:
    """Residuals of declared symmetries; raises `NotASymmetryError` if a residual is more than rounding."""
    if not symmetries:
        return {}
    proofs = prove(list(symmetries.values()), model, loss, batch, dtype=dtype)
    residuals = dict(zip(symmetries, proofs, strict=True))
    for name, residual in residuals.items():
        limit = max(_EXACT, TOLERANCES[residual.precision].proof)
        if not residual <= limit:
            raise NotASymmetryError(
                f"{name!r} is not a symmetry: a finite transformation changes the loss of example {residual.example} "
                f"of the first batch, relative change {residual.loss:.2e}, gradient along the orbit "
                f"{residual.gradient:.2e}, expected below {limit:.0e}"
            )
    return residuals


def rebalanced_copy(model: nn.Module, analysis: Analysis, loss: Loss, batch: Batch) -> nn.Module:
    """A copy of a model at its equilibrium, moved in float64 if the loss allows, and converted back to its dtype."""
    first = next(model.parameters())
    working = working_dtype(model, loss, batch).dtype
    copied = copy_of(model, working)
    rebalance_(copied, analysis.equilibrium, loss, cast(batch, working, first.device))
    return copied.to(first.dtype)


def _report(name: str, residual: Residual, rate: Tensor, noise: NoiseMoments, result: Search) -> SymmetryReport:
    """The report of a symmetry, from the results for all symmetries."""
    equilibrium, params = result.equilibrium, result.initial
    symmetry = equilibrium.symmetries[name]
    noise_plus, noise_minus = halves(symmetry, Grams(*(side / noise.count for side in noise.scatter[name])))
    noise_error = noise.spreads[name].standard_errors(noise.count).net
    median, slowest = median_and_slowest(equilibrium.relaxation_steps[name])
    outcome, imbalance = equilibrium.outcomes[name], equilibrium.imbalance[name]
    holdout = equilibrium.holdout.get(name, Imbalance(float("nan"), float("nan")))
    charge = conserved_charge(name, params, minibatches(noise, result.settings))
    distance = root_mean_square(equilibrium.coordinates[name])
    error = root_mean_square(equilibrium.standard_error[name])
    return SymmetryReport(
        name=name,
        kind=symmetry.label,
        dimension=symmetry.dimension(params),
        residual=float(residual),
        charge=float(total(charge.value)),
        noise_plus=float(noise_plus),
        noise_minus=float(noise_minus),
        noise_error=float(noise_error.square().sum().sqrt()),
        drift=root_mean_square(rate) * charge.per_step,
        distance=distance,
        relaxation_steps=median,
        slowest_steps=slowest,
        status=outcome.status.name.lower(),
        message=outcome.message,
        error=error,
        at_rest=equilibrium.at_rest[name],
        imbalance_before=imbalance.before,
        imbalance_after=imbalance.after,
        holdout_before=holdout.before,
        holdout_after=holdout.after,
    )

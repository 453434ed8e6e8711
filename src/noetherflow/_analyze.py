"""The public function `analyze`: symmetries, noise, drift and equilibrium of a model in one call."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from noetherflow._analysis import Analysis, SymmetryReport
from noetherflow._batch import cast, peek
from noetherflow._drift import drift
from noetherflow._errors import NotASymmetryError
from noetherflow._optimizers import SGD
from noetherflow._params import copy_of, snapshot
from noetherflow._rebalance import rebalance_
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual, verify_symmetry
from noetherflow.detect.find import explain, warn_of_rejected
from noetherflow.equilibrium import Equilibrium, equilibrate, solve_equilibrium
from noetherflow.equilibrium.result import median_and_slowest, root_mean_square
from noetherflow.equilibrium.solve import is_determined
from noetherflow.noise import NoiseMoments, estimate_noise
from noetherflow.noise.table import halves, total
from noetherflow.symmetry import Symmetry

# Largest residual of a declared symmetry. That of an exact symmetry is about 1e-14 in float64.
_EXACT = 1e-9


def analyze(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    sgd: SGD,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    progress: bool = True,
) -> Analysis:
    r"""Verify the symmetries of a model, measure their gradient noise, and compute their equilibrium under SGD.

    Args:
        model: The model, in the mode (train or eval) in which it trains; it is not changed. The analysis runs in
            float64 on a copy.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: The training data in batches. Kept in memory only if it is an iterator, or where `equilibrate` reads it.
        sgd: The settings of training.
        symmetries: Symmetries by name; None finds them from the graph of the loss of the first batch.
        progress: Show a progress bar on a terminal.

    Returns:
        The analysis. `print` shows it as a table; `save` and `save_json` write it to a file.

    Raises:
        EmptyDataError: If the loader yields no batch.
        NotASymmetryError: If a declared symmetry changes the loss of an example.
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
    first, loader = peek(loader)
    # Only an iterator, which cannot be gone through again, is kept in memory here: there may be more data than memory.
    batches = list(loader) if iter(loader) is loader else loader
    residuals: dict[str, Residual] = {}
    if symmetries is None:
        explanation = explain(model, loss, first)
        warn_of_rejected(explanation)
        symmetries = explanation.symmetries
        residuals = {finding.name: finding.residual for finding in explanation.found}
    # The noise is measured before declared symmetries are verified, because its errors name the batch with bad data.
    noise = estimate_noise(model, loss, batches, symmetries, dtype=torch.float64, progress=progress)
    for name, symmetry in symmetries.items():
        if name not in residuals:
            residuals[name] = _verified(model, loss, first, name, symmetry)
    initial = snapshot(model)
    if is_determined(noise, sgd, initial):
        equilibrium = solve_equilibrium(noise, sgd, initial)
    else:
        equilibrium = equilibrate(model, loss, batches, sgd, symmetries, progress=progress)
    rates = drift(noise, sgd, initial)
    reports = tuple(
        _report(name, residuals[name], rates[name], initial, noise, equilibrium, sgd) for name in symmetries
    )
    return Analysis(reports, equilibrium, noise, sgd, initial)


def _verified(model: nn.Module, loss: Loss, batch: Batch, name: str, symmetry: Symmetry) -> Residual:
    """The residual of a declared symmetry; raises `NotASymmetryError` if the residual is more than rounding."""
    residual = verify_symmetry(model, loss, batch, symmetry)
    if not residual <= _EXACT:
        raise NotASymmetryError(
            f"{name!r} is not a symmetry: a finite transformation changes the loss of example {residual.example} of "
            f"the first batch, relative change {residual.loss:.2e}, gradient along the orbit {residual.gradient:.2e}, "
            f"expected below {_EXACT:.0e}"
        )
    return residual


def rebalanced_copy(model: nn.Module, analysis: Analysis, loss: Loss, batch: Batch) -> nn.Module:
    """A copy of a model at its equilibrium, moved and checked in float64, and converted back to the model's dtype."""
    dtype = next(model.parameters()).dtype
    copied = copy_of(model, torch.float64)
    device = next(model.parameters()).device
    rebalance_(copied, analysis.equilibrium, loss, cast(batch, torch.float64, device))
    return copied.to(dtype)


def _report(
    name: str,
    residual: Residual,
    rate: Tensor,
    params: Mapping[str, Tensor],
    noise: NoiseMoments,
    equilibrium: Equilibrium,
    sgd: SGD,
) -> SymmetryReport:
    """The report of a symmetry, from the results for all symmetries."""
    symmetry = equilibrium.symmetries[name]
    noise_plus, noise_minus = halves(symmetry, noise.grams[name])
    median, slowest = median_and_slowest(equilibrium.relaxation_steps[name])
    outcome = equilibrium.outcomes[name]
    return SymmetryReport(
        name=name,
        kind=symmetry.label,
        dimension=symmetry.dimension(params),
        residual=float(residual),
        charge=float(total(symmetry.charge(params))),
        noise_plus=float(noise_plus),
        noise_minus=float(noise_minus),
        noise_error=float(noise.standard_errors[name].net.square().sum().sqrt()),
        drift=root_mean_square(rate) * sgd.effective_lr,
        distance=equilibrium.distance[name],
        relaxation_steps=median,
        slowest_steps=slowest,
        status=outcome.status.name.lower(),
        message=outcome.message,
        error=equilibrium.error[name],
        at_rest=equilibrium.at_rest[name],
        imbalance_before=equilibrium.imbalance[name].before,
        imbalance_after=equilibrium.imbalance[name].after,
        holdout_before=equilibrium.holdout[name].before if equilibrium.holdout else float("nan"),
        holdout_after=equilibrium.holdout[name].after if equilibrium.holdout else float("nan"),
    )

"""Everything about a model's symmetries under SGD, in one call."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow import _files, _versions
from noetherflow._batch import cast, peek
from noetherflow._drift import drift
from noetherflow._errors import NotASymmetryError
from noetherflow._optimizers import SGD
from noetherflow._params import copy_of, snapshot
from noetherflow._rebalance import rebalance_
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual, verify_symmetry
from noetherflow.detect.find import explain, warn_of_rejected
from noetherflow.equilibrium import Equilibrium, solve_equilibrium
from noetherflow.noise import NoiseMoments, estimate_noise
from noetherflow.symmetry import Symmetry

# An exact symmetry leaves about 1e-14 in float64.
_EXACT = 1e-9


@final
@dataclass(frozen=True)
class SymmetryReport:
    """One row of the table: what SGD does to one symmetry.

    Args:
        name: The name it was given.
        kind: The word for its class, such as `diagonal`.
        dimension: Number of independent generators.
        residual: Largest relative change of any example's loss; see `verify_symmetry`.
        charge: The charge, all coordinates added.
        noise_plus: Gradient noise on the plus side, per example.
        noise_minus: Gradient noise on the minus side, per example.
        noise_error: Standard error of the difference of the two.
        drift: Root mean square over coordinates of the charge's drift, per SGD step.
        distance: Root mean square over coordinates of log-scale x to the equilibrium: weights are e^{x} off.
        relaxation_steps: SGD steps in which a departure shrinks by e: the median over coordinates.
        slowest_steps: The same for the slowest coordinate that has an equilibrium.
        status: How the search for the equilibrium ended.
        message: What it left alone and why.

    Examples:
        >>> import noetherflow as nf
        >>> nf.SymmetryReport.__dataclass_fields__["drift"].name
        'drift'
    """

    name: str
    kind: str
    dimension: int
    residual: float
    charge: float
    noise_plus: float
    noise_minus: float
    noise_error: float
    drift: float
    distance: float
    relaxation_steps: float
    slowest_steps: float
    status: str
    message: str


@final
@dataclass(frozen=True)
class Analysis:
    """What `analyze` found: one report per symmetry, totals, and all that is needed to look further.

    Args:
        reports: One per symmetry.
        equilibrium: Where SGD takes the model.
        noise: The measured moments.
        sgd: The settings.
        initial: The parameters as they were, float64.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> analysis = nf.analyze(net, loss, batches, nf.SGD(lr=0.1, batch_size=8))
        >>> analysis.to_json()["totals"]["noise_trace_ratio"] < 1
        True
    """

    reports: tuple[SymmetryReport, ...]
    equilibrium: Equilibrium
    noise: NoiseMoments
    sgd: SGD
    initial: dict[str, Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything in the table, with settings and versions, as plain JSON types; infinities become null."""
        equilibrium = self.equilibrium
        return _files.finite(
            {
                "settings": asdict(self.sgd) | {"gamma": self.sgd.gamma, "temperature": self.sgd.temperature},
                "examples": self.noise.count,
                "symmetries": [asdict(report) for report in self.reports],
                "totals": {
                    "noise_trace_before": equilibrium.trace_before,
                    "noise_trace_after": equilibrium.trace_after,
                    "noise_trace_ratio": equilibrium.trace_after / equilibrium.trace_before,
                    "potential_before": equilibrium.potential_before,
                    "potential_after": equilibrium.potential_after,
                    "newton_steps": equilibrium.iterations,
                    "status": equilibrium.status.name.lower(),
                },
                "versions": _versions.versions(),
            }
        )

    def save_json(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        _files.write_json(path, self.to_json())


def analyze(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    sgd: SGD,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    progress: bool = True,
) -> Analysis:
    r"""Verify the symmetries of a model, measure their gradient noise, and find where SGD takes them.

    Args:
        model: The model, in the mode in which it trains; it is not changed. The analysis runs in float64 on a copy.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: The training data in batches, gone through once.
        sgd: The settings it trains with.
        symmetries: By name; None to find them, on the first batch.
        progress: Show a progress bar on a terminal.

    Returns:
        The analysis: print it with `noetherflow.report.table.render`, or write it with `save_json`.

    Raises:
        EmptyDataError: If the loader yields nothing.
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
    residuals: dict[str, Residual] = {}
    if symmetries is None:
        explanation = explain(model, loss, first)
        warn_of_rejected(explanation)
        symmetries = explanation.symmetries
        residuals = {finding.name: finding.residual for finding in explanation.found}
    # The noise before the proof of declared symmetries: it names bad data batch by batch.
    noise = estimate_noise(model, loss, loader, symmetries, dtype=torch.float64, progress=progress)
    for name in symmetries.keys() - residuals.keys():
        residuals[name] = _proved(model, loss, first, name, symmetries[name])
    initial = snapshot(model)
    equilibrium = solve_equilibrium(noise, sgd, initial)
    rates = drift(noise, sgd, initial)
    reports = tuple(
        _report(name, residuals[name], rates[name], initial, noise, equilibrium, sgd) for name in symmetries
    )
    return Analysis(reports, equilibrium, noise, sgd, initial)


def _proved(model: nn.Module, loss: Loss, batch: Batch, name: str, symmetry: Symmetry) -> Residual:
    """The residual of a declared symmetry; raises if it is not one."""
    residual = verify_symmetry(model, loss, batch, symmetry)
    if not residual <= _EXACT:
        raise NotASymmetryError(
            f"{name!r} is not a symmetry: a finite transformation changes the loss of example {residual.example} of "
            f"the first batch, relative change {residual.loss:.2e}, gradient along the orbit {residual.gradient:.2e}, "
            f"expected below {_EXACT:.0e}"
        )
    return residual


def rebalanced_copy(model: nn.Module, analysis: Analysis, loss: Loss, batch: Batch) -> nn.Module:
    """A copy of a model at its equilibrium, moved and checked in float64, and brought back to its own dtype."""
    dtype = next(model.parameters()).dtype
    wide = copy_of(model, torch.float64)
    device = next(model.parameters()).device
    rebalance_(wide, analysis.equilibrium, loss, cast(batch, torch.float64, device))
    return wide.to(dtype)


def _report(
    name: str,
    residual: Residual,
    rate: Tensor,
    params: Mapping[str, Tensor],
    noise: NoiseMoments,
    equilibrium: Equilibrium,
    sgd: SGD,
) -> SymmetryReport:
    symmetry = equilibrium.symmetries[name]
    sides = noise.grams[name]
    times = equilibrium.relaxation_steps[name].reshape(-1)
    finite = times[torch.isfinite(times)]
    outcome = equilibrium.outcomes[name]
    return SymmetryReport(
        name=name,
        kind=symmetry.label,
        dimension=symmetry.dimension(params),
        residual=float(residual),
        charge=_total(symmetry.charge(params)),
        noise_plus=_total(sides.plus),
        noise_minus=_total(sides.minus),
        noise_error=float(noise.standard_errors[name].net.square().sum().sqrt()),
        drift=_rms(rate) * sgd.effective_lr,
        distance=_rms(equilibrium.coordinates[name]),
        relaxation_steps=float(finite.median()) if len(finite) else float("inf"),
        slowest_steps=float(finite.max()) if len(finite) else float("inf"),
        status=outcome.status.name.lower(),
        message=outcome.message,
    )


def _total(coordinates: Tensor) -> float:
    """A number, the sum of a vector, the trace of a matrix."""
    return float(coordinates.trace() if coordinates.ndim == 2 else coordinates.sum())


def _rms(coordinates: Tensor) -> float:
    """Root mean square over coordinates, or over the eigenvalues of a matrix."""
    rows = coordinates.shape[0] if coordinates.ndim else 1
    return float((coordinates.square().sum() / rows).sqrt())

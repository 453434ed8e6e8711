"""The result of `analyze`: as values, as a table, as files."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, final

from torch import Tensor

from noetherflow import _files, _store, _versions
from noetherflow._errors import ParameterShapeError
from noetherflow._falling import remarks
from noetherflow._table import Column, Table, html_of, known, starred, steps, text_of
from noetherflow.equilibrium.result import NOWHERE, Equilibrium, Status, ratio, totals
from noetherflow.equilibrium.result import require_consistent as require_consistent_equilibrium
from noetherflow.noise import NoiseMoments
from noetherflow.noise.consistency import require_consistent as require_consistent_noise
from noetherflow.optimizers import Optimizer


@final
@dataclass(frozen=True)
class SymmetryReport:
    """The effect of the optimizer on a symmetry: a row of the table.

    Args:
        name: The name of the symmetry.
        kind: The word for its class, such as `diagonal`.
        dimension: Number of independent generators.
        residual: The larger of the relative change of a loss and the cosine between the gradient of an example and the
            direction of motion, the largest over examples; dimensionless. See `verify_symmetry`.
        charge: The charge, summed over coordinates.
        noise_plus: Gradient noise on the plus side, per example, summed over coordinates.
        noise_minus: Gradient noise on the minus side, per example, summed over coordinates.
        noise_error: Standard error of `noise_plus - noise_minus`.
        drift: Change of the charge per step, root mean square over coordinates.
        distance: Root mean square over coordinates of x, where weights have to change by the factor e^{x} to reach the
            equilibrium.
        relaxation_steps: steps in which the distance shrinks by the factor e, median over coordinates.
        slowest_steps: steps in which the distance shrinks by the factor e, for the slowest coordinate that has an
            equilibrium.
        status: How the search for the equilibrium ended.
        message: The coordinates without an equilibrium, and the reason; empty if there are none.
        error: Standard error of the distance; NaN where nothing is known.
        at_rest: Whether the distance is below two standard errors, and every direction has an equilibrium.
        imbalance_before: The relative drift |P - R| / |P + R| where the model is; see `Imbalance`.
        imbalance_after: The relative drift at the equilibrium, measured on the data that was used.
        holdout_before: The relative drift where the model is, on data that was held out; NaN without such data.
        holdout_after: The relative drift at the equilibrium, on data that was held out.

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
    error: float
    at_rest: bool
    imbalance_before: float
    imbalance_after: float
    holdout_before: float
    holdout_after: float


@final
@dataclass(frozen=True)
class Analysis:
    """The result of `analyze`: a report per symmetry, and the results from which the reports are made.

    Args:
        reports: One report per symmetry.
        equilibrium: The point to which the optimizer drives the model.
        noise: The moments of the gradients.
        settings: The settings of the optimizer.
        initial: The parameters before any motion, by name, float64.

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
    settings: Optimizer
    initial: dict[str, Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """All numbers of the table, settings and versions as JSON types; NaN and infinities become null."""
        equilibrium = self.equilibrium
        return _files.finite(
            {
                "settings": self.settings.listed,
                "examples": self.noise.count,
                "symmetries": [asdict(report) for report in self.reports],
                "totals": {
                    "noise_trace_before": equilibrium.trace_before,
                    "noise_trace_after": equilibrium.trace_after,
                    "noise_trace_ratio": ratio(equilibrium.trace_after, equilibrium.trace_before),
                    "potential_before": equilibrium.potential_before,
                    "potential_after": equilibrium.potential_after,
                    "newton_steps": equilibrium.iterations,
                    "passes": equilibrium.passes,
                    "status": equilibrium.status.name.lower(),
                },
                "notes": list(equilibrium.notes),
                "versions": _versions.versions(),
            }
        )

    def save_json(self, path: str | Path) -> None:
        """Write `to_json()` to a file, completely or not at all."""
        _files.write_json(path, self.to_json())

    def save(self, path: str | Path) -> None:
        """Write the analysis to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by convention `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Analysis":
        """Read an analysis that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The analysis, on the CPU.

        Raises:
            FileError: If the file is missing, damaged, or holds a result of a different class.
        """
        return _store.load(cls, path, _require_consistent)

    def __str__(self) -> str:
        return text_of(_tables(self))

    def _repr_html_(self) -> str:
        return html_of(_tables(self))


# Heading, explanation below the table, and text of the cell.
_COLUMNS: tuple[tuple[str, str, Callable[[SymmetryReport], str]], ...] = (
    ("size", "independent generators", lambda r: str(r.dimension)),
    (
        "resid",
        "residual: the larger of the relative change of a loss and the cosine of\n"
        "a gradient with the direction of motion; the largest over examples",
        lambda r: f"{r.residual:.0e}",
    ),
    (
        "charge",
        "squared weights on the plus side minus those on the minus side, each over\n"
        "its step size unless all parameters share a learning rate",
        lambda r: f"{r.charge:+.3g}",
    ),
    ("noise+", "gradient noise on the plus side, per example", lambda r: f"{r.noise_plus:.3g}"),
    ("noise-", "gradient noise on the minus side, per example", lambda r: f"{r.noise_minus:.3g}"),
    ("drift", "change of the charge per step, rms over coordinates", lambda r: known(r.drift, ".1e")),
    (
        "dist",
        "distance, rms of x; weights are a factor e^x from the equilibrium",
        lambda r: _of_equilibrium(r, known(r.distance, ".3f")),
    ),
    (
        "error",
        "standard error of the distance, for another sample of as many examples",
        lambda r: _of_equilibrium(r, known(r.error, ".3f")),
    ),
    (
        "steps",
        "median relaxation time: steps in which a departure shrinks by e",
        lambda r: _of_equilibrium(r, steps(r.relaxation_steps)),
    ),
)
_UNKNOWN = ("-", "not known: the symmetry has no equilibrium, or the number was not measured")


def _of_equilibrium(report: SymmetryReport, cell: str) -> str:
    """A cell about the equilibrium of a symmetry: `-` if the symmetry has no equilibrium, as without a charge."""
    return "-" if Status[report.status.upper()] in NOWHERE else cell


def _tables(analysis: Analysis) -> tuple[Table, ...]:
    """A row per symmetry, with notes on coordinates without an equilibrium; the totals; the legend."""
    columns = (Column("symmetry", folds=True), *(Column(heading, right=True) for heading, _, _ in _COLUMNS))
    # A star refers to the note below the table.
    rows = tuple((r.name + "*" * bool(r.message), *(cell(r) for _, _, cell in _COLUMNS)) for r in analysis.reports)
    notes = starred((report.name, report.message) for report in analysis.reports)
    notes += analysis.equilibrium.notes
    if any(math.isfinite(report.relaxation_steps) for report in analysis.reports):
        notes += remarks(analysis.noise, analysis.settings, analysis.initial)
    notes += filter(None, [held_out(analysis)])
    legend = tuple((heading, meaning) for heading, meaning, _ in _COLUMNS)
    legend += (_UNKNOWN,) * any("-" in row for row in rows)
    return (
        Table(f"Symmetries under {type(analysis.settings).__name__}", columns, rows, tuple(notes)),
        totals(analysis.equilibrium, f"{analysis.noise.count} examples"),
        Table("", (Column("", right=True), Column("", folds=True)), legend),
    )


def held_out(analysis: Analysis) -> str:
    """The drift that is left on data that was not used; empty without such data."""
    if not analysis.equilibrium.holdout:
        return ""
    sides = ("imbalance_before", "imbalance_after", "holdout_before", "holdout_after")
    medians = [_median(getattr(report, side) for report in analysis.reports) for side in sides]
    used, rested, held, carried = ("-" if math.isnan(value) else f"{value:.3g}" for value in medians)
    return (
        f"The relative drift (0 is rest, 1 is a force without a counterforce) changes from {used} to {rested} on the "
        f"data that was used, and from {held} to {carried} on data that was held out; medians over symmetries. The "
        "numbers on held-out data say what to expect of new data"
    )


def _median(values: Iterator[float]) -> float:
    """The median of the values that are numbers; NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return median(numbers) if numbers else math.nan


def _require_consistent(analysis: Analysis) -> None:
    """Raise unless the parts of an analysis from a file belong together."""
    require_consistent_noise(analysis.noise)
    require_consistent_equilibrium(analysis.equilibrium)
    names = [report.name for report in analysis.reports]
    if not set(names) == analysis.noise.symmetries.keys() == analysis.equilibrium.symmetries.keys():
        raise ParameterShapeError(f"the reports {names} are not those of the symmetries {[*analysis.noise.symmetries]}")
    shapes, expected = ({n: t.shape for n, t in p.items()} for p in (analysis.initial, analysis.equilibrium.params))
    if shapes != expected:
        raise ParameterShapeError(f"the parameters have the shapes {shapes} now and {expected} at the equilibrium")

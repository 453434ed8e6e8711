"""The noise scale as a table."""

from typing import TYPE_CHECKING

from noetherflow._table import Column, Table
from noetherflow.watching.estimate import ScaleEstimate

if TYPE_CHECKING:
    from noetherflow.watching.noise_scale import NoiseScale

_LEGEND = (
    ("Tr Sigma", "gradient noise, per example"),
    ("|G|^2", "squared norm of the mean gradient, unbiased: negative where the noise hides it"),
    ("scale", "noise scale Tr Sigma / |G|^2, in examples: the critical batch size of the model of McCandlish et al."),
    ("low, high", "confidence interval; without an upper end where |G|^2 cannot be told from zero"),
)


def tables_of(watch: "NoiseScale") -> tuple[Table, ...]:
    """The estimates of all parameters, of parameter groups and of layers, and the legend."""
    headings = ("Tr Sigma", "|G|^2", "scale", "low", "high")
    columns = (Column("parameters", folds=True), *(Column(heading, right=True) for heading in headings))
    estimates = {"all": watch.estimate}
    if watch.preconditioned is not None:
        estimates["all, in the optimizer's metric"] = watch.preconditioned
    estimates |= watch.groups | watch.layers
    notes = []
    if watch.unmeasured:
        notes.append(f"Not measured, and left out: {', '.join(watch.unmeasured)}")
    if watch.skipped:
        notes.append(f"{watch.skipped} measured steps were left out: an overflow, or noise that rounding hides")
    title = f"Noise scale ({watch.estimate.steps} of {watch.steps} steps measured)"
    rows = tuple((name, *_cells(estimate)) for name, estimate in estimates.items())
    legend = Table("", (Column("", right=True), Column("", folds=True)), _LEGEND)
    return Table(title, columns, rows, tuple(notes)), legend


def _cells(estimate: ScaleEstimate) -> tuple[str, ...]:
    scale = f"{estimate.scale:,.4g}" if estimate.norm_sq > 0 else "-"
    high = f"{estimate.high:,.3g}" if estimate.bounded else "unbounded"
    return f"{estimate.trace:.3g}", f"{estimate.norm_sq:+.3g}", scale, f"{estimate.low:,.3g}", high

"""The analysis as a table for the terminal."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from noetherflow._analyze import Analysis, SymmetryReport

# Heading, explanation under the table, and what stands in the cell.
_COLUMNS: tuple[tuple[str, str, Callable[[SymmetryReport], str]], ...] = (
    ("size", "independent generators", lambda r: str(r.dimension)),
    ("resid", "residual: largest relative change of any example's loss", lambda r: f"{r.residual:.0e}"),
    ("charge", "squared weights on the plus side less those on the minus side", lambda r: f"{r.charge:+.3g}"),
    ("noise+", "gradient noise on the plus side, per example", lambda r: f"{r.noise_plus:.3g}"),
    ("noise-", "and on the minus side", lambda r: f"{r.noise_minus:.3g}"),
    ("drift", "of the charge per step, rms over coordinates", lambda r: f"{r.drift:.1e}"),
    ("dist", "distance, rms of x; weights are a factor e^x from the equilibrium", lambda r: f"{r.distance:.3f}"),
    ("steps", "median relaxation time: steps in which a departure shrinks by e", lambda r: steps(r.relaxation_steps)),
)


_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "header_style": "bold",
    "box": SIMPLE_HEAD,
    "pad_edge": False,
    "padding": (0, 1, 0, 0),
}


def render(analysis: Analysis) -> Group:
    """A rich table with a row per symmetry, the totals, and notes on what has no equilibrium."""
    table = Table(title="Symmetries under SGD", **_STYLE)
    table.add_column("symmetry", overflow="fold", min_width=14)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for report in analysis.reports:
        # A star points to the note below.
        table.add_row(report.name + "*" * bool(report.message), *(cell(report) for _, _, cell in _COLUMNS))
    return Group(table, *_notes(analysis), _totals(analysis), *_legend())


def steps(count: float) -> str:
    """A number of steps as people write it."""
    return f"{count:,.0f}" if count < 1e7 else "never" if count == float("inf") else f"{count:.1e}"


def _totals(analysis: Analysis) -> Table:
    equilibrium = analysis.equilibrium
    title = f"The whole model ({analysis.noise.count} examples, {equilibrium.iterations} Newton steps)"
    table = Table(title=title, **_STYLE)
    for heading in ("total", "now", "equilibrium", "ratio"):
        table.add_column(heading, justify="left" if heading == "total" else "right", no_wrap=True)
    pairs = (
        ("gradient noise, Tr Sigma per example", equilibrium.trace_before, equilibrium.trace_after),
        ("potential, decay and noise together", equilibrium.potential_before, equilibrium.potential_after),
    )
    for name, before, after in pairs:
        table.add_row(name, f"{before:.6g}", f"{after:.6g}", f"{after / before:.4f}")
    return table


def _notes(analysis: Analysis) -> list[Text]:
    return [Text(f"* {report.name}: {report.message}", style="yellow") for report in analysis.reports if report.message]


def _legend() -> list[Text]:
    return [Text(f"{heading:>6}  {meaning}", style="dim") for heading, meaning, _ in _COLUMNS]

"""An analysis as a figure of three panels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from noetherflow import _files
from noetherflow._analysis import Analysis
from noetherflow._extras import require
from noetherflow._forces import forces, has_charge
from noetherflow._minibatch import minibatches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"
# Symmetries that the legend names; a longer legend would leave no room for the panels.
_NAMED = 8


def draw(analysis: Analysis) -> "Figure":
    """A figure with P against R of every coordinate, the distance x of every coordinate, and the ratios of totals.

    Returns:
        The figure.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("report", "matplotlib", purpose="the figure of an analysis")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    balance, distance, totals = figure.subplots(1, 3, width_ratios=(4, 4, 2))
    _draw_balance(analysis, balance)
    _draw_distance(analysis, distance)
    _draw_totals(analysis, totals)
    return figure


def save(analysis: Analysis, stem: Path) -> list[Path]:
    """Write the figure to `stem.png` and `stem.svg`.

    Returns:
        The paths.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = draw(analysis)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        write(figure, path)
    return paths


def write(figure: "Figure", path: Path) -> None:
    """Write a figure to a file, completely or not at all; the suffix of the path is the format."""
    from matplotlib import rc_context

    # A fixed salt makes the ids of an SVG file equal in all runs; the font type "none" writes text as text and not as
    # curves. The settings hold for this file only, because the settings of matplotlib belong to the importing program.
    with _files.atomic(path) as temporary, rc_context({"svg.hashsalt": "noetherflow", "svg.fonttype": "none"}):
        figure.savefig(temporary, dpi=160)


def _draw_balance(analysis: Analysis, axes: "Axes") -> None:
    """P against R of every coordinate, or of the diagonal of a matrix. On the line P = R, a charge does not drift."""
    gradients = minibatches(analysis.noise, analysis.settings)
    for index, (name, symmetry) in enumerate(analysis.equilibrium.symmetries.items()):
        if not has_charge(symmetry, analysis.settings):
            continue
        push, pull = forces(name, analysis.initial, gradients)
        if push.ndim == 2:
            push, pull = push.diagonal(), pull.diagonal()
        axes.plot(pull.reshape(-1), push.reshape(-1), **_points(index), label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="pull on the charge (R)",
        ylabel="push on the charge (P)",
        title="balance at present; no drift on the line",
    )
    low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    handles, names = axes.get_legend_handles_labels()
    title = f"{_NAMED} of {len(names):,} symmetries" if len(names) > _NAMED else None
    axes.legend(handles[:_NAMED], names[:_NAMED], fontsize=8, title=title, title_fontsize=8)


def _draw_distance(analysis: Analysis, axes: "Axes") -> None:
    """The coordinates x in increasing order; of a matrix x, the eigenvalues."""
    for index, (name, x) in enumerate(analysis.equilibrium.coordinates.items()):
        coordinates = (torch.linalg.eigvalsh(x) if x.ndim == 2 else x.reshape(-1)).sort().values
        position = torch.linspace(0, 1, len(coordinates) + 2)[1:-1]
        axes.plot(position, coordinates, **_points(index), label=name)
    axes.axhline(0, color="0.6", linewidth=1, zorder=0)
    axes.set(
        xlabel="coordinates, sorted",
        ylabel="log-scale x to the equilibrium",
        xticks=[],
        title="how far each coordinate will move",
    )


def _draw_totals(analysis: Analysis, axes: "Axes") -> None:
    """Noise and potential at the equilibrium, divided by their present values."""
    equilibrium = analysis.equilibrium
    after = (
        equilibrium.trace_after / equilibrium.trace_before,
        equilibrium.potential_after / equilibrium.potential_before,
    )
    bars = axes.bar(("noise\nTr Sigma", "potential"), after, color="0.45", width=0.6)
    axes.bar_label(bars, fmt="%.3f")
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(title="equilibrium / now", ylim=(0, max(1.05, *after) * 1.1))


def _points(index: int) -> dict[str, Any]:
    """The style of the points of a symmetry; markers differ because a print may lack colours."""
    return {"linestyle": "none", "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "color": f"C{index}"}

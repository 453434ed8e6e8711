"""Curves for the interactive plots of the report page, read from the matplotlib figure of an experiment."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter
from torch import Tensor

from noetherflow import _files
from noetherflow._errors import ParameterShapeError
from noetherflow.paper import style

# Limits on the points of a curve and the curves of a group: they bound the size of the page.
MAX_POINTS = 200
MAX_CURVES = 12
_SYMBOLS = {"theta": "θ", "phi": "φ", "kappa": "κ", "sigma": "σ", ",": " "}


@final
@dataclass(frozen=True, eq=False)
class Curve:
    """Values y over values x, with the text of the legend.

    Args:
        name: Text of the legend. For a curve of a group: the number of the curve, shown when the pointer is on it.
        x: Shape (n,).
        y: Shape (n,); infinities and NaN are gaps.
        kind: "line" and "points" for measured values, "prediction" for the theory.
        group: Curves of a group (the replicas of a run) share one legend entry, which shows or hides all of them.
        spread: Half the length of each error bar, shape (n,); empty without error bars.
    """

    name: str
    x: Tensor | Sequence[float]
    y: Tensor | Sequence[float]
    kind: Literal["line", "points", "prediction"] = "line"
    group: str | None = None
    spread: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Raise if the lengths differ: a plot would drop the surplus values without a message."""
        if len(self.x) != len(self.y) or len(self.spread) not in (0, len(self.y)):
            raise ParameterShapeError(
                f"curve {self.name!r}: {len(self.x)} values of x, {len(self.y)} of y, {len(self.spread)} error bars"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; values are rounded to six significant digits."""
        values = {"x": _rounded(self.x), "y": _rounded(self.y), "spread": _rounded(self.spread)}
        return {"name": self.name, "kind": self.kind, "group": self.group} | values


@final
@dataclass(frozen=True, eq=False)
class Panel:
    """Curves on one pair of axes.

    Args:
        title: Title of the panel.
        x_label: Label of the x axis as HTML: Unicode, `<sub>` and `<sup>`. The page has no LaTeX renderer.
        y_label: Label of the y axis, as for `x_label`.
        curves: In the order of the legend.
        log_x: Whether the x axis is logarithmic.
        log_y: Whether the y axis is logarithmic.
        equal: Whether both axes have the same length per unit.
        ticks: Pairs (x, text) of the x axis that replace its numbers; empty for numbers.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    equal: bool = False
    ticks: Sequence[tuple[float, str]] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields in plain JSON types."""
        names = ("title", "x_label", "y_label", "log_x", "log_y", "equal", "ticks")
        return {name: getattr(self, name) for name in names} | {"curves": [curve.to_json() for curve in self.curves]}


def panels_of(figure: Figure) -> list[Panel]:
    """Convert every pair of axes of a figure to a panel; the list is empty if any axes hold an image."""
    if any(axes.images for axes in figure.axes):
        return []
    return [_panel(axes) for axes in figure.axes]


def label_html(text: str) -> str:
    """Convert the LaTeX of a plot label (symbols, `^`, `_`) to HTML; an unknown command stays as it is."""
    text = re.sub(r"\\([a-zA-Z]+|,) ?", lambda match: _SYMBOLS.get(match[1], match[0]), text).replace("$", "")
    for mark, tag in (("^", "sup"), ("_", "sub")):
        text = re.sub(rf"\{mark}(?:{{([^}}]*)}}|(\w))", rf"<{tag}>\1\2</{tag}>", text)
    return " ".join(text.split())


def thinned_indices(length: int, limit: int = MAX_POINTS) -> Tensor:
    """Return min(length, limit) evenly spaced indices into a record of a given length; both ends are included."""
    return torch.linspace(0, length - 1, min(limit, length), dtype=torch.float64).round().long()


def _panel(axes: Axes) -> Panel:
    """Convert one pair of axes: lines, error bars, labels, scales and ticks."""
    bars = {id(bar[0]): bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)}
    caps = {id(cap) for bar in bars.values() for cap in bar[1]}
    lines = [line for line in axes.lines if id(line) not in caps]
    labelled = [(_look(line), str(bars.get(id(line), line).get_label())) for line in reversed(lines)]
    labels = {look: label for look, label in labelled if not label.startswith("_")}
    curves: list[Curve] = []
    for line in lines:
        kind = _kind(line)
        unlabelled = "predicted" if kind == "prediction" else "measured" if _has_data(axes, line) else "reference"
        group = label_html(labels.get(_look(line), unlabelled))
        number = 1 + sum(curve.group == group for curve in curves)
        if number <= MAX_CURVES:
            curves.append(_curve(axes, line, f"{number}", group, kind, bars.get(id(line))))
    locator, formatter = axes.xaxis.get_major_locator(), axes.xaxis.get_major_formatter()
    fixed = isinstance(locator, FixedLocator) and isinstance(formatter, FixedFormatter | FuncFormatter)
    ticks = zip(locator(), formatter.format_ticks(list(locator())), strict=True) if fixed else ()
    return Panel(
        title=label_html(axes.get_title()),
        x_label=label_html(axes.get_xlabel()),
        y_label=label_html(axes.get_ylabel()),
        curves=curves,
        log_x=axes.get_xscale() == "log",
        log_y=axes.get_yscale() == "log",
        equal=axes.get_aspect() == 1,
        ticks=[(float(x), label_html(text)) for x, text in ticks],
    )


def _curve(axes: Axes, line: Line2D, name: str, group: str, kind: Any, bars: ErrorbarContainer | None) -> Curve:
    """Thin a line and its error bars to `MAX_POINTS` points; a line from edge to edge spans the limits of the axis."""
    x, y = torch.tensor(np.asarray(line.get_xydata(), dtype=float)).T
    if not _has_data(axes, line):
        x = torch.tensor(axes.get_xlim(), dtype=torch.float64)
    indices = thinned_indices(len(x))
    spread = _spread(bars) if bars is not None else []
    return Curve(name, x[indices], y[indices], kind, group, [spread[index] for index in indices] if spread else [])


def _kind(line: Line2D) -> Literal["line", "points", "prediction"]:
    """Recognise predictions by the colour and line style of `style.PREDICTED`, points by the absence of a line."""
    if line.get_linestyle() == "None":
        return "points"
    predicted = all(getattr(line, f"get_{key}")() == style.PREDICTED[key] for key in ("color", "linestyle"))
    return "prediction" if predicted else "line"


def _has_data(axes: Axes, line: Line2D) -> bool:
    """False for a line in axes coordinates, such as that of `axhline`."""
    return line.get_transform() == axes.transData


def _look(line: Line2D) -> tuple[object, ...]:
    """Colour, line style, marker and width; lines that agree in all four share a legend entry."""
    return to_hex(line.get_color()), line.get_linestyle(), line.get_marker(), line.get_linewidth()


def _spread(bars: ErrorbarContainer) -> list[float]:
    """Half the length of every error bar."""
    return [(segment[1][1] - segment[0][1]) / 2 for segment in bars[2][0].get_segments()]


def _rounded(values: Tensor | Sequence[float]) -> list[float | None]:
    """Round to six significant digits; None for infinities and NaN."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    rounded: list[float | None] = _files.finite([float(f"{value:.6g}") for value in listed])
    return rounded

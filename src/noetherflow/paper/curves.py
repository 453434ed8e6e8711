"""Curves to explore: what the report page draws in place of a picture, read off the picture itself."""

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

# More points of a curve, and more curves of a group, are left out: a page has to load, and the eye follows no more.
MOST_POINTS = 200
MOST_CURVES = 12
_SYMBOLS = {"theta": "θ", "phi": "φ", "kappa": "κ", "sigma": "σ", ",": " "}


@final
@dataclass(frozen=True, eq=False)
class Curve:
    """Numbers over numbers, with a name for the legend.

    Args:
        name: What the legend says; for a curve of a group, what tells it from the others when the pointer is on it.
        x: Shape (n,).
        y: Shape (n,); infinities and NaN are gaps.
        kind: Measured lines, measured points, or what the theory says.
        group: Curves of one group are one entry of the legend, which shows or hides them together: replicas.
        spread: Half the length of an error bar, shape (n,), if there are any.
    """

    name: str
    x: Tensor | Sequence[float]
    y: Tensor | Sequence[float]
    kind: Literal["line", "points", "prediction"] = "line"
    group: str | None = None
    spread: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Refuse lengths that differ, which a plot would cut in silence."""
        if len(self.x) != len(self.y) or len(self.spread) not in (0, len(self.y)):
            raise ParameterShapeError(
                f"curve {self.name!r}: {len(self.x)} values of x, {len(self.y)} of y, {len(self.spread)} error bars"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, to the six digits that can be told apart in a plot."""
        values = {"x": _rounded(self.x), "y": _rounded(self.y), "spread": _rounded(self.spread)}
        return {"name": self.name, "kind": self.kind, "group": self.group} | values


@final
@dataclass(frozen=True, eq=False)
class Panel:
    """Curves on one pair of axes.

    Args:
        title: What is to be seen.
        x_label: In words, Unicode, `<sub>` and `<sup>`: nothing on the page reads LaTeX.
        y_label: Likewise.
        curves: In the order of the legend.
        log_x: Whether the axis is logarithmic.
        log_y: Likewise.
        equal: Whether a unit is as long upwards as it is sideways.
        ticks: Words that stand at some places of the first axis instead of numbers.
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
        """Plain JSON types."""
        names = ("title", "x_label", "y_label", "log_x", "log_y", "equal", "ticks")
        return {name: getattr(self, name) for name in names} | {"curves": [curve.to_json() for curve in self.curves]}


def panels_of(figure: Figure) -> list[Panel]:
    """The axes of a picture as panels; none if it shows anything but lines, points and error bars."""
    if any(axes.images for axes in figure.axes):
        return []
    return [_panel(axes) for axes in figure.axes]


def words(text: str) -> str:
    """A label as HTML: the little of LaTeX that labels of plots need."""
    text = re.sub(r"\\([a-zA-Z]+|,) ?", lambda found: _SYMBOLS.get(found[1], found[0]), text).replace("$", "")
    for mark, tag in (("^", "sup"), ("_", "sub")):
        text = re.sub(rf"\{mark}(?:{{([^}}]*)}}|(\w))", rf"<{tag}>\1\2</{tag}>", text)
    return " ".join(text.split())


def thinned(length: int, most: int = MOST_POINTS) -> Tensor:
    """Indices of at most so many entries of a recording, evenly spread and with both ends, for long ones."""
    return torch.linspace(0, length - 1, min(most, length), dtype=torch.float64).round().long()


def _panel(axes: Axes) -> Panel:
    bars = {id(found[0]): found for found in axes.containers if isinstance(found, ErrorbarContainer)}
    caps = {id(cap) for found in bars.values() for cap in found[1]}
    lines = [line for line in axes.lines if id(line) not in caps]
    said = [(_look(line), str(bars.get(id(line), line).get_label())) for line in reversed(lines)]
    labels = {look: label for look, label in said if not label.startswith("_")}
    curves: list[Curve] = []
    for line in lines:
        kind = _kind(line)
        bare = "predicted" if kind == "prediction" else "measured" if _has_data(axes, line) else "reference"
        group = words(labels.get(_look(line), bare))
        number = 1 + sum(curve.group == group for curve in curves)
        if number <= MOST_CURVES:
            curves.append(_curve(axes, line, f"{number}", group, kind, bars.get(id(line))))
    places, named = axes.xaxis.get_major_locator(), axes.xaxis.get_major_formatter()
    fixed = isinstance(places, FixedLocator) and isinstance(named, FixedFormatter | FuncFormatter)
    ticks = zip(places(), named.format_ticks(list(places())), strict=True) if fixed else ()
    return Panel(
        title=words(axes.get_title()),
        x_label=words(axes.get_xlabel()),
        y_label=words(axes.get_ylabel()),
        curves=curves,
        log_x=axes.get_xscale() == "log",
        log_y=axes.get_yscale() == "log",
        equal=axes.get_aspect() == 1,
        ticks=[(float(place), words(text)) for place, text in ticks],
    )


def _curve(axes: Axes, line: Line2D, name: str, group: str, kind: Any, bars: ErrorbarContainer | None) -> Curve:
    x, y = torch.tensor(np.asarray(line.get_xydata(), dtype=float)).T
    if not _has_data(axes, line):
        x = torch.tensor(axes.get_xlim(), dtype=torch.float64)
    kept = thinned(len(x))
    spread = _spread(bars) if bars is not None else []
    return Curve(name, x[kept], y[kept], kind, group, [spread[index] for index in kept] if spread else [])


def _kind(line: Line2D) -> Literal["line", "points", "prediction"]:
    if line.get_linestyle() == "None":
        return "points"
    predicted = all(getattr(line, f"get_{key}")() == style.PREDICTED[key] for key in ("color", "linestyle"))
    return "prediction" if predicted else "line"


def _has_data(axes: Axes, line: Line2D) -> bool:
    """False for a line from edge to edge."""
    return line.get_transform() == axes.transData


def _look(line: Line2D) -> tuple[object, ...]:
    """Lines of one look are one entry of the legend."""
    return to_hex(line.get_color()), line.get_linestyle(), line.get_marker(), line.get_linewidth()


def _spread(bars: ErrorbarContainer) -> list[float]:
    return [(segment[1][1] - segment[0][1]) / 2 for segment in bars[2][0].get_segments()]


def _rounded(values: Tensor | Sequence[float]) -> list[float | None]:
    listed = values.tolist() if isinstance(values, Tensor) else values
    rounded: list[float | None] = _files.finite([float(f"{value:.6g}") for value in listed])
    return rounded

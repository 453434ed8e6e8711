"""Charts of a page: their curves, which of many points are drawn, and the script that draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import final

import numpy as np
from numpy.typing import NDArray

from noetherflow.report import document
from noetherflow.report.readings import Column

# Points of curves that a reader has to select, together, and points of a curve: at least, and at most.
_NUMBERS, _FEWEST, _MOST = 200_000, 60, 600
_PACKAGE = "noetherflow.report"


@final
@dataclass(frozen=True)
class Series:
    """A curve: values over steps, and the ends of its band if there is one."""

    label: str
    steps: NDArray[np.int64]
    values: Column
    low: Column | None = None
    high: Column | None = None

    def to_json(self, most: int, *, log: bool) -> dict[str, object]:
        """The points that are drawn, at most about `most`."""
        columns = [values for values in (self.values, self.low, self.high) if values is not None]
        # What a logarithmic axis cannot show is no smallest value.
        places = thinned([np.where(values > 0, values, np.nan) if log else values for values in columns], most)
        drawn = [[_plain(value) for value in values[places].tolist()] for values in columns]
        return {"label": self.label, "x": self.steps[places].tolist()} | dict(
            zip(("y", "low", "high"), drawn, strict=False)
        )


@final
@dataclass(frozen=True)
class Choice:
    """The curves that a chart shows together, and a sentence about them."""

    label: str
    series: tuple[Series, ...]
    note: str = ""


@final
@dataclass(frozen=True)
class Chart:
    """A chart with a heading, an explanation, an axis, and choices between which a reader selects."""

    title: str
    text: str
    log: bool
    choices: tuple[Choice, ...]


def to_json(charts: Sequence[Chart]) -> list[object]:
    """Charts for `charts.js`."""
    hidden = sum(len(choice.series) for chart in charts for choice in chart.choices[1:])
    fewer = min(max(_NUMBERS // max(hidden, 1), _FEWEST), _MOST)
    return [
        {
            "title": chart.title,
            "text": chart.text,
            "log": chart.log,
            "choices": [
                {
                    "label": choice.label,
                    "note": choice.note,
                    "series": [s.to_json(most, log=chart.log) for s in choice.series],
                }
                for choice, most in zip(chart.choices, chain([_MOST], repeat(fewer)), strict=False)
            ],
        }
        for chart in charts
    ]


def style() -> str:
    """The CSS of charts."""
    return document.asset(_PACKAGE, "charts.css")


def scripts() -> tuple[str, ...]:
    """The scripts that draw the charts of a page in its element `charts`; the data of the page is `to_json`."""
    return tuple(document.asset(_PACKAGE, name) for name in ("axis.js", "charts.js"))


def thinned(columns: Sequence[Column], most: int) -> NDArray[np.int64]:
    """Places of a curve that are drawn: all, or of each stretch the smallest and the largest value of every column.

    Args:
        columns: Columns of equal length.
        most: The number of places to aim at.

    Returns:
        Places in ascending order, with the first and the last.
    """
    count = len(columns[0])
    if count <= most:
        return np.arange(count)
    stretches = np.array_split(np.arange(count), max(most // (2 * len(columns)), 1))
    # A NaN is a gap in the curve: a gap as long as a stretch is kept.
    places = {0, count - 1}
    for stretch in stretches:
        for values in columns:
            part = values[stretch]
            known = np.flatnonzero(~np.isnan(part))
            if len(known):
                places |= {int(stretch[known[np.argmin(part[known])]]), int(stretch[known[np.argmax(part[known])]])}
            else:
                places.add(int(stretch[0]))
    return np.array(sorted(places))


def _plain(value: float) -> float | str | None:
    """A number as JSON: null for NaN, a word for an infinity."""
    return None if np.isnan(value) else ("inf" if value > 0 else "-inf") if np.isinf(value) else value

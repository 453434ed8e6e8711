"""The page of a forecast: plain words, curves, and tables of numbers with their errors, in an HTML file by itself."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import numpy as np

from noetherflow import _versions
from noetherflow._table import starred
from noetherflow.forecasting import Forecast
from noetherflow.forecasting.estimate import Change, Estimate
from noetherflow.forecasting.result import blocks_title, blocks_told, norms_table, numbers_of, ranked, reasons_of
from noetherflow.forecasting.said import once, too_wide
from noetherflow.report import charts, document, forecast_words, parts
from noetherflow.report.charts import Chart, Choice, Series
from noetherflow.report.parts import Cell

_PACKAGE = "noetherflow.report"
# Share of the larger part of an error from which the smaller part is shown.
_COUNTS = 0.01
_SIDES = ("now", "equilibrium", "ratio")


def write(path: Path, forecast: Forecast, name: str) -> None:
    """Write the page, completely or not at all.

    Args:
        path: The HTML file.
        forecast: The forecast.
        name: What the forecast is of, for the heading.

    Raises:
        FileError: If the file cannot be written.
    """
    summary = forecast_words.sentences(forecast)
    reasons = [reason.replace("+-", "±") for reason in reasons_of(forecast)]
    read = [reason for reason in reasons if any(reason in text for text in summary)]
    body = {
        "name": html.escape(name),
        "summary": parts.paragraphs(summary),
        "notes": parts.notes([*dict.fromkeys(forecast.notes)]),
        "introduction": html.escape(forecast_words.INTRODUCTION),
        "numbers": _numbers(forecast, read),
        "blocks": _blocks(forecast, read),
        "norms": _norms(forecast),
        "assumptions": parts.bullets(_shown(forecast.assumptions, read)),
        "settings": parts.pairs(forecast.settings.listed | {"examples": forecast.examples}),
        "versions": parts.pairs(_versions.versions()),
    }
    document.write(
        path,
        title=f"noetherflow: {name}",
        style=charts.style() + document.asset(_PACKAGE, "forecast.css"),
        body=Template(document.asset(_PACKAGE, "forecast.html")).substitute(body),
        data=charts.to_json(_charts(forecast)),
        scripts=charts.scripts(),
    )


def _charts(forecast: Forecast) -> list[Chart]:
    """The schedule of the warmup, if there is a warmup."""
    if not forecast.warmup.schedule:
        return []
    steps, rates = zip(*forecast.warmup.schedule, strict=True)
    series = Series("learning rate", np.array(steps, dtype=np.int64), np.array(rates, dtype=np.float64))
    text = "The learning rate is linear between the points, and constant after the last point."
    return [Chart("Schedule of the warmup", text, False, (Choice("warmup", (series,)),))]


def _numbers(forecast: Forecast, read: Sequence[str]) -> str:
    """The numbers of the complete model, why a number cannot be told, and the schedule in numbers.

    Args:
        forecast: The forecast.
        read: Reasons that the head of the page gives.

    Returns:
        HTML.
    """
    changes = numbers_of(forecast)
    (half,) = _shown([forecast_words.time(forecast.half_steps)], read)
    points = [[Cell(f"{step:,}"), Cell(f"{rate:.4g}")] for step, rate in forecast.warmup.schedule]
    return (
        parts.table(("number", *_SIDES), [_row(label, change) for label, change in changes])
        + _reasons(changes, read)
        + parts.small(too_wide(changes))
        + parts.pairs({"steps to half of the change": half})
        + parts.folded_table("Points of the schedule", ("step", "learning rate"), points)
    )


def _blocks(forecast: Forecast, read: Sequence[str]) -> str:
    """Tr H of every parameter, the largest first; a sentence where no trace is known; arguments as `_numbers`."""
    if not blocks_told(forecast):
        return parts.small(["Tr H of the parameters cannot be told: see above."])
    blocks = ranked(forecast)
    rows = [_row(name, change) for name, change in blocks]
    table = parts.folded_table(blocks_title(forecast), ("parameter", *_SIDES), rows, sortable=True)
    return table + _reasons(blocks, read)


def _norms(forecast: Forecast) -> str:
    """The norms of scale-invariant weights; nothing without such weights."""
    if not forecast.norms:
        return ""
    table = norms_table(forecast.norms)
    rows = [[Cell(text) for text in row] for row in table.rows]
    shown = parts.folded_table(table.title, [column.heading for column in table.columns], rows)
    return shown + parts.small(table.notes)


def _row(label: str, change: Change) -> list[Cell]:
    """A number on both sides; a star refers to the reasons below the table."""
    star = "" if all(estimate.known for estimate in change) else " *"
    return [Cell(label + star), *(_cell(estimate) for estimate in change)]


def _cell(estimate: Estimate) -> Cell:
    """A number and its error, with the two parts of the error where both count."""
    small, large = sorted((estimate.error, estimate.sampling))
    both = estimate.known and small > _COUNTS * large  # not if either is NaN
    message = f"± {estimate.error:.2g} of the method, ± {estimate.sampling:.2g} of the sample" if both else ""
    return Cell(forecast_words.estimate(estimate), estimate.value, message)


def _reasons(changes: Iterable[tuple[str, Change]], read: Sequence[str]) -> str:
    """Why numbers cannot be told; numbers with equal reasons share a sentence."""
    pairs = [(label, why) for label, change in changes for why in dict.fromkeys(e.why for e in change if not e.known)]
    return parts.small(_shown(starred(pairs), read))


def _shown(texts: Iterable[str], read: Sequence[str]) -> list[str]:
    """Texts that refer to the reasons that were read."""
    return once((text.replace("+-", "±") for text in texts), read, given=True)

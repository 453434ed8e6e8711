"""The charts of a recorded run: which curves they show."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from noetherflow.record import Run, names
from noetherflow.report.charts import Chart, Choice, Series
from noetherflow.report.readings import (
    Band,
    Column,
    band,
    column,
    furthest,
    layers,
    moved,
    others,
    parts_of,
    since_first,
)

# Curves in a chart that shows the largest of many, and charts of metrics without a meaning for this package.
_TOGETHER, _PLAIN = 6, 8
_ALL = "all parameters"


def charts_of(run: Run) -> list[Chart]:
    """Every chart that the metrics of a run allow, most important first."""
    charts = [_scales(run), _squares(run), _charges(run), _parts(run), _distances(run), *_plain_charts(run)]
    return [chart for chart in charts if chart.choices]


def _scales(run: Run) -> Chart:
    choices = []
    for name in ("", *layers(run)):
        bands = {
            "noise scale": band(run, names.SCALE, name),
            "in the metric of the optimizer": band(run, names.PRECONDITIONED, name),
        }
        series = tuple(_banded(label, b) for label, b in bands.items() if b is not None)
        note = " ".join(_unbounded(label, b) for label, b in bands.items() if b is not None and b.unbounded)
        if series:
            choices.append(Choice(name or _ALL, series, note))
    text = "Noise scale Tr Sigma / |G|² in examples, with its confidence interval as a band; logarithmic axis."
    return Chart("Noise scale", text, True, tuple(choices))


def _banded(label: str, shown: Band) -> Series:
    has_band = not (np.isnan(shown.low) & np.isnan(shown.high)).all()
    return Series(label, shown.steps, shown.values, *((shown.low, shown.high) if has_band else ()))


def _unbounded(label: str, shown: Band) -> str:
    """A sentence on the steps at which the band reaches the upper edge."""
    return (
        f"{label.capitalize()}: at {shown.unbounded:,} of {len(shown.steps):,} steps the interval is unbounded and its "
        f"band reaches the upper edge, because |G|² cannot be distinguished from zero."
    )


def _squares(run: Run) -> Chart:
    choices = []
    for name in ("", *layers(run)):
        series = _curves(run, {"|G|²": names.joined(names.SQUARE, name), "Tr Sigma": names.joined(names.TRACE, name)})
        negative = sum(int((s.values <= 0).sum()) for s in series)
        note = (
            f"{negative:,} values of zero or less are not drawn: a logarithmic axis cannot show them."
            if negative
            else ""
        )
        if series:
            choices.append(Choice(name or _ALL, series, note))
    text = "Squared norm |G|² of the mean gradient (unbiased), and noise per example, Tr Sigma; logarithmic axis."
    return Chart("Gradient and noise", text, True, tuple(choices))


def _charges(run: Run) -> Chart:
    ranked = [symmetry.name for symmetry in moved(run)]
    return Chart(
        "Charges",
        "The charges of symmetries, as they were recorded.",
        False,
        _largest(run, names.CHARGE, ranked, "moved most"),
    )


def _parts(run: Run) -> Chart:
    choices = []
    for symmetry in moved(run):
        kinds = {names.CHARGE: "change of the charge"} | {
            kind: f"by {what}" for kind, what in parts_of(run, symmetry.name).items()
        }
        series = tuple(
            Series(label, *_known(run, since_first(run, kind, symmetry.name)))
            for kind, label in kinds.items()
            if names.joined(kind, symmetry.name) in run.columns
        )
        if len(series) > 1:
            choices.append(Choice(symmetry.name, series))
    text = "Change of a charge since its first recorded step, and what changed it; the charge that moved most is first."
    return Chart("Where the change went", text, False, tuple(choices))


def _distances(run: Run) -> Chart:
    ranked = [name for name, _, _ in furthest(run)]
    text = "Distance x to the equilibrium of the noise: weights differ from those at equilibrium by the factor e^x."
    return Chart("Distance to equilibrium", text, False, _largest(run, names.DISTANCE, ranked, "furthest"))


def _largest(run: Run, kind: str, ranked: Sequence[str], word: str) -> tuple[Choice, ...]:
    """The largest curves together, then, if there are more, every curve by itself."""
    series = [Series(name, *_known(run, column(run, kind, name))) for name in ranked]
    if len(series) <= _TOGETHER:
        return (Choice("all", tuple(series)),) if series else ()
    together = Choice(f"{word}: {_TOGETHER} of {len(series):,}", tuple(series[:_TOGETHER]))
    return (together, *(Choice(s.label, (s,)) for s in series))


def _plain_charts(run: Run) -> list[Chart]:
    curves = [(key, _curves(run, {key: key})) for key in others(run)]
    shown = [(key, series) for key, series in curves if series]
    charts = [Chart(key, "", False, (Choice(key, series),)) for key, series in shown[:_PLAIN]]
    rest = tuple(Choice(key, series) for key, series in shown[_PLAIN:])
    return [*charts, Chart("Further metrics", "", False, rest)]


def _curves(run: Run, keys: dict[str, str]) -> tuple[Series, ...]:
    """Curves of metrics by label, of those that were recorded."""
    return tuple(
        Series(label, *_known(run, run.columns[key]))
        for label, key in keys.items()
        if key in run.columns and not np.isnan(run.columns[key]).all()
    )


def _known(run: Run, values: Column) -> tuple[NDArray[np.int64], Column]:
    """Steps and values without those of other metrics: a metric that is measured at every tenth step has no gaps."""
    known = ~np.isnan(values)
    return run.steps[known], np.where(np.isfinite(values), values, np.nan)[known]

"""A recorded run in plain words and in tables."""

import math
from collections.abc import Iterator

from noetherflow._table import Column, Table
from noetherflow.record import Run, names
from noetherflow.report import words
from noetherflow.report.readings import Band, Moved, band, column, furthest, last, layers, moved

INTRODUCTION = (
    "The noise scale Tr Sigma / |G|² compares the gradient noise of a single example with the mean gradient. In the "
    "quadratic model of training, a batch of B examples takes 1 + scale/B times the fewest possible steps. The model "
    "says nothing about generalisation, and large models can depart from it."
)
# A cell of which nothing is known.
UNKNOWN = "–"
_PARTS = (*names.PARTS.values(), *names.RARE_PARTS.values())
# Rows of the table on a terminal that are symmetries.
_ROWS = 5
_HEADINGS = ("layer", "noise scale", "step", "Tr Sigma", "|G|²", "in the metric of the optimizer")


def sentences(run: Run) -> list[str]:
    """What a run says, most important first; plain text, a paragraph each."""
    paragraphs = (" ".join(_scale(run)), " ".join(_charges(run)), " ".join(_distance(run)), _extent(run))
    return [paragraph for paragraph in paragraphs if paragraph]


def table(run: Run) -> Table:
    """The last values of a run: the noise of all parameters, and the symmetries that moved most or are furthest."""
    rows = [
        (what, *_last_scale(shown))
        for kind, what in ((names.SCALE, "noise scale"), (names.PRECONDITIONED, "noise scale, optimizer's metric"))
        if (shown := band(run, kind)) is not None
    ]
    plain = {"Tr Sigma": column(run, names.TRACE), "|G|^2": column(run, names.SQUARE)}
    plain |= {f"charge of {s.name}": column(run, names.CHARGE, s.name) for s in moved(run)[:_ROWS]}
    plain |= {f"distance of {name}": column(run, names.DISTANCE, name) for name, _, _ in furthest(run)[:_ROWS]}
    for what, values in plain.items():
        step, value = last(run, values)
        if not math.isnan(value):
            rows.append((what, f"{value:.4g}", "", f"{step:,}"))
    columns = (Column("metric", folds=True), Column("last", right=True), Column("interval"), Column("step", right=True))
    return Table(f"{run.name}: {_extent(run)}", columns, tuple(rows), tuple(_scale(run)))


def layer_rows(run: Run) -> list[dict[str, str]]:
    """The last values of every layer or group, as texts by heading."""
    return [dict(zip(_HEADINGS, _layer(run, name), strict=True)) for name in layers(run)]


def symmetry_rows(run: Run) -> list[dict[str, str]]:
    """The last values of every symmetry with a charge or a distance, as texts by heading."""
    distances = {name: number(value) for name, _, value in furthest(run)}
    rows = []
    for symmetry in moved(run):
        parts = {what: _signed(value) for what, value in symmetry.parts.items()}
        rows.append(
            {
                "symmetry": symmetry.name,
                "distance": distances.pop(symmetry.name, UNKNOWN),
                "charge": number(symmetry.last),
                "change": _signed(symmetry.change),
                **{f"by {what}": parts.get(what, UNKNOWN) for what in _PARTS},
            }
        )
    empty = dict.fromkeys(["charge", "change", *(f"by {what}" for what in _PARTS)], UNKNOWN)
    return rows + [{"symmetry": name, "distance": text, **empty} for name, text in distances.items()]


def interval(low: float, high: float) -> str:
    """An interval in words; empty if there is none."""
    if math.isnan(low) and math.isnan(high):
        return ""
    low = max(low, 0.0)
    if math.isinf(high):
        return f"at least {number(low)}, unbounded" if low > 0 else "unbounded"
    return f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    """A number with three significant digits, without an exponent below ten million."""
    if 1e3 <= abs(value) < 1e7:
        return f"{float(f'{value:.3g}'):,.0f}"
    return words.number(value)


def _last_scale(shown: Band) -> tuple[str, str, str]:
    """Value, interval and step of the last measurement."""
    return number(shown.values[-1]), interval(shown.low[-1], shown.high[-1]), f"{shown.steps[-1]:,}"


def _layer(run: Run, name: str) -> Iterator[str]:
    """The cells of a layer."""
    bands = [band(run, kind, name) for kind in (names.SCALE, names.PRECONDITIONED)]
    scale, preconditioned = (UNKNOWN if b is None else _with_interval(b) for b in bands)
    step = next((f"{b.steps[-1]:,}" for b in bands if b is not None), UNKNOWN)
    yield from (name, scale, step)
    yield from (number(last(run, column(run, kind, name))[1]) for kind in (names.TRACE, names.SQUARE))
    yield preconditioned


def _with_interval(shown: Band) -> str:
    value, ends, _ = _last_scale(shown)
    return f"{value} ({ends})" if ends else value


def _scale(run: Run) -> Iterator[str]:
    """The last noise scale, and the critical batch size."""
    shown = band(run, names.SCALE)
    if shown is not None:
        yield from _last_sentences(shown)
    preconditioned = band(run, names.PRECONDITIONED)
    if preconditioned is not None:
        yield f"In the metric of the optimizer the noise scale is {_with_interval(preconditioned)}."


def _last_sentences(shown: Band) -> Iterator[str]:
    value, low, high = (float(values[-1]) for values in (shown.values, shown.low, shown.high))
    ends = interval(low, high)
    step = f"At step {shown.steps[-1]:,}"
    unknown = "the squared mean gradient cannot be distinguished from zero"
    if math.isnan(value):
        yield f"{step} the noise scale is not known: {unknown}." + (f" Its interval: {ends}." if ends else "")
        return
    if math.isinf(high):
        yield f"{step} the noise scale is {number(value)} examples. Its interval has no upper end: {unknown}."
        if low > 0:
            yield f"The critical batch size is at least {number(low)} examples."
        return
    yield f"{step} the noise scale is {number(value)} examples" + (f", with the interval {ends}." if ends else ".")
    yield (
        f"So the critical batch size is about {number(value)} examples: there, training takes twice the fewest "
        f"possible steps, and a doubled batch saves a quarter of the steps. A much larger batch saves few steps, a "
        f"much smaller batch few examples."
    )


def _charges(run: Run) -> Iterator[str]:
    ranked = moved(run)
    if not ranked:
        return
    first: Moved = ranked[0]
    what = (
        "The charge of" if len(ranked) == 1 else f"Of {len(ranked):,} symmetries, the charge that moved most is that of"
    )
    change = f"{_signed(first.change)} since step {first.first:,}, to {number(first.last)}"
    yield f'{what} "{first.name}": it changed by {change}.'
    if first.parts:
        parts = ", ".join(f"{_signed(value)} by {what}" for what, value in first.parts.items())
        yield f"Of this change, {parts}."
    off = [s for s in ranked if set(s.parts) >= set(names.PARTS.values()) and not _adds_up(s)]
    if off:
        yield (
            f"The recorded parts do not add up to the change for {len(off):,} of the symmetries, among them "
            f'"{off[0].name}": the charge was changed between steps, or the parts were not summed since the start.'
        )


def _adds_up(symmetry: Moved) -> bool:
    """Whether the parts explain the change, to a hundredth of the largest of them."""
    sizes = [abs(value) for value in (symmetry.change, symmetry.last, *symmetry.parts.values())]
    return abs(symmetry.change - sum(symmetry.parts.values())) <= 0.01 * max(sizes)


def _distance(run: Run) -> Iterator[str]:
    ranked = furthest(run)
    if ranked:
        name, step, value = ranked[0]
        yield (
            f'Furthest from equilibrium is "{name}": distance {number(value)} at step {step:,}, so that its weights '
            f"typically differ by the factor {number(math.exp(min(value, 700.0)))} from those at equilibrium."
        )


def _extent(run: Run) -> str:
    count = len(run.steps)
    return f"{count:,} recorded step{'s' * (count != 1)}, from {run.steps[0]:,} to {run.steps[-1]:,}."


def _signed(value: float) -> str:
    return f"{value:+.3g}"

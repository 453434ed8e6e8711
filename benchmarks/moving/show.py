"""Tables of docs/when-does-it-help.md."""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "when-does-it-help.md"
PLACE = re.compile(r"<!-- table: (?P<name>\w+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)


def write(path: Path) -> str:
    """Put the tables into the page, and give them back."""
    tables = tables_of(json.loads(path.read_text("utf-8")))
    page = PAGE.read_text("utf-8")
    PAGE.write_text(
        PLACE.sub(lambda place: f"<!-- table: {place['name']} -->\n\n{tables[place['name']]}\n\n<!-- end -->", page),
        "utf-8",
    )
    return "\n\n".join(tables.values())


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """A table for each place in the page."""
    rows = {name: part["rows"] for name, part in results.items()}
    return {
        "at_once": _at_once(rows["at_once"]),
        "unused": _unused(rows["at_once"]),
        "continuation": _continuation(rows["continuation"]),
        "course": _course(rows["course"]),
        "decays": _decays(rows["decays"]),
        "adapters": _adapters(rows["adapters"]),
        "adamw": _adamw(rows["adamw"]),
    }


def ratio(row: Row, key: str) -> float:
    """The number after the move over that before."""
    before, after = row[key]
    return after / before


def gap(row: Row, when: str) -> float:
    """By how much a loss is larger with the move than without; negative where the move helps."""
    return row[f"moves, {when}"] - row[f"stays, {when}"]


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of equal values of some keys, in the order in which the values come first."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[key] for key in keys), []).append(row)
    return grouped


def _at_once(rows: list[Row]) -> str:
    head = ("model (seeds)", "distance", "Tr Σ", "weights squared", "sharpness", "largest stable lr")
    lines = [
        [
            f"{model} ({len(group)})",
            _spread([row["distance"] for row in group]),
            *(_spread([ratio(row, key) for row in group]) for key in ("trace", "norm", "sharpness", "largest lr")),
        ]
        for (model,), group in groups(rows, "model").items()
    ]
    return _table(head, lines)


def _unused(rows: list[Row]) -> str:
    head = ("model", "used, before", "used, after", "unused, before", "unused, after")
    lines = []
    for (model,), group in groups(rows, "model").items():
        cells = [model]
        for kind in ("used", "unused"):
            before, after = zip(*(row[f"imbalance, {kind}"] for row in group), strict=True)
            cells += [_spread(before), "below 1e-6" if max(after) < 1e-6 else _spread(after)]
        lines.append(cells)
    return _table(head, lines)


def _continuation(rows: list[Row]) -> str:
    head = ("model", "optimizer", "loss at the start", "after 20 steps", "after 200 steps", "unused data, after 200")
    lines = [
        [
            model,
            optimizer,
            f"{statistics.fmean(row['start'] for row in group):.3f}",
            *(_signed([gap(row, when) for row in group]) for when in ("20", "200", "unused")),
        ]
        for (model, optimizer), group in groups(rows, "model", "optimizer").items()
    ]
    return _table(head, lines)


def _course(rows: list[Row]) -> str:
    head = ("weight decay", "steps so far", "distance", "its error", "imbalance", "Tr Σ now", "relaxation, steps")
    lines = [
        [
            f"{decay:g}",
            f"{steps:,}",
            _spread([row["distance"] for row in group]),
            f"{statistics.fmean(row['error'] for row in group):.3f}",
            _spread([row["imbalance"] for row in group]),
            f"{statistics.fmean(row['trace'][0] for row in group):.2g}",
            _count(statistics.fmean(row["median steps"] for row in group)),
        ]
        for (decay, steps), group in groups(rows, "weight decay", "steps").items()
    ]
    return _table(head, lines)


def _decays(rows: list[Row]) -> str:
    head = ("model (seeds)", "weight decay", "status", "distance", "Tr Σ", "weights squared")
    lines = [
        [
            f"{model} ({len(group)})",
            f"{decay:g}",
            " or ".join(dict.fromkeys(row["status"].replace("_", " ") for row in group)),
            _spread([row["distance"] for row in group]),
            *(_spread([ratio(row, key) for row in group]) for key in ("trace", "norm")),
        ]
        for (model, decay), group in groups(rows, "model", "weight decay").items()
    ]
    return _table(head, lines)


def _adapters(rows: list[Row]) -> str:
    head = ("steps so far", "distance", "imbalance", "Tr Σ", "loss now", "SGD", "AdamW")
    lines = []
    for (steps,), group in groups(rows, "steps").items():
        if "distance" not in group[0]:
            lines.append([str(steps), *(["no equilibrium"] + ["-"] * 5)])
            continue
        cells = [_spread([row["distance"] for row in group]), _spread([row["imbalance"] for row in group])]
        cells += [_spread([ratio(row, "trace") for row in group]), f"{statistics.fmean(r['start'] for r in group):.2f}"]
        cells += [_signed([r[f"{kind}, moves"] - r[f"{kind}, stays"] for r in group]) for kind in ("SGD", "AdamW")]
        lines.append([str(steps), *cells])
    return _table(head, lines)


def _adamw(rows: list[Row]) -> str:
    courses = {name: values for name, values in rows[0].items() if name != "seed"}
    lines = [
        [str(step), *(f"{value:.4f}" for value in values)]
        for step, values in enumerate(zip(*courses.values(), strict=True), start=1)
    ]
    return _table(("step", *courses), lines)


def _table(head: Iterable[str], lines: list[list[str]]) -> str:
    titles = list(head)
    rule = ["---"] + ["---:"] * (len(titles) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines))


def _spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    return _text(list(values), lambda value: f"{value:.2f}")


def _signed(values: Iterable[float]) -> str:
    """Mean and standard deviation of a difference, and in how many of the runs it is negative."""
    listed = list(values)
    lower = sum(value < 0 for value in listed)
    mean = statistics.fmean(listed)
    return f"{mean:+.4f} ± {statistics.stdev(listed):.4f}, lower in {lower} of {len(listed)}"


def _text(values: list[float], form: Callable[[float], str]) -> str:
    return f"{form(statistics.fmean(values))} ± {form(statistics.stdev(values))}"


def _count(steps: float) -> str:
    return f"{steps:,.0f}" if steps < 1e6 else f"{steps:.0e}"

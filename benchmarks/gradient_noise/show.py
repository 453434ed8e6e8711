"""Tables and the figure of docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .models import MODELS
from .ways import OURS, RIVALS

_DOCS = Path(__file__).parents[2] / "docs"
_START, _END = "<!-- noise: tables -->", "<!-- noise: end -->"


def show(path: Path) -> None:
    """Print the tables, put them into the page, and draw the figure."""
    result = json.loads(path.read_text("utf-8"))
    tables = "\n\n".join([ways_table(result), threads_table(result), memory_table(result), wrong_table(result)])
    print(tables)
    page = _DOCS / "benchmarks.md"
    before, rest = page.read_text("utf-8").split(_START)
    page.write_text(f"{before}{_START}\n\n{tables}\n\n{_END}{rest.split(_END)[1]}", "utf-8")
    draw(result, _DOCS / "noise.svg")


def ways_table(result: dict[str, Any]) -> str:
    rows = []
    for way in (*OURS, *RIVALS):
        cells = [way]
        for model in MODELS:
            row = found(result["ways"], model, way)
            cells.append("-" if row is None or "ratio" not in row else spread(row))
        rows.append(cells)
    base = ["plain step, ms"]
    for model in MODELS:
        row = found(result["ways"], model, "while training")
        base.append("-" if row is None else f"{row['plain milliseconds']:.0f}")
    return table(["", *MODELS], [base, *rows])


def threads_table(result: dict[str, Any]) -> str:
    rows = []
    for model in MODELS:
        ours, plain = (found(result["two threads"], model, way) for way in ("while training", "plain"))
        if ours is not None and plain is not None:
            rows.append([model, spread(ours), f"{plain['processors']:.2f}"])
    sweep = [["tokens per example", *(row["model"] for row in result["sweep"])]]
    sweep.append(["while training", *(f"{row['ratio']:.2f}" for row in result["sweep"])])
    two = table(["two threads", "while training", "processors that a plain step keeps busy"], rows)
    return two + "\n\n" + table(sweep[0], sweep[1:])


def memory_table(result: dict[str, Any]) -> str:
    rows = []
    for way in (*OURS, *RIVALS):
        cells = [way]
        for model in MODELS:
            row, base = (found(result["memory"], model, one) for one in (way, "plain"))
            known = row is not None and base is not None and "bytes" in row and is_right(result, model, way)
            cells.append(f"{row['bytes'] / base['bytes']:.2f}" if known else "-")
        rows.append(cells)
    base = ["plain step, MB", *(f"{found(result['memory'], model, 'plain')['bytes'] / 1e6:.0f}" for model in MODELS)]
    return table(["peak memory", *MODELS], [base, *rows])


def wrong_table(result: dict[str, Any]) -> str:
    rows = [[row["model"], row["way"], row["wrong"]] for row in result["ways"] if row.get("wrong")]
    return table(["model", "way", "what is not right"], rows)


def is_right(result: dict[str, Any], model: str, way: str) -> bool:
    row = found(result["ways"], model, way)
    return row is not None and not row.get("wrong")


def found(rows: list[dict[str, Any]], model: str, way: str) -> dict[str, Any] | None:
    return next((row for row in rows if (row["model"], row["way"]) == (model, way)), None)


def spread(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    digits = 2 if row["ratio"] < 10 else 1 if row["ratio"] < 100 else 0
    return f"{row['ratio']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def draw(result: dict[str, Any], path: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(2, 1))
    ways = [*OURS, *RIVALS]
    for model, mark in zip(MODELS, "os^D", strict=True):
        rows = [found(result["ways"], model, way) for way in ways]
        known = [(at, row) for at, row in enumerate(rows) if row is not None and "ratio" in row]
        left.plot([row["ratio"] for _, row in known], [at for at, _ in known], mark, alpha=0.8, label=model)
    left.axvline(1, color="0.6", linewidth=1)
    left.axhline(len(OURS) - 0.5, color="0.6", linewidth=0.5, linestyle=":")
    left.set(xscale="log", xlabel="time over that of a plain step", yticks=range(len(ways)))
    left.set_yticklabels(ways)
    left.invert_yaxis()
    left.legend()
    right.plot([int(row["model"]) for row in result["sweep"]], [row["ratio"] for row in result["sweep"]], "o-")
    right.axhline(1, color="0.6", linewidth=1)
    right.set(xscale="log", xlabel="tokens per example", ylabel="while training, over a plain step", ylim=(0.9, None))
    figure.savefig(path, metadata={"Date": None})
    # Matplotlib ends lines of paths with spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")

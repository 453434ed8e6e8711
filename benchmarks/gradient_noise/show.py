"""Tables and the figure of docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

from .models import MODELS
from .ways import OURS, RIVALS

FIRST = "1 thread, warm allocator"
_DOCS = Path(__file__).parents[2] / "docs"
_START, _END = "<!-- noise: tables -->", "<!-- noise: end -->"
_WAYS = (*OURS, *RIVALS)

Rows = list[dict[str, Any]]


def name_of(threads: int, allocator: str) -> str:
    """What a run is called in the file."""
    return f"{threads} thread{'s' * (threads > 1)}, {allocator} allocator"


def show(path: Path) -> None:
    """Print the tables, put them into the page, and draw the figure."""
    runs = json.loads(path.read_text("utf-8"))
    if FIRST not in runs:
        raise SystemExit(f"{path} has no run with {FIRST}: measure that first")
    first = runs[FIRST]
    parts = [ways_table(first), wrong_list(first), error_table(first)]
    if first.get("two threads"):
        parts.append(threads_table(first))
    if first.get("sweep"):
        parts.append(sweep_table(first))
    if first.get("memory"):
        parts.append(memory_table(first))
    parts += [f"{name}:\n\n{ways_table(one)}" for name, one in runs.items() if name != FIRST]
    parts.append(environment_line(first))
    tables = "\n\n".join(parts)
    print(tables)
    page = _DOCS / "benchmarks.md"
    before, rest = page.read_text("utf-8").split(_START)
    page.write_text(f"{before}{_START}\n\n{tables}\n\n{_END}{rest.split(_END)[1]}", "utf-8")
    draw(first, _DOCS / "noise.svg")


def ways_table(run: dict[str, Any]) -> str:
    """Ratios; a dash for what is not right, or was not tried."""
    known = models_of(run)
    rows = [["plain step, ms", *(cell(run["ways"], model, "plain", "milliseconds", "{:.0f}") for model in known)]]
    rows.append(
        ["floor: two passes in the cache", *(cell(run["ways"], model, "plain", "floor", "{:.2f}") for model in known)]
    )
    for way in _WAYS:
        found = [find(run["ways"], model, way) for model in known]
        if any(found):
            rows.append([way, *("-" if row is None or "ratio" not in row else spread(row) for row in found)])
    return table(["time over that of a plain step", *known], rows)


def wrong_list(run: dict[str, Any]) -> str:
    """What is not right with a way, once for all ways of which the same is to be said."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in run["ways"]:
        if row.get("wrong"):
            said.setdefault((row["model"], row["wrong"]), []).append(row["way"])
    for row in run["ways"]:
        if row.get("absent"):
            said.setdefault(("all models", "not installed"), []).append(row["way"])
    lines = [f"- {', '.join(dict.fromkeys(ways))} with {model}: {what}." for (model, what), ways in said.items()]
    return "\n".join(["Not timed:", "", *lines]) if lines else "None was wrong."


def error_table(run: dict[str, Any]) -> str:
    known = models_of(run)
    rows = []
    for way in _WAYS:
        cells = [cell(run["ways"], model, way, "error", "{:.0e}") for model in known]
        if any(one != "-" for one in cells):
            rows.append([way, *cells])
    return table(["relative error of Tr Σ", *known], rows)


def threads_table(run: dict[str, Any]) -> str:
    two, rows = run["two threads"], []
    for model in models_of(run):
        row = find(two, model, "while training")
        ratio = "-" if row is None or "ratio" not in row else spread(row)
        plain = [cell(two, model, "plain", "milliseconds", "{:.0f}"), cell(two, model, "plain", "processors", "{:.2f}")]
        rows.append([model, *plain, ratio])
    return table(["two threads", "plain step, ms", "processors it keeps busy", "while training"], rows)


def sweep_table(run: dict[str, Any]) -> str:
    rows = [row for row in run["sweep"] if "ratio" in row]
    heads = ["tokens per example", *(str(row["tokens"]) for row in rows)]
    return table(heads, [["while training", *(f"{row['ratio']:.2f}" for row in rows)]])


def memory_table(run: dict[str, Any]) -> str:
    known, peaks = models_of(run), run["memory"]
    bases = {model: find(peaks, model, "plain") for model in known}
    rows = [["plain step, MB", *("-" if base is None else f"{base['bytes'] / 1e6:.0f}" for base in bases.values())]]
    for way in _WAYS:
        cells = []
        for model, base in bases.items():
            row, judged = find(peaks, model, way), find(run["ways"], model, way)
            right = judged is not None and "ratio" in judged
            known_peak = right and base is not None and row is not None and "bytes" in row
            cells.append(number(row["bytes"] / base["bytes"]) if known_peak else "-")
        if any(one != "-" for one in cells):
            rows.append([way, *cells])
    return table(["peak memory over that of a plain step", *known], rows)


def environment_line(run: dict[str, Any]) -> str:
    about = run["environment"]
    versions = about["versions"]
    names = {"torch": "PyTorch", "transformers": "transformers", "backpack-for-pytorch": "BackPACK", "opacus": "Opacus"}
    said = ", ".join(f"{name} {versions[key]}" for key, name in names.items() if key in versions)
    return f"Measured in {run['rounds']} rounds with {said} on one core of an {about['processor']}."


def models_of(run: dict[str, Any]) -> list[str]:
    return [model for model in MODELS if model in run["models"]]


def find(rows: Rows, model: str, way: str) -> dict[str, Any] | None:
    return next((row for row in rows if (row["model"], row["way"]) == (model, way)), None)


def cell(rows: Rows, model: str, way: str, key: str, form: str) -> str:
    """A number; a dash where there is none, or where it is that of a way that is not right."""
    row = find(rows, model, way)
    return "-" if row is None or row.get("wrong") or row.get(key) is None else form.format(row[key])


def number(value: float, like: float | None = None) -> str:
    """Three digits of it, or as many decimals as those of another."""
    size = value if like is None else like
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def spread(row: dict[str, Any]) -> str:
    low, high = (number(one, row["ratio"]) for one in row["quartiles"])
    return f"{number(row['ratio'])} ({low} to {high})"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(heads) - 1), *lines[1:]])


def draw(run: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "path", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(2, 1))
    ways = [way for way in _WAYS if any("ratio" in row for row in run["ways"] if row["way"] == way)]
    for shift, (model, mark) in enumerate(zip(MODELS, "os^D", strict=True)):
        rows = [find(run["ways"], model, way) for way in ways]
        known = [(at + 0.15 * (shift - 1.5), row) for at, row in enumerate(rows) if row is not None and "ratio" in row]
        ratios = [row["ratio"] for _, row in known]
        # Of few rounds, a quartile may lie on the other side of the median by rounding.
        bars = [[abs(row["ratio"] - row["quartiles"][side]) for _, row in known] for side in (0, 1)]
        left.errorbar(ratios, [at for at, _ in known], xerr=bars, fmt=mark, markersize=5, capsize=2, label=model)
    left.axvline(1, color="0.6", linewidth=1)
    left.axhline(sum(way in OURS for way in ways) - 0.5, color="0.6", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="time over that of a plain step", yticks=range(len(ways)), yticklabels=ways)
    left.grid(axis="x", which="both", color="0.9", linewidth=0.5)
    left.invert_yaxis()
    left.legend()
    rows = [row for row in run.get("sweep", []) if "ratio" in row]
    at, ratios = [row["tokens"] for row in rows], [row["ratio"] for row in rows]
    bars = [[abs(row["ratio"] - row["quartiles"][side]) for row in rows] for side in (0, 1)]
    right.errorbar(at, ratios, yerr=bars, fmt="o-", markersize=4, capsize=2)
    right.axhline(1, color="0.6", linewidth=1)
    right.set(xscale="log", xlabel="tokens per example", ylabel="while training, over a plain step", xticks=at)
    right.set_xticks([], minor=True)
    right.set_xticklabels([str(one) for one in at], rotation=45)
    figure.savefig(path, metadata={"Date": None})
    # Matplotlib ends lines of paths with spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")

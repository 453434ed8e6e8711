"""The tables of `nf.equilibrate` beside SGD, for the terminal and for docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

from gradient_noise.show import table

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
START, END = "<!-- equilibrium: tables -->", "<!-- equilibrium: end -->"


def tables(result: dict[str, Any]) -> str:
    """Three tables, and a line on the machine."""
    rows = result["rows"]
    return "\n\n".join([cost_table(rows), drift_table(rows), parts_table(rows), environment_line(result)])


def write(path: Path) -> None:
    """Print the tables of a file and put them into the page."""
    text = tables(json.loads(path.read_text("utf-8")))
    print(text)
    before, rest = PAGE.read_text("utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}", "utf-8")


def cost_table(rows: list[dict[str, Any]]) -> str:
    heads = ["cost", "passes", "seconds", "SGD steps", "SGD seconds", "ratio", "of operations", "of examples"]
    cells = []
    for row in rows:
        ours, theirs, ratio = row["equilibrate"], row["SGD"], row["SGD over equilibrate"]
        times = [f"{ours['seconds']:.2f}", f"{theirs['steps']:,}", f"{theirs['seconds']:.1f}"]
        ratios = [f"{ratio[key]:.3g}" for key in ("seconds", "operations", "examples")]
        cells.append([title(row), str(ours["passes"]), *times, *ratios])
    return table(heads, cells)


def drift_table(rows: list[dict[str, Any]]) -> str:
    heads = ["largest relative drift", "start", "equilibrate", "SGD, best", "at step", "reached", "SGD to a half"]
    cells = []
    for row in rows:
        ours, theirs = row["equilibrate"], row["SGD"]
        half = theirs["steps until share of start"]["0.5"]
        cells.append(
            [
                title(row),
                f"{ours['drift before']['largest']:.2g}",
                f"{ours['drift after']['largest']:.0e}",
                f"{theirs['best drift']:.2g}",
                f"{theirs['steps until best']:,}",
                "yes" if theirs["reached"] else "no",
                "not reached" if half is None else f"{half:,} steps",
            ]
        )
    return table(heads, cells)


def parts_table(rows: list[dict[str, Any]]) -> str:
    parts = list(rows[0]["equilibrate"]["share of time"])
    # The rest is what the medians of the parts leave of 1, which may be slightly negative.
    shares = [[f"{max(row['equilibrate']['share of time'][part], 0):.0%}" for part in parts] for row in rows]
    return table(["share of time", *parts], [[title(row), *cells] for row, cells in zip(rows, shares, strict=True)])


def title(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['state']}"


def environment_line(result: dict[str, Any]) -> str:
    about = result["environment"]
    versions = f"PyTorch {about['versions']['torch']}, transformers {about['versions'].get('transformers', '-')}"
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    return f"Measured in {result['rounds']} rounds with {versions} on {threads} of an {about['processor']}."

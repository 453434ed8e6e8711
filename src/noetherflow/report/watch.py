"""The page of a recorded run: plain words, curves, and tables, in an HTML file by itself."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from noetherflow.record import Run
from noetherflow.report import charts, curves, document, parts
from noetherflow.report.watch_words import INTRODUCTION, UNKNOWN, layer_rows, sentences, symmetry_rows

_PACKAGE = "noetherflow.report"


def write(path: Path, run: Run) -> None:
    """Write the page, completely or not at all.

    Args:
        path: The HTML file.
        run: The run.

    Raises:
        FileError: If the file cannot be written.
    """
    body = {
        "name": html.escape(run.name),
        "summary": parts.paragraphs(sentences(run)),
        "introduction": html.escape(INTRODUCTION),
        "tables": _table("Last values by layer", layer_rows(run))
        + _table("Last values by symmetry", symmetry_rows(run)),
        "source": html.escape(run.source.name),
    }
    document.write(
        path,
        title=f"noetherflow: {run.name}",
        style=charts.style(),
        body=Template(document.asset(_PACKAGE, "watch.html")).substitute(body),
        data=charts.to_json(curves.charts_of(run)),
        scripts=charts.scripts(),
    )


def _table(heading: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A table under a heading, without columns of which nothing is known; nothing without rows."""
    used = [name for name in rows[0] if any(row[name] != UNKNOWN for row in rows)] if rows else []
    return parts.folded_table(heading, used, [[parts.Cell(row[name]) for name in used] for row in rows])

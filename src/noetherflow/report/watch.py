"""The page of a recorded run: plain words, curves, and tables, in an HTML file by itself."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from noetherflow._errors import FileError
from noetherflow.record import Run
from noetherflow.report import curves, document
from noetherflow.report.watch_words import INTRODUCTION, UNKNOWN, layer_rows, sentences, symmetry_rows

_PACKAGE = "noetherflow.report"
# A table with more rows than this is folded at first.
_OPEN = 40


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
        "summary": "\n".join(f"<p>{html.escape(text)}</p>" for text in sentences(run)),
        "introduction": html.escape(INTRODUCTION),
        "tables": _table("Last values by layer", layer_rows(run))
        + _table("Last values by symmetry", symmetry_rows(run)),
        "source": html.escape(run.source.name),
    }
    try:
        document.write(
            path,
            title=f"noetherflow: {run.name}",
            style=document.asset(_PACKAGE, "watch.css"),
            body=Template(document.asset(_PACKAGE, "watch.html")).substitute(body),
            data=curves.to_json(curves.charts_of(run)),
            scripts=(document.asset(_PACKAGE, "axis.js"), document.asset(_PACKAGE, "watch.js")),
        )
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}; check the path and its permissions") from error


def _table(heading: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A table under a heading, without columns of which nothing is known; nothing without rows."""
    if not rows:
        return ""
    used = [name for name in rows[0] if any(row[name] != UNKNOWN for row in rows)]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in used)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{html.escape(name)}"><bdi>{html.escape(row[name])}</bdi></td>' for name in used)
        + "</tr>"
        for row in rows
    )
    state = " open" if len(rows) <= _OPEN else ""
    return (
        f"<details{state}><summary>{html.escape(heading)} ({len(rows):,})</summary>"
        f'<div class="scroll"><table class="cards"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )

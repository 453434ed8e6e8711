"""The page of an analysis: plain words, a picture, and a table to sort, filter and fold, in an HTML file by itself."""

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from noetherflow import _versions
from noetherflow._analysis import Analysis
from noetherflow.equilibrium.result import ratio
from noetherflow.report import document, parts
from noetherflow.report.picture import picture
from noetherflow.report.rows import Row, Standing, rows_of
from noetherflow.report.words import INTRODUCTION, meaning, number, sentences

_PACKAGE = "noetherflow.report"
# Key of page.js, heading, and explanation below the table.
_COLUMNS = (
    ("name", "symmetry", ""),
    ("kind", "kind", ""),
    ("size", "size", "number of independent generators"),
    ("distance", "distance", "root mean square of x over coordinates, ± its standard error"),
    ("factor", "factor", "e^distance: by this factor weights typically differ from those at rest"),
    (
        "before",
        "imbalance",
        "relative drift |P - R| / |P + R| where the model is: 0 is rest, 1 a push without a pull",
    ),
    ("after", "at rest", "the relative drift at the equilibrium, on the data that was used"),
    ("holdoutBefore", "held out", "the relative drift where the model is, on data that was held out"),
    ("holdoutAfter", "held out, at rest", "the relative drift at the equilibrium, on data that was held out"),
    ("steps", "steps", "steps in which the distance shrinks by the factor e, median over coordinates"),
    ("slowest", "slowest", "the same for the slowest coordinate that has an equilibrium"),
    ("status", "status", ""),
)


def write(path: Path, analysis: Analysis) -> None:
    """Write the page, completely or not at all.

    Args:
        path: The HTML file.
        analysis: The analysis.
    """
    rows = rows_of(analysis)
    columns = [column for column in _COLUMNS if analysis.equilibrium.holdout or not column[0].startswith("holdout")]
    body = {
        "name": html.escape(path.stem),
        "introduction": html.escape(INTRODUCTION),
        "summary": parts.paragraphs(sentences(analysis, rows)),
        "notes": parts.notes(analysis.equilibrium.notes),
        "picture": picture(rows),
        "headings": "".join(
            f'<th scope="col" data-key="{key}"><button type="button">{heading}</button></th>'
            for key, heading, _ in columns
        ),
        "states": _states(rows),
        "legend": parts.pairs(
            {heading: explanation for _, heading, explanation in columns if explanation}
            | {status.replace("_", " "): meaning(status) for status in dict.fromkeys(r.report.status for r in rows)}
        ),
        "totals": _totals(analysis),
        "settings": parts.pairs(
            analysis.settings.listed | {"examples": analysis.noise.count, "measurements": analysis.equilibrium.passes}
        ),
        "versions": parts.pairs(_versions.versions()),
    }
    document.write(
        path,
        title=f"noetherflow: {path.stem}",
        style=document.asset(_PACKAGE, "page.css"),
        body=Template(document.asset(_PACKAGE, "page.html")).substitute(body),
        data=[row.to_json() for row in rows],
        scripts=(document.asset(_PACKAGE, "page.js"),),
    )


def _states(rows: Sequence[Row]) -> str:
    """The options of the filter: how far from rest, and each status that occurs."""
    standings = [standing.value for standing in Standing if any(row.standing is standing for row in rows)]
    statuses = dict.fromkeys(row.report.status.replace("_", " ") for row in rows)
    return "".join(f"<option>{html.escape(text)}</option>" for text in (*standings, *statuses))


def _totals(analysis: Analysis) -> str:
    """The table of noise and potential, now and at the equilibrium."""
    equilibrium = analysis.equilibrium
    totals = (
        ("gradient noise, Tr Sigma per example", equilibrium.trace_before, equilibrium.trace_after),
        ("potential, weight decay and noise together", equilibrium.potential_before, equilibrium.potential_after),
    )
    rows = "".join(
        f"<tr><td>{text}</td><td>{number(now)}</td><td>{number(then)}</td><td>{number(ratio(then, now))}</td></tr>"
        for text, now, then in totals
    )
    headings = "".join(f"<th>{heading}</th>" for heading in ("total", "now", "at rest", "ratio"))
    return f'<table class="totals"><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>'

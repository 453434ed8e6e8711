"""The report: one page with every verdict and every figure, which needs nothing but itself."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from noetherflow import _files
from noetherflow.paper.claim import Claim
from noetherflow.paper.results import Result, measured, theory

# The label of a cell is its heading, which stands beside it where the screen is too narrow for a row.
_CELL = '<td data-label="{label}" data-sort="{sort}"><span>{text}</span></td>'


def write(path: Path, results: Sequence[Result], notes: Mapping[str, str]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: The HTML file; the SVG files of the results are beside it.
        results: What is shown, in this order.
        notes: Why there is nothing to show of other figures, by their names.
    """
    library = plotly() if any(result.panels for result in results) else ""
    failed = [(result, claim) for result in results for claim in result.claims if not claim.holds]
    content = {
        "style": _asset("page.css"),
        "script": _asset("page.js"),
        "library": f"<script>{library}</script>" if library else "",
        "summary": _summary(results, failed),
        "rows": "\n".join(_row(result, number) for result in results for number in range(len(result.claims))),
        "notes": "\n".join(
            f'<p class="note"><strong>{html.escape(name)}</strong> {html.escape(note)}</p>'
            for name, note in notes.items()
        ),
        "figures": "\n".join(_section(result, path.parent, drawn=bool(library)) for result in results),
        "data": _embedded({result.name: result.panels for result in results} if library else {}),
    }
    with _files.atomic(path) as temporary:
        temporary.write_text(Template(_asset("page.html")).substitute(content), encoding="utf-8")


def plotly() -> str:
    """The source of plotly.js; empty where the package is not installed, and the page has pictures only."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    source: str = get_plotlyjs()
    return source


def _summary(results: Sequence[Result], failed: Sequence[tuple[Result, Claim]]) -> str:
    total = sum(len(result.claims) for result in results)
    if not failed:
        return f'<p class="holds">{_count(total)} checked, all hold.</p>' if total else "<p>Nothing to show yet.</p>"
    items = "".join(
        f'<li><a href="#{result.name}">{html.escape(result.name)}</a> {html.escape(claim.text)}: '
        f'<strong class="fails">FAILS</strong> with {html.escape(measured(claim))}, '
        f"not in {html.escape(claim.band)}</li>"
        for result, claim in failed
    )
    return f'<p class="fails">{len(failed)} of {_count(total)} FAIL:</p><ul>{items}</ul>'


def _count(claims: int) -> str:
    return f"{claims} claim{'s' * (claims != 1)}"


def _row(result: Result, number: int) -> str:
    claim = result.claims[number]
    verdict = "holds" if claim.holds else "fails"
    shown = "holds" if claim.holds else f"<strong>FAILS</strong> with {html.escape(measured(claim))}"
    name = html.escape(result.name)
    cells = (
        ("figure", f"{name}.{number:03d}", f'<a href="#{name}">{name}</a>'),
        ("claim", html.escape(claim.text), html.escape(claim.text)),
        ("theory", _sortable(claim.predicted), html.escape(theory(claim))),
        ("measured", _sortable(claim.measured), html.escape(measured(claim))),
        ("band", html.escape(claim.band), html.escape(claim.band)),
        ("verdict", verdict, shown),
    )
    filled = "".join(_CELL.format(label=label, sort=sort, text=text) for label, sort, text in cells)
    return f'<tr class="{verdict}">{filled}</tr>'


def _sortable(value: float) -> str:
    """A number as JavaScript reads it."""
    return repr(value) if math.isfinite(value) else "NaN" if value != value else f"{'-' * (value < 0)}Infinity"


def _section(result: Result, folder: Path, *, drawn: bool) -> str:
    name, failed = html.escape(result.name), sum(not claim.holds for claim in result.claims)
    settings = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(_setting(value))}</dd>" for key, value in result.settings.items()
    )
    versions = ", ".join(f"{key} {value}" for key, value in result.versions.items())
    verdict = f'<span class="fails">{failed} FAIL</span>' if failed else '<span class="holds">all hold</span>'
    return f"""<section id="{name}">
<h2>{name} <span>{html.escape(result.title)}</span></h2>
<p>{_count(len(result.claims))}, {verdict}. {"Reduced size" if result.quick else "Full size"},
seed {html.escape(_setting(result.settings.get("seed")))}, {result.seconds:.1f} s.</p>
{_panels(result) if drawn and result.panels else _picture(result.name, folder)}
<details><summary>Settings, versions, and the command to run it again</summary>
<pre><code>{html.escape(result.command)}</code></pre>
<p>{html.escape(versions)}</p>
<dl>{settings}</dl>
</details>
</section>"""


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _panels(result: Result) -> str:
    """Room for each panel, which the script fills."""
    name = html.escape(result.name)
    room = "".join(
        f'<figure class="panel" data-figure="{name}" data-panel="{number}" role="img" '
        f'aria-label="{html.escape(panel["title"])}"></figure>'
        for number, panel in enumerate(result.panels)
    )
    return f'<div class="panels">{room}</div>'


def _picture(name: str, folder: Path) -> str:
    """The SVG as part of the page, with a switch that makes it larger than the screen."""
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # Pictures on one page share one space of ids, and each begins to count anew.
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return f"""<div class="picture"><label><input type="checkbox"> enlarge</label>
<div class="scroll">{svg}</div></div>"""


def _embedded(content: object) -> str:
    """JSON that can stand inside a script element, whatever its strings say."""
    return json.dumps(_files.finite(content), allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files("noetherflow.paper").joinpath(name).read_text(encoding="utf-8")

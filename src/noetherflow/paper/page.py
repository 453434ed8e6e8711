"""The report: a self-contained HTML page with the verdict of every claim and with every figure."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from noetherflow.paper.claim import Claim
from noetherflow.paper.results import Result, measured, theory
from noetherflow.report import document, parts

# `data-label` repeats the column heading: page.css shows it on screens too narrow for a table row.
_CELL = '<td data-label="{label}" data-sort="{sort}"><span>{text}</span></td>'


def write(path: Path, results: Sequence[Result], notes: Mapping[str, str]) -> None:
    """Write the page atomically.

    Args:
        path: The HTML file. Its folder holds the SVG files of the results.
        results: The results to show, in this order.
        notes: For each figure without a result, the reason.
    """
    library = plotly() if any(result.panels for result in results) else ""
    failed = [(result, claim) for result in results for claim in result.claims if not claim.holds]
    body = {
        "summary": _summary(results, failed),
        "rows": "\n".join(_row(result, number) for result in results for number in range(len(result.claims))),
        "notes": "\n".join(
            f'<p class="note"><strong>{html.escape(name)}</strong> {html.escape(note)}</p>'
            for name, note in notes.items()
        ),
        "figures": "\n".join(_section(result, path.parent, interactive=bool(library)) for result in results),
    }
    document.write(
        path,
        title="noetherflow: every claim with its verdict",
        style=_asset("page.css"),
        body=Template(_asset("page.html")).substitute(body),
        data={result.name: result.panels for result in results} if library else {},
        scripts=(library, _asset("page.js")),
    )


def plotly() -> str:
    """The source of plotly.js; empty if plotly is not installed. Without plotly.js the page shows SVG figures."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    source: str = get_plotlyjs()
    return source


def _summary(results: Sequence[Result], failed: Sequence[tuple[Result, Claim]]) -> str:
    """HTML of the number of claims and the list of failed claims."""
    total = sum(len(result.claims) for result in results)
    if not failed:
        return f'<p class="holds">{_count(total)} checked, all hold.</p>' if total else "<p>No results yet.</p>"
    items = "".join(
        f'<li><a href="#{result.name}">{html.escape(result.name)}</a> {html.escape(claim.text)}: '
        f'<strong class="fails">FAILS</strong> with {html.escape(measured(claim))}, '
        f"not in {html.escape(claim.band)}</li>"
        for result, claim in failed
    )
    return f'<p class="fails">{len(failed)} of {_count(total)} FAIL:</p><ul>{items}</ul>'


def _count(claims: int) -> str:
    """The number of claims with its noun, such as "2 claims"."""
    return f"{claims} claim{'s' * (claims != 1)}"


def _row(result: Result, number: int) -> str:
    """HTML of the table row of a claim."""
    claim = result.claims[number]
    verdict = "holds" if claim.holds else "fails"
    shown = "holds" if claim.holds else f"<strong>FAILS</strong> with {html.escape(measured(claim))}"
    name = html.escape(result.name)
    cells = (
        ("figure", f"{name}.{number:03d}", f'<a href="#{name}">{name}</a>'),
        ("claim", html.escape(claim.text), html.escape(claim.text)),
        ("theory", parts.sort_key(claim.predicted), html.escape(theory(claim))),
        ("measured", parts.sort_key(claim.measured), html.escape(measured(claim))),
        ("band", html.escape(claim.band), html.escape(claim.band)),
        ("verdict", verdict, shown),
    )
    filled = "".join(_CELL.format(label=label, sort=sort, text=text) for label, sort, text in cells)
    return f'<tr class="{verdict}">{filled}</tr>'


def _section(result: Result, folder: Path, *, interactive: bool) -> str:
    """HTML of the section of a figure: plots or SVG, settings, versions and the command."""
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
{_panels(result) if interactive and result.panels else _picture(result.name, folder)}
<details><summary>Settings, versions, and the command that repeats the run</summary>
<pre><code>{html.escape(result.command)}</code></pre>
<p>{html.escape(versions)}</p>
<dl>{settings}</dl>
</details>
</section>"""


def _setting(value: object) -> str:
    """The value of a setting as text; tuples are separated by commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _panels(result: Result) -> str:
    """HTML elements, one for each panel, into which page.js draws."""
    name = html.escape(result.name)
    elements = "".join(
        f'<figure class="panel" data-figure="{name}" data-panel="{number}" role="img" '
        f'aria-label="{html.escape(panel["title"])}"></figure>'
        for number, panel in enumerate(result.panels)
    )
    return f'<div class="panels">{elements}</div>'


def _picture(name: str, folder: Path) -> str:
    """HTML of an inline SVG figure with a checkbox that enlarges the figure beyond the width of the screen."""
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # All SVG figures of the page share a namespace of ids, and matplotlib reuses ids: prefix the name of the figure.
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return f"""<div class="picture"><label><input type="checkbox"> enlarge</label>
<div class="scroll">{svg}</div></div>"""


def _asset(name: str) -> str:
    """Text of a file of this folder."""
    return document.asset("noetherflow.paper", name)

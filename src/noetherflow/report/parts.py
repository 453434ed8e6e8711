"""Parts of HTML that pages share: paragraphs, notes, settings, and tables to sort and fold."""

import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, final

# A table with more rows than this is folded at first.
_OPEN = 40


@final
class Cell(NamedTuple):
    """A cell of a table.

    Args:
        text: What is read.
        sort: The number by which a row is sorted; None for the text. NaN stays at the end.
        message: What is read below the text, in small letters.
    """

    text: str
    sort: float | None = None
    message: str = ""


def paragraphs(texts: Iterable[str]) -> str:
    """A paragraph for each text."""
    return "\n".join(f"<p>{html.escape(text)}</p>" for text in texts)


def small(texts: Iterable[str]) -> str:
    """A paragraph in quiet letters for each text."""
    return "\n".join(f'<p class="note">{html.escape(text)}</p>' for text in texts)


def bullets(texts: Sequence[str]) -> str:
    """Texts as a list; nothing without texts."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def notes(texts: Sequence[str]) -> str:
    """What was left out or done in another way."""
    return small(["Left out, or done in another way:"]) + bullets(texts) if texts else ""


def pairs(values: Mapping[str, object]) -> str:
    """Names and values as a list of definitions."""
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(_text(value))}</dd>" for key, value in values.items())
    return f"<dl>{items}</dl>"


def folded(heading: str, content: str, *, unfolded: bool) -> str:
    """Content that a click on its heading folds and unfolds."""
    state = " open" if unfolded else ""
    return f"<details{state}><summary>{html.escape(heading)}</summary>{content}</details>"


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """A table, on a narrow screen a card for each row.

    Args:
        columns: The headings.
        rows: The cells, a cell for each column.
        sortable: Whether headings are buttons, by which `table.js` sorts the rows.

    Returns:
        HTML.
    """
    head = "".join(f'<th scope="col">{_heading(text, sortable=sortable)}</th>' for text in columns)
    body = "".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in rows)
    kind = "cards sortable" if sortable else "cards"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded_table(
    heading: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, sortable: bool = False
) -> str:
    """A table that folds under a heading with the number of its rows; nothing without rows."""
    if not rows:
        return ""
    content = table(columns, rows, sortable=sortable)
    return folded(f"{heading} ({len(rows):,})", content, unfolded=len(rows) <= _OPEN)


def sort_key(value: float) -> str:
    """A number as text that the JavaScript function `Number` parses."""
    return repr(value) if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"


def _heading(text: str, *, sortable: bool) -> str:
    return f'<button type="button">{html.escape(text)}</button>' if sortable else html.escape(text)


def _cell(column: str, cell: Cell) -> str:
    key = "" if cell.sort is None else f' data-sort="{sort_key(cell.sort)}"'
    message = f'<span class="message">{html.escape(cell.message)}</span>' if cell.message else ""
    return f'<td data-label="{html.escape(column)}"{key}><bdi>{html.escape(cell.text)}</bdi>{message}</td>'


def _text(value: object) -> str:
    """A setting as text; of a setting by parameter, how many parameters have each value."""
    if isinstance(value, Mapping):
        counts = Counter(value.values()).items()
        return ", ".join(f"{_text(key)} for {count:,} parameter{'s' * (count != 1)}" for key, count in counts)
    return f"{value:.6g}" if isinstance(value, float) else str(value)

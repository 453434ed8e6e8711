"""Plain tables: as text that fits a terminal, and as HTML for notebooks."""

import html
import math
import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

# Spaces between columns: 2 where they fit, else 1.
_GAPS = (2, 1)
# Columns that fold are narrowed to this width first; only then the columns that do not fold are narrowed.
_LEAST = 8
# Rows by which widths are chosen.
_SAMPLE = 60
# Names that a note lists.
_LISTED = 6
# The dot between two names.
_DOT = re.compile(r"\.(?=[^\W\d]|\{)")


@final
@dataclass(frozen=True)
class Column:
    """The heading and the layout of a column.

    Args:
        heading: The text above the cells.
        right: Whether cells are aligned on the right, as numbers are.
        folds: Whether long cells are folded if the table is too wide. Columns that do not fold are narrowed last.
    """

    heading: str
    right: bool = False
    folds: bool = False


@final
@dataclass(frozen=True)
class Table:
    """A title, columns, rows of text, and notes below the rows.

    Args:
        title: The text above the table, or an empty string.
        columns: The columns. If all headings are empty, the table has neither a line of headings nor a rule.
        rows: The cells, one per column. A line break in a cell starts a new line of that cell.
        notes: Sentences below the table.

    Raises:
        ValueError: If the number of cells of a row is not that of the columns.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells in a row, got {len(row)}: {row}")

    def text(self, width: int | None = None) -> str:
        """The table as lines of at most `width` characters, by default the width of the terminal."""
        width = width or shutil.get_terminal_size().columns
        headed = any(column.heading for column in self.columns)
        grid = [tuple(column.heading for column in self.columns)] * headed + list(self.rows)
        cells = [[_legible(cell).split("\n") for cell in row] for row in grid]
        widths, gap = _widths(self.columns, cells, width)
        lines = _fold(_legible(self.title), width) if self.title else []
        for index, row in enumerate(cells):
            lines += _lay_out(row, self.columns, widths, gap)
            if headed and index == 0:
                lines.append("-" * (sum(widths) + gap * (len(widths) - 1)))
        for note in self.notes:
            lines += _fold(_legible(note), width)
        return "\n".join(lines)

    def html(self) -> str:
        """The table as a `<table>` element, followed by the notes; every text is escaped."""
        parts = ["<table>"]
        if self.title:
            parts.append(f'<caption style="text-align:left;white-space:nowrap">{_escaped(self.title)}</caption>')
        headings = [column.heading for column in self.columns]
        if any(headings):
            parts.append(f"<thead>{self._html_row('th', headings)}</thead>")
        parts += ["<tbody>", *(self._html_row("td", row) for row in self.rows), "</tbody>", "</table>"]
        parts += [f"<p>{_escaped(note)}</p>" for note in self.notes]
        return "\n".join(parts)

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if column.right else "left" for column in self.columns)
        filled = zip(sides, cells, strict=True)
        return (
            "<tr>" + "".join(f'<{tag} style="text-align:{side}">{_escaped(c)}</{tag}>' for side, c in filled) + "</tr>"
        )


def text_of(tables: Sequence[Table], width: int | None = None) -> str:
    """Tables as text, separated by empty lines."""
    return "\n\n".join(table.text(width) for table in tables)


def html_of(tables: Sequence[Table]) -> str:
    """Tables as a `<div>` element."""
    return "<div>\n" + "\n".join(table.html() for table in tables) + "\n</div>"


def steps(count: float) -> str:
    """A number of steps with separators of thousands, such as `46,853`; `never` for infinity."""
    return f"{count:,.0f}" if count < 1e7 else "never" if count == float("inf") else f"{count:.1e}"


def known(value: float, form: str) -> str:
    """A number in a format, such as `.3f`; `-` for NaN, a number that is not known."""
    return "-" if math.isnan(value) else format(value, form)


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[Sequence[str]]], width: int) -> tuple[list[int], int]:
    """The width of every column, and the gap between columns.

    A column has the width of its longest line. If the table is too wide, a column is narrowed by a character until it
    fits: the column for which the table gets the fewest lines, and among those the widest.

    Returns:
        The widths and the gap, in characters.
    """
    sizes = [max([_size(line) for row in cells for line in row[k]], default=0) for k in range(len(columns))]
    gap = next((gap for gap in _GAPS if sum(sizes) + gap * (len(columns) - 1) <= width), _GAPS[-1])
    room = max(width - gap * (len(columns) - 1), len(columns))
    widths = [min(size, room) for size in sizes]
    # A sample of the rows, because every row costs time for every character of width.
    heights = _Heights(cells[:: len(cells) // _SAMPLE + 1])
    while sum(widths) > room:
        foldable = [k for k, column in enumerate(columns) if column.folds and widths[k] > _LEAST]
        candidates = foldable or [max(range(len(columns)), key=widths.__getitem__)]
        lines = {
            k: heights.total([*widths[:k], widths[k] - 1, *widths[k + 1 :]]) for k in candidates[1:] and candidates
        }
        widths[min(candidates, key=lambda k: (lines.get(k, 0), -widths[k]))] -= 1
    return widths, gap


@final
class _Heights:
    """The number of lines of a table by the widths of its columns."""

    def __init__(self, cells: Sequence[Sequence[Sequence[str]]]) -> None:
        self._cells = cells
        # For a column and a width, the number of lines of each cell.
        self._columns: dict[tuple[int, int], list[int]] = {}

    def total(self, widths: Sequence[int]) -> int:
        """The number of lines of all rows; a row is as high as its highest cell."""
        return sum(map(max, zip(*(self._column(k, width) for k, width in enumerate(widths)), strict=True)))

    def _column(self, k: int, width: int) -> list[int]:
        if (k, width) not in self._columns:
            lines = [sum(len(_fold(line, width)) for line in row[k]) for row in self._cells]
            self._columns[k, width] = lines
        return self._columns[k, width]


def _lay_out(row: Sequence[Sequence[str]], columns: Sequence[Column], widths: Sequence[int], gap: int) -> list[str]:
    """The lines of a row: cells folded to the widths of their columns, then padded."""
    folded = [[part for line in cell for part in _fold(line, size)] for cell, size in zip(row, widths, strict=True)]
    lines = []
    for index in range(max(map(len, folded), default=0)):
        pieces = []
        for column, size, parts in zip(columns, widths, folded, strict=True):
            piece = parts[index] if index < len(parts) else ""
            padding = " " * (size - _size(piece))
            pieces.append(padding + piece if column.right else piece + padding)
        lines.append((" " * gap).join(pieces).rstrip())
    return lines


def _fold(line: str, width: int) -> list[str]:
    """The parts of a line, each of at most `width`: cut at a space, else before a dot of a name, else anywhere."""
    parts = []
    while (fits := _fitting(line, width)) < len(line):
        space = line.rfind(" ", 0, fits + 1)
        dots = [match.start() for match in _DOT.finditer(line, 1, fits + 2) if match.start() <= fits]
        cut = space if line[: max(space, 0)].strip() else dots[-1] if dots else fits
        parts.append(line[:cut].rstrip())
        line = line[cut:].lstrip()
    return [*parts, line]


def _fitting(line: str, width: int) -> int:
    """The number of characters that fit into a width, at least 1."""
    used = 0
    for count, character in enumerate(line):
        used += _size(character)
        if used > width:
            return max(count, 1)
    return len(line)


def _size(text: str) -> int:
    """The width of a text on a terminal: 2 for East Asian wide characters, 0 for combining marks."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _legible(text: str) -> str:
    """A text in which control characters, except the line break, are written as escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _escaped(text: str) -> str:
    """A text as HTML."""
    return html.escape(_legible(text)).replace("\n", "<br>")


def starred(messages: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on the rows that a star marks, a note for each message.

    Args:
        messages: The name of each row and its message, which may be empty.

    Returns:
        The notes; rows with equal messages share a note, which lists the first few of them.
    """
    rows: dict[str, list[str]] = {}
    for name, message in messages:
        if message:
            rows.setdefault(message, []).append(name)
    notes = []
    for message, names in rows.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        notes.append(f"* {', '.join(names[:_LISTED])}{more}: {message}")
    return notes

"""Plain tables: as text that fits a terminal, and as HTML for notebooks."""

import html
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

# Spaces between columns: 2 where they fit, else 1.
_GAPS = (2, 1)
# A column that folds keeps this many characters as long as a column that does not fold can be narrowed.
_LEAST = 8


@final
@dataclass(frozen=True)
class Column:
    """The heading of a column, and how its cells are laid out.

    Args:
        heading: What stands above the cells.
        right: Whether cells are aligned on the right, as numbers are.
        folds: Whether long cells are folded where the table is too wide; others are folded last.
    """

    heading: str
    right: bool = False
    folds: bool = False


@final
@dataclass(frozen=True)
class Table:
    """A title, columns, rows of text, and notes below; without headings it has neither head nor rule.

    Args:
        title: Above the table; empty for none.
        columns: One per cell of a row.
        rows: The cells. A line break inside a cell starts a new line of that cell.
        notes: Sentences below the table.

    Raises:
        ValueError: If a row has not one cell per column.
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
        """Lines of at most `width` characters, by default the width of the terminal; no line break at the end."""
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
        """A `<table>` followed by the notes; every text is escaped."""
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
    """Several tables below each other, with an empty line between two."""
    return "\n\n".join(table.text(width) for table in tables)


def html_of(tables: Sequence[Table]) -> str:
    """Several tables below each other, as HTML."""
    return "<div>\n" + "\n".join(table.html() for table in tables) + "\n</div>"


def steps(count: float) -> str:
    """A number of steps as people write it; infinity is `never`."""
    return f"{count:,.0f}" if count < 1e7 else "never" if count == float("inf") else f"{count:.1e}"


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[Sequence[str]]], width: int) -> tuple[list[int], int]:
    """The width of every column, that of its longest line, narrowed until the table fits; and the gap between two."""
    sizes = [max([_size(line) for row in cells for line in row[k]], default=0) for k in range(len(columns))]
    gap = next((gap for gap in _GAPS if sum(sizes) + gap * (len(columns) - 1) <= width), _GAPS[-1])
    room = max(width - gap * (len(columns) - 1), len(columns))
    widths = [min(size, room) for size in sizes]
    while sum(widths) > room:
        foldable = [k for k, column in enumerate(columns) if column.folds and widths[k] > _LEAST]
        widest = max(foldable or range(len(columns)), key=widths.__getitem__)
        widths[widest] -= 1
    return widths, gap


def _lay_out(row: Sequence[Sequence[str]], columns: Sequence[Column], widths: Sequence[int], gap: int) -> list[str]:
    """The lines of one row: cells folded to their widths, then padded."""
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
    """A line cut into parts of at most `width`: at a space where there is one, else inside a word."""
    parts = []
    while (fits := _fitting(line, width)) < len(line):
        space = line.rfind(" ", 0, fits + 1)
        cut = space if line[: max(space, 0)].strip() else fits
        parts.append(line[:cut].rstrip())
        line = line[cut:].lstrip()
    return [*parts, line]


def _fitting(line: str, width: int) -> int:
    """How many characters fit into a width, at least 1."""
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
    """A text in which no character but the line break acts on the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _escaped(text: str) -> str:
    return html.escape(_legible(text)).replace("\n", "<br>")

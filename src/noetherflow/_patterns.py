"""Rows of a table that differ in integers only, such as those of equal blocks, merged into a row with a pattern.

A cell is a sequence of texts and integers: `("h.", 3, ".weight")`. Rows are merged if their texts and keys agree. In a
merged row, an integer that varies is written in braces: at its first occurrence as a variable with all its values, and
after that as an expression of that variable.

| rows | merged |
|---|---|
| `h.0.fc`, `h.1.fc`, `h.2.fc` | `h.{i=0..2}.fc` |
| `0 -> 2`, `2 -> 4`, `4 -> 6`, `6 -> 8` | `{i=0, 2, ..., 6} -> {i+2}` |
| head 0 of `w[0:4]`, head 1 of `w[4:8]`, head 2 of `w[8:12]` | head `{i=0..2}` of `w[{4i}:{4i+4}]` |

A row with several variables stands for all combinations of their values. Rows for which a combination is missing are
merged in parts. So the rows can be recovered from the merged rows.
"""

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

Cell = tuple[str | int, ...]
"""Texts and integers, in the order in which they are written."""

# Fewer rows than this are not merged.
_LEAST = 3
# The variables. A row with more variables would stand for more than 200 000 rows.
_LETTERS = "ijklmnopqrstuvwxyz"
# An integer without leading zeros, so that writing the integer gives the digits again.
_INTEGER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
# A decimal number. Between parentheses stands the path of a module, which can be `0.1`.
_DECIMAL = re.compile(r"((?<![\w.(])\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.)]))")


@final
@dataclass(frozen=True)
class Pattern:
    """A row, or several rows merged.

    Args:
        cells: The texts of the cells.
        rows: The indices of the rows for which the cells stand.
    """

    cells: tuple[str, ...]
    rows: tuple[int, ...]


def cell_of_name(name: str) -> Cell:
    """The texts and integers of the name of a parameter, a module or a symmetry."""
    # The integers are the group of the expression, so they stand at odd places.
    parts = _INTEGER.split(name)
    return tuple(int(part) if k % 2 else part for k, part in enumerate(parts) if part)


def cell_of_sentence(sentence: str) -> Cell:
    """The texts and integers of a sentence with names; decimal numbers, such as `1e-05`, remain text."""
    parts: list[str | int] = []
    for piece in _DECIMAL.split(sentence):
        parts += (piece,) if _DECIMAL.fullmatch(piece) and not piece.isdigit() else cell_of_name(piece)
    return tuple(parts)


def merge(rows: Sequence[Sequence[Cell]], keys: Sequence[Hashable]) -> list[Pattern]:
    """Merge rows whose texts and keys agree.

    Args:
        rows: The cells of every row.
        keys: For every row what must agree besides the texts; one per row.

    Returns:
        The merged rows and the rows that stay as they are, ordered by their first row.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, (cells, key) in enumerate(zip(rows, keys, strict=True)):
        texts = tuple(tuple(part if isinstance(part, str) else None for part in cell) for cell in cells)
        # Braces of a name would be read as a pattern.
        braces = any(isinstance(part, str) and set("{}") & set(part) for cell in cells for part in cell)
        groups.setdefault(number if braces else (texts, key), []).append(number)
    integers = [tuple(part for cell in cells for part in cell if isinstance(part, int)) for cells in rows]
    products = [part for group in groups.values() for part in _products(group, integers)]
    return [
        Pattern(_texts(rows[product[0]], [integers[number] for number in product]), tuple(product))
        for product in sorted(products)
    ]


def _products(group: list[int], integers: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Parts of a group of rows in which all combinations of the values of the variables occur, each once."""
    members = [integers[number] for number in group]
    if len(group) < _LEAST or len(set(members)) < len(group):
        return [[number] for number in group]
    variables = _variables(members)
    if math.prod(len({member[k] for member in members}) for k in variables) == len(group):
        return [group]
    for k in variables:
        # Values of a variable that occur with equal values of the remaining variables stay together.
        remaining: dict[int, set[tuple[int, ...]]] = {}
        for member in members:
            remaining.setdefault(member[k], set()).add(tuple(member[m] for m in variables if m != k))
        parts: dict[frozenset[tuple[int, ...]], list[int]] = {}
        for number in group:
            parts.setdefault(frozenset(remaining[integers[number][k]]), []).append(number)
        if len(parts) > 1:
            return [product for part in parts.values() for product in _products(part, integers)]
    raise AssertionError("values that all occur with equal remaining values form a product")


def _variables(members: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, int, int]]:
    """The places of integers that vary, except those that an earlier place determines; with (place, 1, 0)."""
    return {k: relation for k, relation in _relations(members).items() if relation[0] == k}


def _relations(members: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, int, int]]:
    """For every place at which integers vary: a place of a variable, a factor and a summand that give the integers."""
    relations: dict[int, tuple[int, int, int]] = {}
    for k, values in enumerate(zip(*members, strict=True)):
        if len(set(values)) > 1:
            earlier = (m for m in relations if relations[m][0] == m)
            fits = (fit for m in earlier if (fit := _relation(m, [member[m] for member in members], values)))
            relations[k] = next(fits, (k, 1, 0))
    return relations


def _relation(place: int, x: Sequence[int], y: Sequence[int]) -> tuple[int, int, int] | None:
    """The place of x, a factor a and a summand b with y = a x + b for integers a and b; None if there are none."""
    low, high = x.index(min(x)), x.index(max(x))
    factor, remainder = divmod(y[high] - y[low], x[high] - x[low])
    summand = y[low] - factor * x[low]
    if remainder or any(factor * a + summand != b for a, b in zip(x, y, strict=True)):
        return None
    return place, factor, summand


def _texts(cells: Sequence[Cell], members: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    """The cells of the first row with integers that vary replaced by variables and expressions."""
    relations = _relations(members)
    letters = dict(zip(_variables(members), _LETTERS, strict=False))
    written = {}
    for place, (source, factor, summand) in relations.items():
        if source == place:
            written[place] = f"{{{letters[place]}={_values({member[place] for member in members})}}}"
        else:
            written[place] = f"{{{_expression(letters[source], factor, summand)}}}"
    texts, place = [], 0
    for cell in cells:
        text = ""
        for part in cell:
            if isinstance(part, int):
                text += written.get(place, str(part))
                place += 1
            else:
                text += part
        texts.append(text)
    return tuple(texts)


def _expression(letter: str, factor: int, summand: int) -> str:
    """The text of factor * letter + summand, such as `i`, `i+2` or `4i+8`."""
    product = {1: letter, -1: f"-{letter}"}.get(factor, f"{factor}{letter}")
    return product + (f"{summand:+d}" if summand else "")


def _values(values: Iterable[int]) -> str:
    """Integers such as `0..11`, `0..3, 5` or `0, 2, ..., 10`."""
    ordered = sorted(values)
    steps = {b - a for a, b in pairwise(ordered)}
    if len(ordered) > 3 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}, {ordered[1]}, ..., {ordered[-1]}"
    runs: list[list[int]] = []
    for value in ordered:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)

"""Reads merged rows of a table back: all rows for which a row with `{i=0..3}` stands."""

import itertools
import re
from collections.abc import Sequence

_DEFINED = re.compile(r"\{([a-z])=([^}]*)\}")
_WRITTEN = re.compile(r"\{(-?\d*)([a-z])([+-]\d+)?\}")
_SLICE = re.compile(r"\[(-?\d*[a-z](?:[+-]\d+)?):(-?\d*[a-z](?:[+-]\d+)?)\]")


def values(text: str) -> list[int]:
    """`0..3, 5` and `0, 2, ..., 8` as lists."""
    if match := re.fullmatch(r"(\d+), (\d+), \.\.\., (\d+)", text):
        first, second, last = map(int, match.groups())
        return list(range(first, last + 1, second - first))
    runs = [part.split("..") for part in text.split(", ")]
    return [value for run in runs for value in range(int(run[0]), int(run[-1]) + 1)]


def expanded(cells: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows for which a row stands."""
    defined = {letter: values(text) for letter, text in _DEFINED.findall("\n".join(cells))}
    rows = []
    for chosen in itertools.product(*defined.values()):
        numbers = dict(zip(defined, chosen, strict=True))

        def number(match: re.Match[str], numbers: dict[str, int] = numbers) -> str:
            factor = {"": 1, "-": -1}.get(match[1]) or int(match[1])
            return str(factor * numbers[match[2]] + int(match[3] or 0))

        plain = (_SLICE.sub(r"[{\1}:{\2}]", _DEFINED.sub(r"{\1}", cell)) for cell in cells)
        rows.append(tuple(_WRITTEN.sub(number, cell) for cell in plain))
    return rows

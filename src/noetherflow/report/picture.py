"""The picture of the page: the distance of every symmetry from rest with its error, block by block, as inline SVG.

Horizontal positions are percentages, so that the picture fits any width with letters of constant size.
"""

import html
import math
from collections.abc import Iterable, Sequence
from statistics import median

from noetherflow.report.rows import Row, Standing, by_block
from noetherflow.report.words import number

# More symmetries than this are drawn as a mark per block; of more blocks than this, those with the largest distances.
_MOST_ROWS = 300
_MOST_BLOCKS = 150
# Heights in pixels: the scale above the first block, the name of a block, and a symmetry.
_SCALE, _LABEL, _LANE = 44, 24, 13
# Positions of the smallest and the largest distance, in per cent of the width.
_LEFT, _RIGHT = 3.0, 92.0
_LETTERS = 44
# The classes of page.css, which are the colours of symmetries.
_KINDS = {
    "far": Standing.FAR.value,
    "rest": Standing.REST.value,
    "unknown": Standing.UNKNOWN.value,
    "open": "a status other than converged",
}


def picture(rows: Sequence[Row]) -> str:
    """The picture and its caption as HTML; empty if no symmetry has a distance."""
    drawn = [row for row in rows if math.isfinite(row.report.distance)]
    if not drawn:
        return ""
    blocks = by_block(drawn)
    single = len(drawn) <= _MOST_ROWS
    shown = dict(sorted(blocks.items(), key=lambda item: -_furthest(item[1]))[:_MOST_BLOCKS])
    kept = {block: shown[block] for block in blocks if block in shown}
    scale = _Scale(_reach(row for group in kept.values() for row in group))
    marks, y = [], float(_SCALE)
    for block, group in kept.items():
        marks.append(f'<text x="{_LEFT}%" y="{y + 16:g}" class="block">{html.escape(_short(block))}</text>')
        y += _LABEL
        for mark in [_symmetry(row, scale) for row in group] if single else [_block(block, group, scale)]:
            marks.append(f'<g transform="translate(0 {y + 6:g})">{mark}</g>')
            y += _LANE
        y += 4
    kinds = [kind for kind in _KINDS if any(_class_of(row) == kind for row in drawn)] if single else []
    caption = _caption(kinds, len(rows) - len(drawn), len(blocks) - len(kept))
    return (
        f'<figure class="distances"><svg width="100%" height="{y:g}" role="img" '
        f'aria-label="Distance of every symmetry from rest">{scale.lines(y)}{"".join(marks)}</svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


class _Scale:
    """The horizontal scale: distances from 0 to a largest distance."""

    def __init__(self, largest: float) -> None:
        self._largest = largest if largest > 0 else 1.0

    def at(self, distance: float) -> str:
        """The position of a distance, cut off at both ends."""
        share = min(max(distance / self._largest, 0.0), 1.0)
        return f"{_LEFT + (_RIGHT - _LEFT) * share:.3f}%"

    def lines(self, height: float) -> str:
        """Vertical lines with the distance and the factor by which weights differ."""
        step = _round_step(self._largest / 4)
        ticks = [step * index for index in range(int(self._largest / step * (1 + 1e-9)) + 1)]
        return "".join(
            f'<line class="grid" x1="{x}" x2="{x}" y1="36" y2="{height:g}"/>'
            f'<text x="{x}" y="14" text-anchor="middle">{tick:.3g}</text>'
            f'<text x="{x}" y="30" text-anchor="middle" class="factor">×{number(math.exp(min(tick, 700)))}</text>'
            for x, tick in ((self.at(tick), tick) for tick in ticks)
        )


def _symmetry(row: Row, scale: _Scale) -> str:
    """A symmetry: a point with a bar of one standard error on both sides."""
    report = row.report
    error = 0.0 if math.isnan(report.error) else report.error
    bar = _bar(scale, report.distance - error, report.distance + error) if error else ""
    uncertain = "" if math.isnan(report.error) else f" ± {number(report.error)}"
    title = f"{report.name}: distance {number(report.distance)}{uncertain}, {row.standing.value}"
    return _mark(_class_of(row), title, bar, scale.at(report.distance))


def _block(block: str, group: Sequence[Row], scale: _Scale) -> str:
    """A block: the median distance with a bar from the smallest to the largest."""
    distances = [row.report.distance for row in group]
    middle, low, high = median(distances), min(distances), max(distances)
    kind = "far" if any(row.standing is Standing.FAR for row in group) else "rest"
    title = f"{block}: {len(group)} symmetries, distances {number(low)} to {number(high)}, median {number(middle)}"
    return _mark(kind, title, _bar(scale, low, high), scale.at(middle))


def _mark(kind: str, title: str, bar: str, position: str) -> str:
    """A point and its bar, with a text that the pointer shows."""
    return f'<g class="{kind}"><title>{html.escape(title)}</title>{bar}<circle cx="{position}" cy="0" r="4"/></g>'


def _bar(scale: _Scale, low: float, high: float) -> str:
    """A horizontal bar."""
    return f'<line x1="{scale.at(low)}" x2="{scale.at(high)}" y1="0" y2="0"/>'


def _class_of(row: Row) -> str:
    """The key of `_KINDS` for a symmetry."""
    if row.report.status != "converged":
        return "open"
    return {Standing.FAR: "far", Standing.REST: "rest"}.get(row.standing, "unknown")


def _furthest(group: Iterable[Row]) -> float:
    return max(row.report.distance for row in group)


def _reach(rows: Iterable[Row]) -> float:
    """The largest distance plus its error; errors beyond the largest distance do not extend the scale."""
    pairs = [(row.report.distance, row.report.error) for row in rows]
    furthest = max(distance for distance, _ in pairs)
    return max(distance + (error if error <= furthest else 0.0) for distance, error in pairs)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least a number."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def _short(name: str) -> str:
    """A name of limited length, cut in the middle."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2]}…{name[-_LETTERS // 2 + 1 :]}"


def _caption(kinds: Sequence[str], missing: int, left: int) -> str:
    """What the marks mean, and what is not drawn; no kinds for marks of blocks."""
    parts = ["Distance from rest, and the factor by which weights differ from those at rest."]
    if kinds:
        parts.append("Bars: one standard error.")
        parts += [f'<span class="key {kind}">● {_KINDS[kind]}</span>' for kind in kinds]
    else:
        parts.append("A mark per block: the median of its symmetries, and a bar from the smallest to the largest.")
    if left:
        parts.append(f"{left:,} blocks with smaller distances are not drawn.")
    if missing:
        parts.append(f"{missing:,} symmetries without a distance are not drawn.")
    return " ".join(parts)

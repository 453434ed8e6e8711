"""From free exponents to symmetries: which exponents belong together, and along which axes they act."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, final

import numpy as np

from noetherflow.detect.demands import Demands, Note
from noetherflow.detect.solve import Solution
from noetherflow.detect.unknowns import AxisUnknowns
from noetherflow.symmetry import Axis, DiagonalSymmetry, MatrixSymmetry, ScalarSymmetry
from noetherflow.symmetry.axes import AxisSymmetry


@final
@dataclass(frozen=True, eq=False)
class Candidate:
    """A symmetry that the graph allows, before the proof by numbers.

    Args:
        symmetry: The symmetry.
        words: Words for its name, such as Q-K or V-O.
        diagonal: The operation that forbids mixing, so that a number acts on each row rather than a matrix on all rows.
        small: The small number that an approximate symmetry ignores.
    """

    symmetry: AxisSymmetry
    words: tuple[str, ...] = ()
    diagonal: str = ""
    small: str = ""


class _Member(NamedTuple):
    """A free exponent, and the indices that it moves, by (number of the axis in a list of axes, power)."""

    free: int
    indices: dict[tuple[int, int], tuple[int, ...]]


def candidates(demands: Demands, solution: Solution, order: Mapping[str, int]) -> list[Candidate]:
    """All symmetries that satisfy the demands of a graph.

    Args:
        demands: The demands.
        solution: The solution of their equations.
        order: The position of each parameter in the model.

    Returns:
        A candidate per family: exponents that act along equal axes.
    """
    axes = sorted(demands.unknowns.axes, key=lambda axis: (order[axis.parameter], axis.axis, axis.block or (0, 0, 0)))
    mixing = _Mixing(demands, solution)
    words = _texts(demands.labels, solution)
    small = _texts(demands.ignored, solution)
    families: dict[object, list[_Member]] = defaultdict(list)
    for member in _members(axes, solution):
        pattern = tuple((place, len(indices)) for place, indices in sorted(member.indices.items()))
        # Heads are told apart even where nothing can be mixed.
        mixed = not mixing.forbidden_by(member.free)
        line = mixing.line(member.free) if mixed or member.free in words else 0
        families[pattern, mixed, line, small.get(member.free, ())].append(member)
    result = []
    for family in families.values():
        family.sort(key=lambda member: next(iter(sorted(member.indices.items())))[1])
        reason = mixing.forbidden_by(family[0].free)
        for run in _runs(family):
            symmetry = _symmetry(run, axes, matrix=not reason and len(run) == len(family))
            if symmetry is not None:
                free = run[0].free
                result.append(Candidate(symmetry, words.get(free, ()), reason, "; ".join(small.get(free, ()))))
    return sorted(result, key=lambda candidate: _position(candidate.symmetry, order))


def _members(axes: list[AxisUnknowns], solution: Solution) -> list[_Member]:
    """The indices that each free exponent moves, with whole-numbered powers."""
    moved: dict[int, dict[tuple[int, Fraction], list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, axis in enumerate(axes):
        ids = axis.ids.numpy()
        for index in np.flatnonzero(~solution.zero[ids] & solution.used[ids]).tolist():
            for free, factor in solution.combination(int(ids[index])).items():
                moved[free][number, factor].append(index)
    members = []
    for free, places in moved.items():
        scale = Fraction(math.lcm(*(factor.denominator for _, factor in places)))
        scale /= math.gcd(*(int(factor * scale) for _, factor in places))
        if min(places, key=lambda place: (place[0], places[place][0]))[1] < 0:
            scale = -scale
        powers = {(number, int(factor * scale)): tuple(indices) for (number, factor), indices in places.items()}
        if not _trivial(powers, axes):
            members.append(_Member(free, powers))
    return members


def _trivial(powers: dict[tuple[int, int], tuple[int, ...]], axes: list[AxisUnknowns]) -> bool:
    """Whether no entry moves, because one axis of a parameter grows as another shrinks."""
    totals: dict[str, int] = defaultdict(int)
    for (number, power), indices in powers.items():
        if len(indices) < len(axes[number].ids) or axes[number].block is not None:
            return False
        totals[axes[number].parameter] += power
    return not any(totals.values())


class _Mixing:
    """The exponents that a matrix may mix: those that every operation treats alike, and none by itself."""

    def __init__(self, demands: Demands, solution: Solution) -> None:
        self._forbidden: dict[int, str] = {}
        for ids, reason in demands.no_mixing:
            for root in np.unique(solution.root[ids.numpy()]).tolist():
                for free in solution.bound.get(root, (root,)):
                    self._forbidden.setdefault(free, reason)
        for root, parts in solution.bound.items():
            for free in (root, *parts):
                self._forbidden.setdefault(free, "other exponents are sums of this exponent")
        self._signature = np.zeros(len(solution.root), dtype=np.uint64)
        generator = np.random.default_rng(0)
        for ids, lines in demands.mixing:
            hashes = generator.integers(1, 2**63, size=int(lines.max()) + 1, dtype=np.uint64)
            pairs = np.unique(np.stack([solution.root[ids.numpy()], lines.numpy()]), axis=1)
            # A sum over all operations that an exponent meets, each with the line of the exponent there.
            np.add.at(self._signature, pairs[0], hashes[pairs[1]])

    def line(self, free: int) -> int:
        return int(self._signature[free])

    def forbidden_by(self, free: int) -> str:
        return self._forbidden.get(free, "")


def _texts(notes: Iterable[Note], solution: Solution) -> dict[int, tuple[str, ...]]:
    """Texts about unknowns, by the free unknowns of which they are made."""
    texts: dict[int, list[str]] = defaultdict(list)
    for ids, text in notes:
        for root in np.unique(solution.root[np.asarray(ids)]).tolist():
            for free in solution.bound.get(root, (root,)):
                if text not in texts[free]:
                    texts[free].append(text)
    return {free: tuple(each) for free, each in texts.items()}


def _runs(family: list[_Member]) -> list[list[_Member]]:
    """Members whose indices follow each other along every axis."""
    runs: list[list[_Member]] = []
    steps: tuple[int, ...] | None = None
    for member in family:
        step = _step(runs[-1][-1], member) if runs else None
        if step is not None and (len(runs[-1]) == 1 or step == steps):
            runs[-1].append(member)
            steps = step
        else:
            runs.append([member])
            steps = None
    return runs


def _step(before: _Member, after: _Member) -> tuple[int, ...] | None:
    """The distance of the indices of two members along every axis: one, or their number if they are adjacent.

    Returns:
        The distances; None if the members do not follow each other.
    """
    steps = []
    for place, indices in before.indices.items():
        moves = {b - a for a, b in zip(indices, after.indices[place], strict=True)}
        adjacent = indices[-1] - indices[0] + 1 == len(indices)
        if len(moves) != 1 or not moves <= ({1, len(indices)} if adjacent else {1}):
            return None
        steps.append(moves.pop())
        if adjacent and len(indices) > 1 and steps[-1] == 1:
            return None
    return tuple(steps)


def _symmetry(run: list[_Member], axes: list[AxisUnknowns], *, matrix: bool) -> AxisSymmetry | None:
    """The symmetry of a run of members."""
    plus: list[Axis] = []
    minus: list[Axis] = []
    for (number, power), first in sorted(run[0].indices.items()):
        last = run[-1].indices[number, power]
        slices = _slices(axes[number], first, last, len(run))
        (plus if power > 0 else minus).extend(slices * abs(power))
    if not plus:
        plus, minus = minus, plus
    if len(run) == 1 and all(axis.repeat > 1 for axis in plus + minus):
        return ScalarSymmetry(
            tuple(replace(axis, repeat=1) for axis in plus), tuple(replace(axis, repeat=1) for axis in minus)
        )
    powers = {abs(power) for _, power in run[0].indices}
    kind = MatrixSymmetry if matrix and len(run) > 1 and powers == {1} and minus else DiagonalSymmetry
    return kind(tuple(plus), tuple(minus))


def _slices(axis: AxisUnknowns, first: tuple[int, ...], last: tuple[int, ...], count: int) -> list[Axis]:
    """The indices of a run along an axis, as slices with a row per member."""
    size = len(first)
    if count > 1 and last[0] - first[0] == count - 1:
        slices = [(start, start + count, 1) for start in first]
    elif count > 1:
        slices = [(first[0], last[-1] + 1, size)]
    else:
        breaks = [0, *(i for i in range(1, size) if first[i] != first[i - 1] + 1), size]
        slices = [(first[a], first[b - 1] + 1, b - a) for a, b in pairwise(breaks)]
    complete = 0, len(axis.ids)
    return [
        Axis(
            axis.parameter,
            axis.axis,
            start=None if (start, stop) == complete else start,
            stop=None if (start, stop) == complete else stop,
            repeat=repeat,
            within=axis.block,
        )
        for start, stop, repeat in slices
    ]


def _position(symmetry: AxisSymmetry, order: Mapping[str, int]) -> tuple[object, ...]:
    return tuple((order[axis.name], axis.dim, axis.within or (0, 0, 0), axis.start or 0) for axis in symmetry.plus)

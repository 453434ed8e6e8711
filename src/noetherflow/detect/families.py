"""From exponents that are free to symmetries: which of them belong together, and along which axes they act."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, final

import numpy as np

from noetherflow.detect.exponents import Equations, Role
from noetherflow.detect.solve import Solution
from noetherflow.symmetry import Axis, DiagonalSymmetry, MatrixSymmetry, ScalarSymmetry
from noetherflow.symmetry.axes import AxisSymmetry


@final
@dataclass(frozen=True, eq=False)
class Candidate:
    """A symmetry that the graph allows, before anybody has looked at a number.

    Args:
        symmetry: What acts.
        words: What it is called where it stands, such as Q-K or V-O.
        diagonal: Why it is one number per row rather than a matrix, if an operation says so.
        small: Why it is only approximate, if it is.
    """

    symmetry: AxisSymmetry
    words: tuple[str, ...] = ()
    diagonal: str = ""
    small: str = ""


class _Member(NamedTuple):
    """One free exponent: the indices it moves, by (role, power)."""

    free: int
    places: dict[tuple[int, int], tuple[int, ...]]


def candidates(equations: Equations, solution: Solution, order: Mapping[str, int]) -> list[Candidate]:
    """All symmetries that solve the equations.

    Args:
        equations: Those of a graph.
        solution: Theirs.
        order: The position of each parameter in the model.

    Returns:
        One per family: exponents that act along the same axes.
    """
    roles = sorted(equations.roles, key=lambda role: (order[role.parameter], role.axis, role.block or (0, 0, 0)))
    members = _members(roles, solution)
    mixable = _Mixing(equations, solution)
    words = _told(equations.tags, solution)
    small = _told(equations.small, solution)
    families: dict[object, list[_Member]] = defaultdict(list)
    for member in members:
        pattern = tuple((place, len(indices)) for place, indices in sorted(member.places.items()))
        # Heads are told apart even where nothing can be mixed.
        mixed = not mixable.reason(member.free)
        line = mixable.line(member.free) if mixed or member.free in words else 0
        families[pattern, mixed, line, small.get(member.free, ())].append(member)
    found = []
    for family in families.values():
        family.sort(key=lambda member: next(iter(sorted(member.places.items())))[1])
        reason = mixable.reason(family[0].free)
        for run in _runs(family):
            symmetry = _symmetry(run, roles, matrix=not reason and len(run) == len(family))
            if symmetry is not None:
                free = run[0].free
                note = "; ".join(small.get(free, ()))
                found.append(Candidate(symmetry, words.get(free, ()), reason, note))
    return sorted(found, key=lambda one: _position(one.symmetry, order))


def _members(roles: list[Role], solution: Solution) -> list[_Member]:
    """What each free exponent moves."""
    places: dict[int, dict[tuple[int, Fraction], list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, role in enumerate(roles):
        ids = role.ids.numpy()
        for index in np.flatnonzero(~solution.zero[ids] & solution.used[ids]).tolist():
            for free, factor in solution.combination(int(ids[index])).items():
                places[free][number, factor].append(index)
    members = []
    for free, found in places.items():
        scale = Fraction(math.lcm(*(factor.denominator for _, factor in found)))
        scale /= math.gcd(*(int(factor * scale) for _, factor in found))
        if min(found, key=lambda place: (place[0], found[place][0]))[1] < 0:
            scale = -scale
        whole = {(role, int(factor * scale)): tuple(indices) for (role, factor), indices in found.items()}
        if not _trivial(whole, roles):
            members.append(_Member(free, whole))
    return members


def _trivial(places: dict[tuple[int, int], tuple[int, ...]], roles: list[Role]) -> bool:
    """Whether what one axis of a parameter gains another one loses, so that nothing happens."""
    totals: dict[str, int] = defaultdict(int)
    for (number, power), indices in places.items():
        if len(indices) < len(roles[number].ids) or roles[number].block is not None:
            return False
        totals[roles[number].parameter] += power
    return not any(totals.values())


class _Mixing:
    """Which exponents may be mixed by a matrix: those that every operation treats alike, and none one by one."""

    def __init__(self, equations: Equations, solution: Solution) -> None:
        self._single: dict[int, str] = {}
        for ids, reason in equations.single:
            for one in np.unique(solution.root[ids.numpy()]).tolist():
                for free in solution.bound.get(one, (one,)):
                    self._single.setdefault(free, reason)
        for one, parts in solution.bound.items():
            for free in (one, *parts):
                self._single.setdefault(free, "it is a sum of others")
        self._signature = np.zeros(len(solution.root), dtype=np.uint64)
        generator = np.random.default_rng(0)
        for ids, lines in equations.marks:
            hashes = generator.integers(1, 2**63, size=int(lines.max()) + 1, dtype=np.uint64)
            pairs = np.unique(np.stack([solution.root[ids.numpy()], lines.numpy()]), axis=1)
            # A sum over all operations that have met the exponent, each with the line on which it did.
            np.add.at(self._signature, pairs[0], hashes[pairs[1]])

    def line(self, free: int) -> int:
        return int(self._signature[free])

    def reason(self, free: int) -> str:
        return self._single.get(free, "")


def _told(notes: Iterable[tuple[object, str]], solution: Solution) -> dict[int, tuple[str, ...]]:
    """What was said of unknowns, by the free ones that they are made of."""
    said: dict[int, list[str]] = defaultdict(list)
    for ids, word in notes:
        for one in np.unique(solution.root[np.asarray(ids)]).tolist():
            for free in solution.bound.get(one, (one,)):
                if word not in said[free]:
                    said[free].append(word)
    return {free: tuple(words) for free, words in said.items()}


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
    """By how much the indices move on along every axis: by one, or by their number if they are neighbours."""
    steps = []
    for place, indices in before.places.items():
        moves = {b - a for a, b in zip(indices, after.places[place], strict=True)}
        neighbours = indices[-1] - indices[0] + 1 == len(indices)
        if len(moves) != 1 or not moves <= ({1, len(indices)} if neighbours else {1}):
            return None
        steps.append(moves.pop())
        if neighbours and len(indices) > 1 and steps[-1] == 1:
            return None
    return tuple(steps)


def _symmetry(run: list[_Member], roles: list[Role], *, matrix: bool) -> AxisSymmetry | None:
    """The symmetry of a run of members."""
    plus: list[Axis] = []
    minus: list[Axis] = []
    for (number, power), first in sorted(run[0].places.items()):
        last = run[-1].places[number, power]
        axes = _axes(roles[number], first, last, len(run))
        (plus if power > 0 else minus).extend(axes * abs(power))
    if not plus:
        plus, minus = minus, plus
    if len(run) == 1 and all(axis.repeat > 1 for axis in plus + minus):
        return ScalarSymmetry(
            tuple(replace(axis, repeat=1) for axis in plus), tuple(replace(a, repeat=1) for a in minus)
        )
    powers = {abs(power) for _, power in run[0].places}
    kind = MatrixSymmetry if matrix and len(run) > 1 and powers == {1} and minus else DiagonalSymmetry
    return kind(tuple(plus), tuple(minus))


def _axes(role: Role, first: tuple[int, ...], last: tuple[int, ...], count: int) -> list[Axis]:
    """The indices of a run along one axis, as slices with one row per member."""
    size = len(first)
    if count > 1 and last[0] - first[0] == count - 1:
        slices = [(start, start + count, 1) for start in first]
    elif count > 1:
        slices = [(first[0], last[-1] + 1, size)]
    else:
        breaks = [0, *(i for i in range(1, size) if first[i] != first[i - 1] + 1), size]
        slices = [(first[a], first[b - 1] + 1, b - a) for a, b in pairwise(breaks)]
    whole = len(role.ids)
    return [
        Axis(
            role.parameter,
            role.axis,
            start=None if (start, stop) == (0, whole) else start,
            stop=None if (start, stop) == (0, whole) else stop,
            repeat=repeat,
            within=role.block,
        )
        for start, stop, repeat in slices
    ]


def _position(symmetry: AxisSymmetry, order: Mapping[str, int]) -> tuple[object, ...]:
    return tuple((order[axis.name], axis.dim, axis.within or (0, 0, 0), axis.start or 0) for axis in symmetry.plus)

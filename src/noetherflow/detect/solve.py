"""The solutions of the equations between exponents: integers, found exactly."""

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, final

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from noetherflow.detect.exponents import ZERO, Equations

_NOTHING = 1e-9


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Every unknown in terms of the free ones.

    Args:
        root: The representative of each unknown, shape (count,): equal to it up to a sign.
        sign: That sign.
        zero: Whether an unknown has to vanish.
        bound: Representatives that are sums of free ones.
        reasons: What made the unknowns of a representative vanish.
        used: Whether any operation has asked for an unknown.
    """

    root: np.ndarray
    sign: np.ndarray
    zero: np.ndarray
    bound: dict[int, dict[int, Fraction]]
    reasons: dict[int, list[str]]
    used: np.ndarray

    def combination(self, unknown: int) -> dict[int, Fraction]:
        """An unknown as a sum of multiples of free ones."""
        root, sign = int(self.root[unknown]), int(self.sign[unknown])
        if self.zero[unknown]:
            return {}
        return {free: sign * factor for free, factor in self.bound.get(root, {root: Fraction(1)}).items()}


class _Rows(NamedTuple):
    """Equations of one form: the unknowns of each, shape (m, k), their factors, and whose they are."""

    ids: np.ndarray
    factors: np.ndarray
    reason: str


def solve(equations: Equations) -> Solution:
    """Solve them, and choose one of the solutions that move parameters alike.

    Returns:
        The solution.
    """
    first = _solve(equations)

    def same(ids: Tensor) -> bool:
        found = ids.numpy()
        zero = first.zero[found]
        return bool(zero.all() or (len(np.unique(first.root[found])) == 1 and len(np.unique(first.sign[found])) == 1))

    return _solve(equations) if equations.settle(same) else first


def _solve(equations: Equations) -> Solution:
    """First those that make two unknowns equal or one of them zero, which are nearly all, then the rest."""
    count = equations.count
    rows = [_spread(equation.terms, equation.reason) for equation in equations.equations]
    used = np.zeros(count, dtype=bool)
    for one in rows:
        used[one.ids] = True
    for met in [*(ids for ids, _ in equations.marks), *(ids for ids, _ in equations.single)]:
        used[met.numpy()] = True
    root, sign = np.arange(count), np.ones(count, dtype=np.int64)
    zero = np.zeros(count, dtype=bool)
    zero[ZERO] = True
    blamed: list[tuple[np.ndarray, str]] = []
    while True:
        rows, pairs, vanishing = _simplified(rows, root, sign, zero)
        if not pairs and not vanishing:
            break
        blamed += vanishing
        root, sign, zero = _merged(root, sign, zero, pairs, [ids for ids, _ in vanishing])
    reasons: dict[int, list[str]] = defaultdict(list)
    for ids, reason in blamed:
        for one in np.unique(root[ids]).tolist():
            if reason not in reasons[one]:
                reasons[one].append(reason)
    return Solution(root, sign, zero[root], _eliminated(rows), dict(reasons), used)


def _spread(terms: tuple[tuple[float, object], ...], reason: str) -> _Rows:
    """An equation for every index, each once."""
    arrays = np.broadcast_arrays(*(np.asarray(ids) for _, ids in terms))
    ids = np.stack([array.reshape(-1) for array in arrays], axis=1)
    factors = np.array([factor for factor, _ in terms])
    ids = np.unique(ids, axis=0)
    return _Rows(ids, np.broadcast_to(factors, ids.shape), reason)


def _simplified(
    rows: list[_Rows], root: np.ndarray, sign: np.ndarray, zero: np.ndarray
) -> tuple[list[_Rows], list[tuple[np.ndarray, np.ndarray, np.ndarray]], list[tuple[np.ndarray, str]]]:
    """Equations in terms of representatives; apart from them those that say a = b, a = -b, and a = 0."""
    rest, pairs, vanishing = [], [], []
    for ids, factors, reason in rows:
        roots = root[ids]
        weights = np.where(zero[roots], 0.0, factors * sign[ids])
        order = np.argsort(roots, axis=1, kind="stable")
        roots, weights = np.take_along_axis(roots, order, 1), np.take_along_axis(weights, order, 1)
        for column in range(1, roots.shape[1]):
            same = roots[:, column] == roots[:, column - 1]
            weights[same, column] += weights[same, column - 1]
            weights[same, column - 1] = 0
        weights[np.abs(weights) < _NOTHING] = 0
        size = (weights != 0).sum(axis=1)
        alone = size == 1
        if alone.any():
            vanishing.append((roots[alone][weights[alone] != 0], reason))
        two = size == 2
        if two.any():
            first = (weights != 0).argmax(axis=1)
            last = weights.shape[1] - 1 - (weights[:, ::-1] != 0).argmax(axis=1)
            line = np.arange(len(weights))
            a, b = weights[line, first], weights[line, last]
            two &= np.abs(np.abs(a) - np.abs(b)) < _NOTHING
            pairs.append((roots[line, first][two], roots[line, last][two], -np.sign(a * b)[two].astype(np.int64)))
        left = (size > 0) & ~alone & ~two
        if left.any():
            rest.append(_Rows(roots[left], weights[left], reason))
    # What is left is in terms of representatives, whose signs are now in the factors.
    return rest, [pair for pair in pairs if len(pair[0])], vanishing


def _merged(
    root: np.ndarray,
    sign: np.ndarray,
    zero: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    vanishing: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Representatives after some were found to be equal up to a sign: connected parts of a graph of +a and -a."""
    count = len(root)
    zeros = np.concatenate([*vanishing, np.flatnonzero(zero)])
    first, second = [zeros], [zeros + count]
    for a, b, relation in pairs:
        flipped = np.where(relation > 0, 0, count)
        first += [a, a + count]
        second += [b + flipped, b + count - flipped]
    edges = np.concatenate(first), np.concatenate(second)
    graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(2 * count, 2 * count))
    _, part = connected_components(graph, directed=False)
    plus, minus = part[:count], part[count:]
    earliest = np.full(part.max() + 1, count)
    np.minimum.at(earliest, plus, np.arange(count))
    new_root = np.minimum(earliest[plus], earliest[minus])
    new_sign = np.where(earliest[plus] <= earliest[minus], 1, -1)
    return new_root[root], sign * new_sign[root], plus == minus


def _eliminated(rows: list[_Rows]) -> dict[int, dict[int, Fraction]]:
    """Gauss's elimination for the few equations between three unknowns or more; the last one met gives way."""
    bound: dict[int, dict[int, Fraction]] = {}
    users: dict[int, set[int]] = defaultdict(set)
    seen = set()
    for ids, factors, _ in rows:
        for roots, weights in zip(ids.tolist(), factors.tolist(), strict=True):
            row: dict[int, Fraction] = defaultdict(Fraction)
            for one, weight in zip(roots, weights, strict=True):
                if weight:
                    exact = Fraction(weight).limit_denominator(1000)
                    for free, factor in bound.get(one, {one: Fraction(1)}).items():
                        row[free] += exact * factor
            row = {one: factor for one, factor in row.items() if factor}
            key = tuple(sorted(row.items()))
            if not row or key in seen:
                continue
            seen.add(key)
            pivot = max(row)
            scale = -row.pop(pivot)
            solved = {one: factor / scale for one, factor in row.items()}
            for user in users.pop(pivot, set()):
                old = bound[user]
                share = old.pop(pivot, Fraction(0))  # it may have dropped out since
                for one, factor in solved.items():
                    old[one] = old.get(one, Fraction(0)) + share * factor
                    if not old[one]:
                        del old[one]
                    else:
                        users[one].add(user)
            bound[pivot] = solved
            for one in solved:
                users[one].add(pivot)
    return bound

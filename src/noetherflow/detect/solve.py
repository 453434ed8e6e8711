"""The solutions of the equations between exponents: integers, found exactly."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, final

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from noetherflow.detect.demands import Demands
from noetherflow.detect.exponents import ZERO, Term

_NOTHING = 1e-9


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Every unknown in terms of the free unknowns.

    Args:
        root: The representative of each unknown, shape (count,): equal to it up to a sign.
        sign: That sign.
        zero: Whether an unknown has to vanish.
        bound: Representatives that are sums of multiples of free unknowns.
        reasons: For each representative the operations that make its unknowns vanish.
        ties: For each representative the operations that relate its unknowns to each other.
        used: Whether an operation demands something of an unknown.
    """

    root: np.ndarray
    sign: np.ndarray
    zero: np.ndarray
    bound: dict[int, dict[int, Fraction]]
    reasons: dict[int, list[str]]
    ties: dict[int, list[str]]
    used: np.ndarray

    def combination(self, unknown: int) -> dict[int, Fraction]:
        """An unknown as a sum of multiples of free unknowns."""
        root, sign = int(self.root[unknown]), int(self.sign[unknown])
        if self.zero[unknown]:
            return {}
        return {free: sign * factor for free, factor in self.bound.get(root, {root: Fraction(1)}).items()}


class _Rows(NamedTuple):
    """Equations of one form: the unknowns of each, shape (m, k), their factors, and the operation that demands them."""

    ids: np.ndarray
    factors: np.ndarray
    reason: str


def solve(demands: Demands) -> Solution:
    """Solve the equations, and choose one of the solutions that move parameters alike.

    Returns:
        The solution.
    """
    first = _solve(demands, ())

    def alike(ids: Tensor) -> Tensor:
        groups: dict[tuple[tuple[int, Fraction], ...], list[int]] = defaultdict(list)
        for unknown in ids.tolist():
            groups[tuple(sorted(first.combination(unknown).items()))].append(unknown)
        return torch.tensor(max(groups.values(), key=len))

    def zero(ids: Tensor) -> bool:
        return bool(first.zero[ids.numpy()].all())

    chosen = demands.unknowns.use_remaining_gauges(alike, zero)
    return _solve(demands, chosen) if chosen else first


def _solve(demands: Demands, chosen: Sequence[Tensor]) -> Solution:
    """Solve the equations that make two unknowns equal or one of them zero, which are almost all, and then the rest.

    Args:
        demands: The equations.
        chosen: Unknowns that are set to zero without loss of generality.

    Returns:
        The solution.
    """
    count = demands.unknowns.count
    every = [_spread(equation.terms, equation.reason) for equation in demands.equations]
    used = np.zeros(count, dtype=bool)
    for rows in every:
        used[rows.ids] = True
    for ids in (*(lines.ids for lines in demands.mixing), *(note.ids for note in demands.no_mixing), *chosen):
        used[ids.numpy()] = True
    root, sign = np.arange(count), np.ones(count, dtype=np.int64)
    zero = np.zeros(count, dtype=bool)
    zero[ZERO] = True
    for ids in chosen:
        zero[ids.numpy()] = True
    blamed: list[tuple[np.ndarray, str]] = []
    left = every
    while True:
        left, pairs, vanishing = _simplified(left, root, sign, zero)
        if not pairs and not vanishing:
            break
        blamed += vanishing
        root, sign, zero = _merged(root, sign, zero, pairs, [ids for ids, _ in vanishing])
    ties = [(rows.ids.reshape(-1), rows.reason) for rows in every]
    return Solution(root, sign, zero[root], _eliminated(left), _by_root(blamed, root), _by_root(ties, root), used)


def _by_root(notes: Iterable[tuple[np.ndarray, str]], root: np.ndarray) -> dict[int, list[str]]:
    """Texts about unknowns, by representative, each once."""
    texts: dict[int, list[str]] = defaultdict(list)
    for ids, text in notes:
        for unknown in np.unique(root[ids]).tolist():
            if text not in texts[unknown]:
                texts[unknown].append(text)
    return dict(texts)


def _spread(terms: tuple[Term, ...], reason: str) -> _Rows:
    """An equation at every index, each once."""
    arrays = np.broadcast_arrays(*(np.asarray(ids) for _, ids in terms))
    ids = np.stack([array.reshape(-1) for array in arrays], axis=1)
    factors = np.array([factor for factor, _ in terms])
    ids = np.unique(ids, axis=0)
    return _Rows(ids, np.broadcast_to(factors, ids.shape), reason)


def _simplified(
    rows: list[_Rows], root: np.ndarray, sign: np.ndarray, zero: np.ndarray
) -> tuple[list[_Rows], list[tuple[np.ndarray, np.ndarray, np.ndarray]], list[tuple[np.ndarray, str]]]:
    """Equations in terms of representatives; and apart from them those that say a = b, a = -b, and a = 0."""
    rest, pairs, vanishing = [], [], []
    for ids, factors, reason in rows:
        roots = root[ids]
        weights = np.where(zero[roots], 0.0, factors * sign[ids])
        order = np.argsort(roots, axis=1, kind="stable")
        roots, weights = np.take_along_axis(roots, order, 1), np.take_along_axis(weights, order, 1)
        for column in range(1, roots.shape[1]):
            repeated = roots[:, column] == roots[:, column - 1]
            weights[repeated, column] += weights[repeated, column - 1]
            weights[repeated, column - 1] = 0
        weights[np.abs(weights) < _NOTHING] = 0
        size = (weights != 0).sum(axis=1)
        single = size == 1
        if single.any():
            vanishing.append((roots[single][weights[single] != 0], reason))
        two = size == 2
        if two.any():
            first = (weights != 0).argmax(axis=1)
            last = weights.shape[1] - 1 - (weights[:, ::-1] != 0).argmax(axis=1)
            line = np.arange(len(weights))
            a, b = weights[line, first], weights[line, last]
            two &= np.abs(np.abs(a) - np.abs(b)) < _NOTHING
            pairs.append((roots[line, first][two], roots[line, last][two], -np.sign(a * b)[two].astype(np.int64)))
        left = (size > 0) & ~single & ~two
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
    """Representatives after pairs were seen to be equal up to a sign: connected parts of a graph of +a and -a."""
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
    """Gaussian elimination for the few equations between three unknowns or more; the largest unknown is eliminated."""
    bound: dict[int, dict[int, Fraction]] = {}
    users: dict[int, set[int]] = defaultdict(set)
    seen = set()
    for ids, factors, _ in rows:
        for roots, weights in zip(ids.tolist(), factors.tolist(), strict=True):
            row: dict[int, Fraction] = defaultdict(Fraction)
            for unknown, weight in zip(roots, weights, strict=True):
                if weight:
                    exact = Fraction(weight).limit_denominator(1000)
                    for free, factor in bound.get(unknown, {unknown: Fraction(1)}).items():
                        row[free] += exact * factor
            row = {free: factor for free, factor in row.items() if factor}
            key = tuple(sorted(row.items()))
            if not row or key in seen:
                continue
            seen.add(key)
            pivot = max(row)
            scale = -row.pop(pivot)
            solved = {free: factor / scale for free, factor in row.items()}
            for user in users.pop(pivot, set()):
                old = bound[user]
                share = old.pop(pivot, Fraction(0))  # The pivot may have cancelled since.
                for free, factor in solved.items():
                    old[free] = old.get(free, Fraction(0)) + share * factor
                    if not old[free]:
                        del old[free]
                    else:
                        users[free].add(user)
            bound[pivot] = solved
            for free in solved:
                users[free].add(pivot)
    return bound

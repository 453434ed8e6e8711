"""What operations demand of the exponents of their inputs, collected for the solver.

| demand | when |
|---|---|
| `equal` | entries are added, compared or chosen between |
| `vanish` | an entry goes through a function that is not homogeneous, such as tanh |
| `allow_mixing` | a linear map treats all indices along an axis alike: a matrix may act on them |
| `forbid_mixing` | an operation treats every index by itself, as a ReLU does: only factors may act |
| `approximate` | a small number is added, such as the eps of a normalisation |
| `label` | a word for the name of the symmetry |
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.detect.exponents import ZERO, ScalingExponents, Term, varies_along
from noetherflow.detect.unknowns import Unknowns


class Equation(NamedTuple):
    """sum of factor * unknown = 0 at every index of broadcast tensors, and the operation that demands it."""

    terms: tuple[Term, ...]
    reason: str


class Note(NamedTuple):
    """Something that is said of unknowns, such as the operation that forbids mixing."""

    ids: Tensor
    text: str


class Lines(NamedTuple):
    """Unknowns that a linear map treats alike, and for each the number of its line: only within a line they mix."""

    ids: Tensor
    lines: Tensor


@final
class Demands:
    """All demands of the operations of a computation.

    Args:
        unknowns: The unknowns of the parameters.
        tolerant: Whether small numbers, such as the eps of a normalisation, are ignored.
    """

    def __init__(self, unknowns: Unknowns, *, tolerant: bool = False) -> None:
        self.unknowns, self.tolerant = unknowns, tolerant
        self.equations: list[Equation] = []
        self.mixing: list[Lines] = []
        self.no_mixing: list[Note] = []
        self.ignored: list[Note] = []
        self.labels: list[Note] = []

    def vanish(self, terms: Iterable[Term], reason: str) -> None:
        """The sum of the terms is zero, at every index."""
        kept = tuple(term for term in terms if bool((term.ids != ZERO).any()))
        if kept:
            self.equations.append(Equation(kept, reason))

    def equal(self, first: Iterable[Term], second: Iterable[Term], reason: str) -> None:
        """Two sums of terms are equal, at every index."""
        self.vanish([*first, *(Term(-factor, ids) for factor, ids in second)], reason)

    def allow_mixing(self, ids: Tensor, axis: int) -> None:
        """An operation treats all indices along an axis alike, as a linear map does.

        Unknowns that differ in another index belong to different lines, and are not mixed with each other.
        """
        rows = ids.movedim(axis, -1)
        number = torch.arange(rows[..., 0].numel()).reshape(*rows.shape[:-1], 1)
        self.mixing.append(Lines(rows.reshape(-1), number.expand(rows.shape).reshape(-1)))

    def forbid_mixing(self, terms: Iterable[Term], reason: str) -> None:
        """An operation treats every index by itself, so that no matrix may act."""
        self.no_mixing += [Note(ids.reshape(-1), reason) for _, ids in terms]

    def approximate(self, terms: Iterable[Term], reason: str) -> None:
        """These exponents make a symmetry that is exact only up to a small number."""
        self.ignored += [Note(ids.reshape(-1), reason) for _, ids in terms]

    def label(self, ids: Iterable[Tensor], word: str) -> None:
        """A word for the name of a symmetry."""
        self.labels += [Note(each.reshape(-1), word) for each in ids]

    def equal_along(
        self, x: ScalingExponents, axes: Iterable[int], reason: str, *, gauges: Sequence[str | None] = ()
    ) -> ScalingExponents:
        """Demand that the exponents of a tensor do not depend on some axes, as a sum over these axes does.

        Args:
            x: The exponents of the tensor.
            axes: The axes.
            reason: The operation that demands it.
            gauges: Parameters whose terms can be shifted against each other, so that the common exponent can be zero.

        Returns:
            The exponents with size 1 along the axes.
        """
        terms = x.terms
        gone = sorted({axis % max(1, len(x.shape)) for axis in axes})
        for axis in gone:
            moving = [term for term in terms if varies_along(term.ids, axis)]
            if not moving:
                continue
            sizes = torch.broadcast_shapes(*(ids.shape for _, ids in moving))
            shape = tuple(1 if other == axis else size for other, size in enumerate(sizes))
            kept = tuple(term for term in terms if not varies_along(term.ids, axis))
            if any(self.unknowns.use_gauge(gauge, math.prod(shape), kept) for gauge in gauges):
                self.vanish(moving, reason)
                terms = kept
                continue
            common = Term(1.0, self.unknowns.new(shape))
            if any(self.unknowns.use_gauge(gauge, 1, kept) for gauge in gauges):
                self.vanish([Term(1.0, common.ids.reshape(-1)[:1])], reason)
            self.equal(moving, [common], reason)
            terms = (*kept, common)
        shape = tuple(1 if axis in gone else size for axis, size in enumerate(x.shape))
        return ScalingExponents(shape, terms, scores=x.scores, attention=x.attention)

    def as_single_term(self, x: ScalingExponents, reason: str) -> Tensor:
        """The exponents as one tensor of unknowns."""
        if not x.terms:
            return torch.full((1,) * len(x.shape), ZERO)
        if len(x.terms) == 1 and x.terms[0].factor == 1:
            return x.terms[0].ids
        ids = self.unknowns.new(torch.broadcast_shapes(*(ids.shape for _, ids in x.terms)))
        self.equal([Term(1.0, ids)], x.terms, reason)
        return ids

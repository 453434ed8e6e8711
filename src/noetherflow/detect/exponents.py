r"""How every entry of every tensor scales: unknown exponents, and linear equations between them.

Under a one-parameter group of rescalings each parameter becomes $e^{x w}$ times itself, entry by entry, and as long as
nothing stands in the way so does everything that is computed from it. The exponents $w$ of the parameters are the
unknowns. Every operation says what it needs of the exponents of its inputs (a sum needs them equal, a sum of products
needs the sums of theirs equal, tanh needs them zero) and what those of its output are. What solves all equations is a
symmetry.

An exponent that depends on one index only, as that of a neuron does, is stored for that index only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

ZERO = 0  # the unknown that is known: the exponent of what does not scale


class Term(NamedTuple):
    """A multiple of unknowns, laid out along the axes of a tensor; size 1 where they do not depend on the index."""

    factor: float
    ids: Tensor


@final
@dataclass(frozen=True, eq=False)
class Scaled:
    """A tensor of the computation as far as its scaling is concerned: its shape, and exponents as a sum of terms.

    Args:
        shape: That of the tensor.
        terms: Their sum is the exponent; none means that it does not scale.
        value: The tensor itself where no parameter enters it.
        of_batch: Whether the value depends on the batch, so that it is another one for other examples.
        scores: Contractions of two activations that this is made of, until a softmax makes them attention.
        attention: Whether this came out of a softmax over such scores.
        parameter: The parameter that this is a view of.
        factors: The two tensors whose product this is, where it goes into a sum and nowhere else.
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...] = ()
    value: object = None
    of_batch: bool = False
    scores: tuple[Tensor, ...] = ()
    attention: bool = False
    parameter: str | None = None
    factors: "tuple[Scaled, Scaled] | None" = None

    @property
    def constant(self) -> bool:
        """Whether no parameter enters it."""
        return self.value is not None


class Equation(NamedTuple):
    """sum of factor * unknown = 0, once for every index of broadcast tensors; and which operation says so."""

    terms: tuple[Term, ...]
    reason: str


class Role(NamedTuple):
    """The unknowns of one axis of a parameter.

    `block` is (axis, start, stop) where they hold only in that part of another axis: one matrix of a stack of them.
    """

    parameter: str
    axis: int
    ids: Tensor
    block: tuple[int, int, int] | None = None


class Joint(NamedTuple):
    """A parameter whose exponents along one axis are other ones in each of some equal parts of another axis."""

    parameter: str
    axis: int
    other: int
    parts: int


@final
@dataclass
class Equations:
    """All that is known of the exponents so far.

    Args:
        tolerant: Whether a number that is small may be taken for zero where it is added to what scales.
        joints: Parameters that need more unknowns than one per index of each axis.
    """

    tolerant: bool = False
    joints: frozenset[Joint] = frozenset()
    count: int = 1
    roles: list[Role] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    marks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    single: list[tuple[Tensor, str]] = field(default_factory=list)
    tags: list[tuple[Tensor, str]] = field(default_factory=list)
    small: list[tuple[Tensor, str]] = field(default_factory=list)
    freedom: dict[str, list[int]] = field(default_factory=dict)
    wanted: set[Joint] = field(default_factory=set)

    def parameter(self, name: str, shape: Sequence[int]) -> Scaled:
        """A trainable parameter: an unknown for every index of every axis, and an entry scales by their sum."""
        terms = []
        for axis in range(len(shape)) or (0,):
            joint = next((one for one in self.joints if (one.parameter, one.axis) == (name, axis)), None)
            size, layout = shape[axis] if shape else 1, [1] * len(shape)
            if shape:
                layout[axis] = size
            if joint is None:
                ids = self.unknowns((size,))
                self.roles.append(Role(name, axis, ids))
                terms.append(Term(1.0, ids.reshape(layout)))
                continue
            length = shape[joint.other] // joint.parts
            ids = self.unknowns((joint.parts, size))
            for part in range(joint.parts):
                self.roles.append(Role(name, axis, ids[part], (joint.other, part * length, (part + 1) * length)))
            spread = ids.repeat_interleave(length, 0)
            layout[joint.other] = len(spread)
            terms.append(Term(1.0, (spread if joint.other < axis else spread.T).reshape(layout)))
        # What is taken from the unknowns of one axis can be given to those of another: a number, or one for each part.
        own = {joint.axis: joint.parts for joint in self.joints if joint.parameter == name}
        self.freedom[name] = sorted((own.get(axis, 1) for axis in range(len(shape))), reverse=True)[: len(terms) - 1]
        return Scaled(tuple(shape), tuple(terms), parameter=name)

    def fix(self, name: str | None, common: Sequence[int]) -> bool:
        """Use the freedom of a parameter to make a common exponent of some shape zero, if there is any left."""
        size = math.prod(common)
        left = self.freedom.get(name, []) if name is not None else []
        if size not in left:
            return False
        left.remove(size)
        return True

    def settle(self, same: Callable[[Tensor], bool]) -> bool:
        """Fix what freedom is left where it moves nothing: on axes along which all exponents are the same anyway.

        Args:
            same: Whether unknowns are equal, as far as is known.

        Returns:
            Whether there was any.
        """
        found = False
        for name, left in self.freedom.items():
            axes: dict[int, list[Tensor]] = {}
            for role in self.roles:
                if role.parameter == name:
                    axes.setdefault(role.axis, []).append(role.ids)
            for size in left:
                found = True
                for joint in self.joints:
                    if joint.parameter == name and joint.parts == size and len(axes.get(joint.other, ())) == 1:
                        (whole,) = axes[joint.other]
                        axes[joint.other] = list(whole.reshape(size, -1))
                fitting = [axis for axis, parts in axes.items() if len(parts) == size]
                if fitting:
                    axis = min(fitting, key=lambda one: (not all(map(same, axes[one])), len(axes[one][0]), -one))
                    for ids in axes.pop(axis):
                        self.vanish([Term(1.0, ids[:1])], "a choice")
            left.clear()
        return found

    def join(self, batch: int, parts: int, axis: int) -> None:
        """Ask for other unknowns along the axis that one of them belongs to, in each part of the axis of another."""
        here, there = (self._role_of(one) for one in (axis, batch))
        if here and there and here.parameter == there.parameter and here.block is None and here.axis != there.axis:
            self.wanted.add(Joint(here.parameter, here.axis, there.axis, parts))

    def _role_of(self, unknown: int) -> Role | None:
        return next((role for role in self.roles if role.ids[0] <= unknown <= role.ids[-1]), None)

    def nearly(self, ids: Iterable[Tensor], reason: str) -> None:
        """These make a symmetry that is exact only as far as a small number is nothing."""
        self.small.extend((one.reshape(-1), reason) for one in ids)

    def unknowns(self, shape: Sequence[int]) -> Tensor:
        """New ones, in a tensor of a shape."""
        size = int(torch.tensor(shape).prod()) if len(shape) else 1
        first, self.count = self.count, self.count + size
        return torch.arange(first, self.count).reshape(tuple(shape))

    def vanish(self, terms: Iterable[Term], reason: str) -> None:
        """Their sum is zero."""
        kept = tuple(term for term in terms if bool((term.ids != ZERO).any()))
        if kept:
            self.equations.append(Equation(kept, reason))

    def equal(self, first: Iterable[Term], second: Iterable[Term], reason: str) -> None:
        """Two sums are the same, at every index."""
        self.vanish([*first, *(Term(-factor, ids) for factor, ids in second)], reason)

    def line(self, ids: Tensor, axis: int) -> None:
        """An operation treats all indices along an axis alike, as a linear map does: they may be mixed by a matrix.

        Unknowns that differ in another index belong to different lines, and may not be mixed with each other.
        """
        rows = ids.movedim(axis, -1)
        number = torch.arange(rows[..., 0].numel()).reshape(*rows.shape[:-1], 1)
        self.marks.append((rows.reshape(-1), number.expand(rows.shape).reshape(-1)))

    def alone(self, ids: Tensor, reason: str) -> None:
        """An operation treats every index by itself, so that nothing can be mixed."""
        self.single.append((ids.reshape(-1), reason))

    def tag(self, ids: Iterable[Tensor], word: str) -> None:
        """A word for the name of a symmetry."""
        self.tags.extend((one.reshape(-1), word) for one in ids)


def varying(ids: Tensor, axis: int) -> bool:
    """Whether a term depends on the index along an axis."""
    return ids.shape[axis] > 1


def compressed(ids: Tensor) -> Tensor:
    """The same term with size 1 along the axes on which it does not depend."""
    # Those along which it was expanded first: they cost nothing, and a weight expanded is as large as the weight.
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and bool((ids == ids.narrow(axis, 0, 1)).all()):
            ids = ids.narrow(axis, 0, 1)
    return ids


def aligned(terms: Iterable[Term], ndim: int) -> tuple[Term, ...]:
    """Terms of a tensor that is broadcast to more dimensions."""
    return tuple(Term(factor, ids.reshape((1,) * (ndim - ids.ndim) + tuple(ids.shape))) for factor, ids in terms)


def single(x: Scaled, equations: Equations, reason: str) -> Tensor:
    """The exponents as one tensor of unknowns, compressed."""
    if not x.terms:
        return torch.full((1,) * len(x.shape), ZERO)
    if len(x.terms) == 1 and x.terms[0].factor == 1:
        return x.terms[0].ids
    shape = torch.broadcast_shapes(*(ids.shape for _, ids in x.terms))
    ids = equations.unknowns(shape)
    equations.equal([Term(1, ids)], x.terms, reason)
    return ids


def collapse(
    x: Scaled, axes: Iterable[int], equations: Equations, reason: str, *, gauges: Sequence[str | None] = ()
) -> Scaled:
    """What a sum over some axes needs: an exponent that does not depend on them; the sum keeps it, with size 1 there.

    Args:
        x: The tensor.
        axes: Those that are summed over.
        equations: Where the need is written down.
        reason: Which operation has it.
        gauges: Parameters whose own terms may be shifted against each other: the common exponent can be set to zero.

    Returns:
        The tensor with size 1 along the axes.
    """
    terms = x.terms
    gone = sorted({axis % max(1, len(x.shape)) for axis in axes})
    for axis in gone:
        moving = [term for term in terms if varying(term.ids, axis)]
        if not moving:
            continue
        whole = torch.broadcast_shapes(*(ids.shape for _, ids in moving))
        shape = tuple(1 if one == axis else size for one, size in enumerate(whole))
        kept = tuple(term for term in terms if not varying(term.ids, axis))
        if any(equations.fix(gauge, shape) for gauge in gauges):
            equations.vanish(moving, reason)
            terms = kept
        else:
            common = Term(1.0, equations.unknowns(shape))
            equations.equal(moving, [common], reason)
            terms = (*kept, common)
    shape = tuple(1 if axis in gone else size for axis, size in enumerate(x.shape))
    return Scaled(shape, terms, scores=x.scores, attention=x.attention)


def product(first: Scaled, second: Scaled) -> Scaled:
    """Exponents of an elementwise product: the sum."""
    shape = tuple(torch.broadcast_shapes(first.shape, second.shape))
    terms = aligned(first.terms, len(shape)) + aligned(second.terms, len(shape))
    return Scaled(shape, terms, scores=first.scores or second.scores, attention=first.attention or second.attention)


def power(x: Scaled, exponent: float) -> Scaled:
    """Exponents of a power: the multiple."""
    terms = tuple(Term(exponent * factor, ids) for factor, ids in x.terms) if exponent else ()
    return Scaled(x.shape, terms)

r"""How every entry of every tensor scales: unknown exponents, and linear equations between them.

Under a one-parameter group of rescalings each parameter becomes $e^{x w}$ times itself, entry by entry, and as long as
nothing stands in the way so does everything that is computed from it. The exponents $w$ of the parameters are the
unknowns. Every operation says what it demands of the exponents of its inputs (a sum needs them equal, a sum of products
needs the sums of theirs equal, tanh needs them zero) and what those of its output are. What solves all equations is a
symmetry.

An exponent that depends on one index only, as that of a neuron does, is stored for that index only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Tensor

ZERO = 0  # The index of the unknown whose value is known: the exponent of a tensor that does not scale.


class Term(NamedTuple):
    """A multiple of unknowns, laid out along the axes of a tensor; size 1 along axes on which they do not depend."""

    factor: float
    ids: Tensor


@final
@dataclass(frozen=True, eq=False)
class ScalingExponents:
    """A tensor of the computation as far as its scaling is concerned: its shape, and exponents as a sum of terms.

    Args:
        shape: The shape of the tensor.
        terms: The exponent of an entry is the sum of the terms at its index; without terms the tensor does not scale.
        value: The tensor itself if no parameter enters it.
        varies: Whether the value is another for another batch or after a step of training, as that of the batch itself,
            of random numbers and of floating-point buffers.
        scores: The unknowns of contractions of two activations that enter the tensor before a softmax.
        attention: Whether the tensor is the result of a softmax over such scores.
        parameter: The name of the parameter of which the tensor is a view.
        factors: The two tensors whose product this is, if the product is only summed over.

    Examples:
        >>> import torch, noetherflow as nf
        >>> zeros = nf.ScalingExponents((3,), value=torch.zeros(3))
        >>> zeros.fixed, zeros.zero
        (True, True)
        >>> of_the_batch = nf.ScalingExponents((3,), value=torch.zeros(3), varies=True)
        >>> of_the_batch.fixed, of_the_batch.zero
        (False, False)
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...] = ()
    value: object = None
    varies: bool = False
    scores: tuple[Tensor, ...] = ()
    attention: bool = False
    parameter: str | None = None
    factors: "tuple[ScalingExponents, ScalingExponents] | None" = None

    @property
    def constant(self) -> bool:
        """Whether the value is known, because no parameter enters the tensor."""
        return self.value is not None

    @property
    def fixed(self) -> bool:
        """Whether the value is known and is this value for every batch."""
        return self.constant and not self.varies

    @property
    def zero(self) -> bool:
        """Whether every entry is 0, for every batch."""
        return self.fixed and not bool(torch.as_tensor(self.value).any())

    @property
    def scale_free(self) -> bool:
        """Whether every entry is 0 or infinite, for every batch: numbers that equal any multiple of themselves."""
        if not self.fixed:
            return False
        value = torch.as_tensor(self.value)
        return not bool(((value != 0) & value.abs().isfinite()).any() if value.dtype != torch.bool else value.any())

    @property
    def number(self) -> float | None:
        """The value of a tensor with a single real entry that is fixed, else None."""
        if not self.fixed:
            return None
        value = torch.as_tensor(self.value)
        return None if value.numel() != 1 or value.is_complex() else float(value)


def varies_along(ids: Tensor, axis: int) -> bool:
    """Whether a term depends on the index along an axis."""
    return ids.shape[axis] > 1


def compressed(ids: Tensor) -> Tensor:
    """The unknowns of a term with size 1 along the axes on which they do not depend."""
    # Expanded axes first: a comparison along them would cost the memory of the expanded tensor.
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1 and bool((ids == ids.narrow(axis, 0, 1)).all()):
            ids = ids.narrow(axis, 0, 1)
    return ids


def aligned(terms: Iterable[Term], ndim: int) -> tuple[Term, ...]:
    """The terms of a tensor that is broadcast to `ndim` dimensions."""
    return tuple(Term(factor, ids.reshape((1,) * (ndim - ids.ndim) + tuple(ids.shape))) for factor, ids in terms)


def product(first: ScalingExponents, second: ScalingExponents) -> ScalingExponents:
    """The exponents of an elementwise product: the sum."""
    shape = tuple(torch.broadcast_shapes(first.shape, second.shape))
    terms = aligned(first.terms, len(shape)) + aligned(second.terms, len(shape))
    return ScalingExponents(
        shape, terms, scores=first.scores or second.scores, attention=first.attention or second.attention
    )


def power(x: ScalingExponents, exponent: float) -> ScalingExponents:
    """The exponents of a power: the multiple."""
    terms = tuple(Term(exponent * factor, ids) for factor, ids in x.terms) if exponent else ()
    return ScalingExponents(x.shape, terms)


def reshaped(x: ScalingExponents, shape: Sequence[int]) -> ScalingExponents:
    """The exponents of the entries of a tensor in another shape."""
    terms = tuple(Term(factor, compressed(ids.expand(x.shape).reshape(tuple(shape)))) for factor, ids in x.terms)
    return replace(x, shape=tuple(shape), terms=terms)


def without(ids: Tensor, axes: Iterable[int]) -> Tensor:
    """Unknowns without some axes of size 1."""
    gone = set(axes)
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in gone])

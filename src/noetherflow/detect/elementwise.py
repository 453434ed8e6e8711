"""Operations that work entry by entry, or sum over axes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from noetherflow.detect.call import (
    Call,
    Rule,
    alone,
    as_scaled,
    homogeneous,
    mixing,
    nonzero,
    offset,
    opaque,
    passed,
    without,
)
from noetherflow.detect.contraction import contract
from noetherflow.detect.exponents import Scaled, Term, aligned, collapse, compressed, power, product


def added(call: Call) -> Scaled:
    """A sum needs equal exponents; zeros fit all of them."""
    first, second = as_scaled(call.args[0]), as_scaled(call.given(1, "other"))
    if call.name == "rsub":
        first, second = second, first
    for one, other in ((first, second), (second, first)):
        if one.constant and not one.of_batch and not nonzero(one):
            return Scaled(call.shape, aligned(other.terms, len(call.shape)), scores=other.scores)
        if one.constant and isinstance(one.value, Tensor) and one.value.numel() == 1 and not one.of_batch:
            return offset(call, other, abs(float(one.value)))
    left, right = aligned(first.terms, len(call.shape)), aligned(second.terms, len(call.shape))
    call.equations.equal(left, right, call.reason)
    kept = left if len(left) == 1 else right
    return Scaled(call.shape, kept if left and right else (), scores=first.scores or second.scores)


def multiplied(call: Call) -> Scaled:
    """The exponents of a product add up."""
    first, second = as_scaled(call.args[0]), as_scaled(call.given(1, "other"))
    if call.name == "div":
        second = power(second, -1) if not second.constant else second
    if call.name == "mul" and call.summed and first.shape == second.shape:
        # A scalar product: its indices are not treated one by one.
        return replace(product(first, second), shape=call.shape, factors=(first, second))
    mixing(call, first, second)
    mixing(call, second, first)
    return replace(product(first, second), shape=call.shape)


def raised(exponent: float | None) -> Rule:
    """A power; None where it is the second argument."""

    def rule(call: Call) -> Any:
        degree = call.given(1, "exponent") if exponent is None else exponent
        if not isinstance(degree, (int, float)):
            return opaque(call)
        alone(call, call.x)
        return replace(power(call.x, float(degree)), shape=call.shape)

    return rule


def reduced(*, degree: float = 1.0, linear: bool = True, position: int = 1) -> Rule:
    """A sum, a norm or a maximum over some axes."""

    def rule(call: Call) -> Any:
        x = call.x
        dims = call.given(position, "dim")
        if isinstance(dims, Scaled):
            return extreme(call)  # the larger of two tensors
        axes = list(range(len(x.shape))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        if x.factors is not None:
            x = _contracted(call, x.factors, axes)
        elif not linear:
            alone(call, x)
        found = power(collapse(x, axes, call.equations, call.reason), degree)
        keep = len(call.shape) == len(x.shape)
        gone = () if keep else tuple(axis % max(1, len(x.shape)) for axis in axes)
        terms = tuple(Term(factor, without(ids, gone)) for factor, ids in found.terms)
        results = [Scaled(shape, terms if number == 0 else ()) for number, shape in enumerate(call.shapes)]
        return results if len(results) > 1 else results[0]

    return rule


def _contracted(call: Call, factors: tuple[Scaled, Scaled], axes: Iterable[int]) -> Scaled:
    """A product and the sum that follows it, as one; with size 1 along the axes."""
    ndim = len(factors[0].shape)
    labels = "abcdefghijkl"[:ndim]
    gone = {axis % ndim for axis in axes}
    output = "".join(label for axis, label in enumerate(labels) if axis not in gone)
    found = contract(f"{labels},{labels}->{output}", factors, call.equations, call.reason)
    shape = [1 if axis in gone else size for axis, size in enumerate(factors[0].shape)]
    terms = []
    for factor, ids in found.terms:
        sizes = iter(ids.shape)
        terms.append(Term(factor, ids.reshape([1 if axis in gone else next(sizes) for axis in range(ndim)])))
    return replace(found, shape=tuple(shape), terms=tuple(terms))


def running(call: Call) -> Scaled:
    """A cumulative sum."""
    found = collapse(call.x, [call.given(1, "dim")], call.equations, call.reason)
    return Scaled(call.shape, found.terms)


def spatial(*, linear: bool) -> Rule:
    """Pooling or resizing over the last axes, as many as the name says."""

    def rule(call: Call) -> Any:
        count = int(next(letter for letter in call.name if letter.isdigit()))
        x = call.x
        if not linear:
            alone(call, x)
        found = collapse(x, range(len(x.shape) - count, len(x.shape)), call.equations, call.reason)
        results = [Scaled(shape, found.terms if number == 0 else ()) for number, shape in enumerate(call.shapes)]
        return results if len(results) > 1 else results[0]

    return rule


def softmax(call: Call) -> Scaled:
    """Scores must not scale; out of two activations it makes attention."""
    call.equations.tag(call.x.scores, "Q-K")
    call.equations.vanish(call.x.terms, call.reason)
    return Scaled(call.shape, attention=bool(call.x.scores))


def compared(call: Call) -> Scaled:
    """Whether something is positive does not depend on its scale."""
    other = as_scaled(call.given(1, "other"))
    if other.constant and not other.of_batch and not nonzero(other):
        alone(call, call.x)
        return Scaled(call.shape)
    found: Scaled = opaque(call)
    return found


def chosen(call: Call) -> Scaled:
    """One or the other, entry by entry; a zero goes with anything."""
    condition, first, second = (as_scaled(one) for one in call.args)
    call.equations.vanish(condition.terms, call.reason)
    for one, other in ((first, second), (second, first)):
        if one.constant and not one.of_batch and not nonzero(one):
            mixing(call, other, condition)
            return Scaled(call.shape, aligned(other.terms, len(call.shape)), scores=other.scores)
    left, right = aligned(first.terms, len(call.shape)), aligned(second.terms, len(call.shape))
    call.equations.equal(left, right, call.reason)
    for x in (first, second):
        mixing(call, x, condition)
    return Scaled(call.shape, left if left and right else (), scores=first.scores or second.scores)


def masked(call: Call) -> Scaled:
    """Entries replaced by a number."""
    value = as_scaled(call.given(2, "value"))
    if value.constant and not value.of_batch and not nonzero(value):
        mixing(call, call.x, as_scaled(call.given(1, "mask")))
        return passed(call)
    call.equations.vanish(call.x.terms, call.reason)
    return Scaled(call.shape, scores=call.x.scores)


def extreme(call: Call) -> Scaled:
    """The larger or the smaller of two."""
    alone(call, call.x)
    alone(call, as_scaled(call.given(1, "other")))
    return added(call)


def clamped(call: Call) -> Any:
    """Cut off at zero is a ReLU; cut off just above it keeps a norm from vanishing."""
    low, high = call.given(1, "min"), call.given(2, "max") if call.name == "clamp" else None
    bounds = [as_scaled(bound) for bound in (low, high) if bound is not None]
    if not all(bound.constant and not bound.of_batch for bound in bounds):
        return opaque(call)
    sizes = [torch.as_tensor(bound.value).abs().max().item() for bound in bounds]
    if len(bounds) == 1 and (sizes[0] == 0 or (high is None and sizes[0] <= 1e-6)):
        return homogeneous(call)
    return opaque(call)


def dropped(call: Call) -> Scaled:
    """Dropout multiplies every entry by a random factor, unless it is switched off."""
    if call.given(2, "train") and call.given(1, "p"):
        alone(call, call.x)
    return passed(call)


def parametric(call: Call) -> Scaled:
    """PReLU, whose slopes do not scale."""
    call.equations.vanish(as_scaled(call.args[1]).terms, f"{call.reason}: a slope is a number")
    return homogeneous(call)


def gated(call: Call) -> Any:
    """GLU: one half times the sigmoid of the other."""
    axis = call.given(1, "dim", -1)
    half = call.x.shape[axis] // 2
    terms = []
    for factor, ids in call.x.terms:
        full = ids.expand(call.x.shape)
        call.equations.vanish([Term(factor, compressed(full.narrow(axis, half, half)))], call.reason)
        terms.append(Term(factor, compressed(full.narrow(axis, 0, half))))
    out = Scaled(call.shape, tuple(terms))
    alone(call, out)
    return out

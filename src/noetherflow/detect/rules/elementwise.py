"""Functions of every entry, and sums, products and choices of two tensors entry by entry."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from noetherflow.detect.exponents import ScalingExponents, Term, aligned, compressed, power, product
from noetherflow.detect.operation import (
    Operation,
    exponents_of,
    homogeneous,
    opaque,
    plus,
    scale_invariant,
    unchanged,
)
from noetherflow.detect.rules.joining import assembled
from noetherflow.detect.rules.registry import Rule, exponent_rule

# A clamp from below at such a number keeps a norm from vanishing, and does nothing else.
TINY = 1e-6
# Powers are quotients of whole numbers with a small denominator, up to rounding.
_DENOMINATOR, _EQUAL = 12, 1e-12

exponent_rule("aten::clone", "aten::alias", "aten::neg")(unchanged)
exponent_rule("aten::relu", "aten::leaky_relu", "aten::abs")(homogeneous)
exponent_rule("aten::sign", "aten::sgn", "aten::isnan", "aten::isinf")(scale_invariant)
# PyTorch would take these apart. Explanations shall name the function that the user has called.
exponent_rule(
    "aten::gelu", "aten::silu", "aten::elu", "aten::celu", "aten::mish", "aten::softplus", "aten::hardswish",
    "aten::hardsigmoid", "aten::hardtanh", "aten::log_sigmoid_forward", "aten::tanh", "aten::sigmoid", "aten::exp",
    "aten::log", "aten::erf", "aten::sin", "aten::cos", "aten::round", "aten::floor", "aten::log_softmax",
)(opaque)  # fmt: skip


@exponent_rule("aten::tril", "aten::triu")
def triangular(operation: Operation) -> ScalingExponents:
    """A triangle of the last two axes; zeros elsewhere, which have any exponent."""
    operation.forbid_mixing_along(operation.x, (-2, -1))
    return unchanged(operation)


@exponent_rule("aten::detach")
def detached(operation: Operation) -> ScalingExponents:
    """No gradient passes, so a tensor that scales would change the loss unnoticed by its gradient."""
    operation.require_zero(operation.x, "lets no gradient pass")
    return replace(operation.x, shape=operation.shape, terms=())


@exponent_rule("aten::_to_copy", "aten::copy")
def converted(operation: Operation) -> Any:
    """Conversion to another type: to whole numbers it rounds, to bool it asks for zeros."""
    x = operation.x if operation.key == "aten::_to_copy" else exponents_of(operation.args[1])
    if operation.dtypes[0].is_floating_point or operation.dtypes[0].is_complex:
        return replace(x, shape=operation.shape, terms=aligned(x.terms, len(operation.shape)), value=None)
    if operation.dtypes[0] != torch.bool:
        return opaque(operation)
    operation.forbid_mixing(x)
    return ScalingExponents(operation.shape)


@exponent_rule("aten::add", "aten::sub", "aten::rsub")
def added(operation: Operation) -> ScalingExponents:
    """A sum needs equal exponents; zeros have any exponent."""
    x, y = operation.x, exponents_of(operation.argument(1, "other"))
    alpha = abs(operation.argument(2, "alpha", 1))
    multiplied_by_alpha = x if operation.key == "aten::rsub" else y
    for scaled, constant in ((x, y), (y, x)):
        number = constant.number
        if number is not None and not constant.scale_free:
            # The size of the number beside a scaled tensor that is not multiplied by anything.
            factor = alpha if constant is multiplied_by_alpha else 1 / alpha if alpha else math.inf
            kept = operation.ignore_small(scaled, abs(number) * factor, f"adds {abs(number):g}")
            terms = aligned(scaled.terms, len(operation.shape)) if kept else ()
            return ScalingExponents(operation.shape, terms, scores=scaled.scores)
    return plus(operation, x, y)


@exponent_rule("aten::mul", "aten::div")
def multiplied(operation: Operation) -> Any:
    """The exponents of a product add up, those of a quotient are subtracted."""
    x, y = operation.x, exponents_of(operation.argument(1, "other"))
    if operation.kwargs.get("rounding_mode") is not None:
        return opaque(operation)
    if operation.key == "aten::div":
        y = power(y, -1) if not y.constant else y
    elif x.zero or y.zero:
        return ScalingExponents(operation.shape, value=torch.zeros(operation.shape))
    elif operation.summed and x.shape == y.shape:
        # A scalar product: the sum that follows treats all indices alike.
        return replace(product(x, y), shape=operation.shape, factors=(x, y))
    operation.forbid_mixing_by(x, y)
    operation.forbid_mixing_by(y, x)
    return replace(product(x, y), shape=operation.shape)


def _raised(degree: float) -> Rule:
    """The rule of a fixed power."""

    def rule(operation: Operation) -> Any:
        if not math.isfinite(degree) or abs(Fraction(degree).limit_denominator(_DENOMINATOR) - degree) > _EQUAL:
            return opaque(operation)  # Exponents of symmetries are whole numbers.
        operation.forbid_mixing(operation.x)
        return replace(power(operation.x, degree), shape=operation.shape)

    return rule


exponent_rule("aten::sqrt")(_raised(0.5))
exponent_rule("aten::rsqrt")(_raised(-0.5))
exponent_rule("aten::reciprocal")(_raised(-1.0))


@exponent_rule("aten::pow")
def raised(operation: Operation) -> Any:
    """A power whose exponent is a fixed number; any other lets nothing through."""
    degree = exponents_of(operation.argument(1, "exponent")).number
    return opaque(operation) if degree is None else _raised(degree)(operation)


@exponent_rule("aten::maximum", "aten::minimum")
def extreme(operation: Operation) -> ScalingExponents:
    """The larger or the smaller of two entries: both scale alike."""
    y = exponents_of(operation.argument(1, "other"))
    operation.forbid_mixing(operation.x)
    operation.forbid_mixing(y)
    return plus(operation, operation.x, y)


@exponent_rule("aten::atan2")
def angle(operation: Operation) -> Any:
    """The angle of the point (x, y), entry by entry: it does not scale if both coordinates scale alike."""
    x = exponents_of(operation.argument(1, "other"))
    operation.require_equal(operation.x, x)
    operation.forbid_mixing(operation.x)
    operation.forbid_mixing(x)
    return operation.results()


@exponent_rule("aten::gt", "aten::ge", "aten::lt", "aten::le", "aten::eq", "aten::ne")
def compared(operation: Operation) -> ScalingExponents:
    """Whether an entry is larger than another does not depend on the scale if both scale alike."""
    y = exponents_of(operation.argument(1, "other"))
    operation.require_equal(operation.x, y)
    operation.forbid_mixing(operation.x)
    operation.forbid_mixing(y)
    return ScalingExponents(operation.shape)


@exponent_rule("aten::where")
def chosen(operation: Operation) -> Any:
    """The entry of one tensor or of the other, by a condition that does not scale."""
    if len(operation.args) < 3:
        return opaque(operation)  # where(condition) lists positions
    condition, x, y = (exponents_of(argument) for argument in operation.args)
    operation.require_zero(condition)
    for branch in (x, y):
        if not branch.scale_free:
            operation.forbid_mixing_by(branch, condition)
    if not condition.fixed or x.scale_free or y.scale_free:
        return plus(operation, x, y)
    mask = torch.as_tensor(condition.value, dtype=torch.bool)
    result = assembled(operation, [x, y], lambda tensors: torch.where(mask, tensors[0], tensors[1]))
    return replace(result, scores=x.scores or y.scores)


@exponent_rule("aten::threshold")
def threshold(operation: Operation) -> Any:
    """X where x > t, else v: a ReLU if both numbers are zero."""
    numbers = operation.argument(1, "threshold"), operation.argument(2, "value")
    return homogeneous(operation) if numbers == (0, 0) else opaque(operation)


@exponent_rule("aten::clamp", "aten::clamp_min")
def clamped(operation: Operation) -> Any:
    """A clamp at zero is a ReLU; a clamp just above zero keeps a norm from vanishing."""
    low = operation.tensor(1, "min")
    high = operation.tensor(2, "max") if operation.key == "aten::clamp" else None
    bounds = [bound for bound in (low, high) if bound is not None]
    if all(bound.scale_free for bound in bounds):
        return homogeneous(operation)
    number = bounds[0].number
    if high is None and number is not None and 0 < number <= TINY:
        return homogeneous(operation)
    return opaque(operation)


@exponent_rule("aten::softmax")
def softmax(operation: Operation) -> ScalingExponents:
    """Scores must not scale; those of two activations make attention."""
    operation.demands.label(operation.x.scores, "Q-K")
    operation.require_zero(operation.x)
    return ScalingExponents(operation.shape, attention=bool(operation.x.scores))


@exponent_rule("aten::native_dropout")
def dropped(operation: Operation) -> Any:
    """Dropout multiplies every entry by a random factor, unless it is switched off."""
    if operation.argument(2, "train") is not False and operation.argument(1, "p"):
        operation.forbid_mixing(operation.x)
    return [unchanged(operation), ScalingExponents(operation.shapes[1])]


@exponent_rule("aten::prelu")
def parametric(operation: Operation) -> ScalingExponents:
    """PReLU, whose slopes do not scale."""
    operation.require_zero(exponents_of(operation.args[1]), "has a slope, which is a number")
    return homogeneous(operation)


@exponent_rule("aten::glu")
def gated(operation: Operation) -> ScalingExponents:
    """GLU: one half of the entries times the sigmoid of the other half."""
    axis = operation.argument(1, "dim", -1)
    half = operation.x.shape[axis] // 2
    terms = []
    for factor, ids in operation.x.terms:
        full = ids.expand(operation.x.shape)
        operation.demands.vanish([Term(factor, compressed(full.narrow(axis, half, half)))], operation.reason)
        terms.append(Term(factor, compressed(full.narrow(axis, 0, half))))
    result = ScalingExponents(operation.shape, tuple(terms))
    operation.forbid_mixing(result)
    return result

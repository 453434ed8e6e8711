"""Complex numbers: real and imaginary part scale alike; Fourier transforms."""

from typing import Any

from noetherflow.detect.exponents import ScalingExponents, Term
from noetherflow.detect.operation import Operation, exponents_of, plus, unchanged
from noetherflow.detect.rules.registry import exponent_rule

exponent_rule("aten::_conj", "aten::_conj_physical")(unchanged)


@exponent_rule("aten::view_as_complex")
def from_pairs(operation: Operation) -> ScalingExponents:
    """Pairs of real numbers as complex numbers: both of a pair scale alike."""
    x = operation.x
    common = operation.require_equal_along(x, [len(x.shape) - 1])
    return ScalingExponents(operation.shape, tuple(Term(factor, ids.squeeze(-1)) for factor, ids in common.terms))


@exponent_rule("aten::view_as_real")
def to_pairs(operation: Operation) -> ScalingExponents:
    """Complex numbers as pairs of real numbers."""
    terms = tuple(Term(factor, ids.unsqueeze(-1)) for factor, ids in operation.x.terms)
    return ScalingExponents(operation.shape, terms)


@exponent_rule("aten::complex")
def from_parts(operation: Operation) -> ScalingExponents:
    """Real and imaginary parts."""
    return plus(operation, operation.x, exponents_of(operation.args[1]))


@exponent_rule("aten::polar")
def from_angles(operation: Operation) -> ScalingExponents:
    """Absolute values and angles; angles do not scale."""
    operation.require_zero(exponents_of(operation.args[1]))
    operation.forbid_mixing(operation.x)
    return unchanged(operation)


@exponent_rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def transformed(operation: Operation) -> Any:
    """Discrete Fourier transforms along some axes."""
    return operation.results(operation.require_equal_along(operation.x, operation.args[1]).terms)

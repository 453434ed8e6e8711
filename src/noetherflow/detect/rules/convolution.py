"""Convolutions, transposed or not, in groups or not."""

import math
from dataclasses import replace

import torch

from noetherflow.detect.exponents import ScalingExponents, Term, reshaped
from noetherflow.detect.operation import Operation, exponents_of, plus
from noetherflow.detect.rules.contraction import contract
from noetherflow.detect.rules.registry import exponent_rule


@exponent_rule("aten::conv1d", "aten::conv2d", "aten::conv3d")
def convolved(operation: Operation) -> ScalingExponents:
    """A convolution; weight of shape (out, in / groups, *kernel)."""
    return _convolution(operation, operation.argument(6, "groups", 1), transposed=False)


@exponent_rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def transposed(operation: Operation) -> ScalingExponents:
    """A transposed convolution; weight of shape (in, out / groups, *kernel)."""
    return _convolution(operation, operation.argument(6, "groups", 1), transposed=True)


@exponent_rule("aten::convolution")
def either(operation: Operation) -> ScalingExponents:
    """The general form, into which PyTorch takes quantities such as unbatched convolutions apart."""
    return _convolution(operation, operation.argument(8, "groups", 1), transposed=operation.argument(6, "transposed"))


def _convolution(operation: Operation, groups: int, *, transposed: bool) -> ScalingExponents:
    """Channels are contracted group by group; positions, and the entries of the kernel, are all alike."""
    x, weight = operation.x, exponents_of(operation.args[1])
    count = len(weight.shape) - 2
    x = operation.require_equal_along(x, range(len(x.shape) - count, len(x.shape)))
    flat = operation.require_equal_along(weight, range(2, 2 + count), gauges=[weight.parameter])
    lead, channels = x.shape[: len(x.shape) - count - 1], x.shape[-count - 1]
    first, second = weight.shape[:2]
    x = reshaped(x, (*lead, groups, channels // groups))
    flat = replace(reshaped(flat, (groups, first // groups, second)), parameter=weight.parameter)
    letters = "abcdefgh"[: len(lead)]
    spec = f"{letters}xi,xio->{letters}xo" if transposed else f"{letters}xi,xoi->{letters}xo"
    result = contract(spec, [x, flat], operation.demands, operation.reason)
    result = reshaped(result, (*lead, math.prod(result.shape[-2:]), *(1,) * count))
    bias = operation.tensor(2, "bias")
    if bias is not None:
        terms = tuple(Term(factor, ids.reshape(-1, *(1,) * count)) for factor, ids in bias.terms)
        value = None if bias.value is None else bias.value.reshape(-1, *(1,) * count)  # type: ignore[attr-defined]
        bias = replace(bias, shape=(*bias.shape, *(1,) * count), terms=terms, value=value)
    value = None if result.value is None else torch.zeros(operation.shape)
    return plus(operation, replace(result, shape=operation.shape, value=value), bias, "adds a bias")

"""Operations that take only a shape from a tensor."""

from typing import Any

import torch

from noetherflow.detect.exponents import ScalingExponents
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.registry import exponent_rule


@exponent_rule("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like")
def filled(operation: Operation) -> ScalingExponents:
    """A tensor of a fixed number; memory that nothing has been written to counts as zeros."""
    number: Any = 1 if operation.key == "aten::ones_like" else 0
    if operation.key == "aten::full_like":
        fill = exponents_of(operation.argument(1, "fill_value"))
        if fill.number is None:
            operation.require_zero(fill)
            return ScalingExponents(operation.shape)
        number = fill.number
    return ScalingExponents(operation.shape, value=torch.full(operation.shape, number, dtype=operation.dtypes[0]))


@exponent_rule("aten::rand_like", "aten::randn_like")
def random(operation: Operation) -> ScalingExponents:
    """Random numbers of the shape of a tensor."""
    return ScalingExponents(operation.shape)

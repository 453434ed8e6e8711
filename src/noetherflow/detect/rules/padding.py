"""Numbers around the last axes."""

from typing import Any

import torch

from noetherflow.detect.exponents import ZERO, ScalingExponents, Term, compressed, varies_along
from noetherflow.detect.operation import Operation, exponents_of, opaque
from noetherflow.detect.rules.joining import zeros
from noetherflow.detect.rules.registry import exponent_rule


@exponent_rule("aten::constant_pad_nd")
def padded(operation: Operation) -> Any:
    """A fixed number around a tensor. Zeros have any exponent, so each of them gets an unknown."""
    x, widths = operation.x, operation.args[1]
    value = exponents_of(operation.argument(2, "value", 0))
    if not value.scale_free and any(width > 0 for width in widths):
        return opaque(operation)
    terms = x.terms
    for index in range(len(widths) // 2):
        before, after = widths[2 * index], widths[2 * index + 1]
        terms = _padded_along(operation, terms, len(x.shape) - 1 - index, before, after)
    return ScalingExponents(operation.shape, terms)


def _padded_along(
    operation: Operation, terms: tuple[Term, ...], axis: int, before: int, after: int
) -> tuple[Term, ...]:
    """Terms with new unknowns before and after the indices along an axis; negative widths cut indices off."""
    padded = []
    first = True
    for factor, ids in terms:
        if varies_along(ids, axis):
            low, high = max(0, -before), ids.shape[axis] - max(0, -after)
            ends = [
                torch.Size([max(0, width) if other == axis else size for other, size in enumerate(ids.shape)])
                for width in (before, after)
            ]
            # The exponent of a zero is the sum over all terms, so that unknowns in the first term suffice.
            start, end = (
                zeros(operation, shape) if first else torch.full(shape, ZERO, dtype=ids.dtype) for shape in ends
            )
            ids = compressed(torch.cat([start, ids.narrow(axis, low, high - low), end], axis))
            first = False
        padded.append(Term(factor, ids))
    return tuple(padded)


@exponent_rule(
    "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
    "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d",
)  # fmt: skip
def repeated(operation: Operation) -> ScalingExponents:
    """Entries of the border repeated or reflected: entries scale alike along the padded axes."""
    x, widths = operation.x, operation.args[1]
    axes = [len(x.shape) - 1 - index for index in range(len(widths) // 2) if any(widths[2 * index : 2 * index + 2])]
    return ScalingExponents(operation.shape, operation.require_equal_along(x, axes).terms)

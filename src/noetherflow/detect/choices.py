"""Stacks of matrices out of which the batch chooses, as a router chooses experts.

A tensor whose entry at position t comes from the matrix e(t) has exponents that depend on e(t). As long as no operation
combines positions, an operation demands the same of each matrix: its rule is applied to the exponents of every matrix,
as if all positions had chosen that matrix. Where positions are combined, all matrices have to scale alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from noetherflow.detect.exponents import ScalingExponents
from noetherflow.detect.operation import Operation, exponents_of, instances_in, mapped, values_of

_ENTRYWISE = {
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::neg", "aten::abs", "aten::pow", "aten::relu",
    "aten::leaky_relu", "aten::gelu", "aten::silu", "aten::sigmoid", "aten::tanh", "aten::clone", "aten::_to_copy",
    "aten::alias", "aten::clamp", "aten::where", "aten::maximum", "aten::minimum",
}  # fmt: skip
_MOVES = {
    "aten::view", "aten::_unsafe_view", "aten::permute", "aten::transpose", "aten::unsqueeze", "aten::squeeze",
    "aten::expand", "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::unbind",
}  # fmt: skip
_PRODUCTS = {"aten::bmm", "aten::matmul"}


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """The exponents of a tensor whose positions come from matrices that the batch chooses.

    Args:
        index: The tensor that says which position has chosen which matrix.
        variants: The exponents as if all positions had chosen the first matrix, the second matrix, and so on.
        axes: The axes along which the choice differs.
    """

    index: ScalingExponents
    variants: tuple[ScalingExponents, ...]
    axes: frozenset[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.variants[0].shape


def choices_in(value: Any) -> list[Choice]:
    """All choices in nested arguments."""
    return instances_in(Choice, value)


def apply_to_choices(operation: Operation, rule: Callable[[Operation], Any]) -> Any:
    """Apply a rule to arguments among which there are choices."""
    choices = choices_in((operation.args, operation.kwargs))
    agree = all(choice.index is choices[0].index for choice in choices)
    axes = _axes_after(operation) if agree else None
    if axes is None:
        return rule(_combined(operation))
    results = [rule(_variant(operation, number)) for number in range(len(choices[0].variants))]
    if not isinstance(results[0], list):
        return Choice(choices[0].index, tuple(results), axes[0])
    return [Choice(choices[0].index, parts, each) for parts, each in zip(zip(*results, strict=True), axes, strict=True)]


def _combined(operation: Operation) -> Operation:
    """The operation on tensors of which all matrices scale alike, because positions are combined."""

    def common(value: Any) -> Any:
        if not isinstance(value, Choice):
            return value
        first, *others = value.variants
        for other in others:
            operation.demands.equal(first.terms, other.terms, f"{operation.reason} combines chosen matrices")
        return first

    return replace(operation, args=mapped(common, operation.args), kwargs=mapped(common, operation.kwargs))


def _variant(operation: Operation, number: int) -> Operation:
    """The operation as if all positions had chosen one matrix."""

    def taken(value: Any) -> Any:
        return value.variants[number] if isinstance(value, Choice) else value

    return replace(operation, args=mapped(taken, operation.args), kwargs=mapped(taken, operation.kwargs))


def _axes_after(operation: Operation) -> list[frozenset[int]] | None:
    """The axes of each result along which the choice differs; None if the operation combines positions."""
    x, ndim = operation.args[0], len(operation.shape)
    choices = choices_in(operation.args)
    if operation.key in _ENTRYWISE:
        return [frozenset(axis + ndim - len(each.shape) for each in choices for axis in each.axes)]
    if operation.key in _PRODUCTS and all(axis < len(each.shape) - 2 for each in choices for axis in each.axes):
        return [frozenset(axis + ndim - len(each.shape) for each in choices for axis in each.axes)]
    if not isinstance(x, Choice) or len(choices) > 1:
        return None
    if operation.key in _MOVES:
        return _axes_after_move(operation, x)
    if operation.key == "aten::linear" and len(x.shape) - 1 not in x.axes:
        return [x.axes]
    if operation.key == "aten::index" and not any(operation.args[1][1:]) and operation.args[1]:
        width = len(exponents_of(operation.args[1][0]).shape)
        moved = frozenset(axis + width - 1 for axis in x.axes if axis)
        return [moved | frozenset(range(width)) if 0 in x.axes else moved]
    return None


def _axes_after_move(operation: Operation, x: Choice) -> list[frozenset[int]]:
    """Positions along the axes of a choice, moved as the entries are."""
    after: list[set[int]] = [set() for _ in operation.shapes]
    viewed = operation.key in ("aten::view", "aten::_unsafe_view")
    target = torch.ops.aten.reshape.default if viewed else operation.target
    for axis in x.axes:
        positions = torch.arange(x.shape[axis]).reshape([-1 if other == axis else 1 for other in range(len(x.shape))])
        moved = target(positions.expand(x.shape), *values_of(operation.args[1:]), **values_of(operation.kwargs))
        parts: Sequence[torch.Tensor] = moved if isinstance(moved, (list, tuple)) else [moved]
        for axes, part in zip(after, parts, strict=True):
            axes.update(a for a in range(part.ndim) if part.shape[a] > 1 and bool(part.diff(dim=a).any()))
    return [frozenset(axes) for axes in after]

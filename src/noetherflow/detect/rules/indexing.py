"""Entries at positions that a tensor gives: lookups, gathers, embeddings."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherflow.detect.choices import Choice
from noetherflow.detect.exponents import ScalingExponents, Term, compressed, varies_along, without
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.experts import is_stack, matrices_of
from noetherflow.detect.rules.moving import moved
from noetherflow.detect.rules.registry import exponent_rule


class Layout(NamedTuple):
    """Axes that indices replace, the first of the axes of the indices in the result, and the number of these axes."""

    axes: tuple[int, ...]
    first: int
    width: int


def layout_of(positions: Sequence[ScalingExponents | None], ndim: int, result: int | None) -> Layout:
    """Where the axes of indices stand in `x[positions]`.

    Args:
        positions: The indices; None for a complete axis.
        ndim: The number of dimensions of x.
        result: The number of dimensions of the result, if it is known.

    Returns:
        The layout.
    """
    axes: list[int] = []
    axis = width = 0
    given = [index for index in positions if index is not None]
    for index in positions:
        covered = 1
        if index is not None:
            size = len(index.shape)
            # A mask replaces as many axes as it has; it is told by its type, or else by the shape of the result.
            masks = torch.as_tensor(index.value).dtype in (torch.bool, torch.uint8) if index.constant else False
            if not index.constant and result is not None:
                masks = len(given) == 1 and ndim - 1 + size != result
            covered, width = (size, max(width, 1)) if masks else (1, max(width, size))
            axes += range(axis, axis + covered)
        axis += covered
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    return Layout(tuple(axes), axes[0] if adjacent else 0, width)


@exponent_rule("aten::index")
def indexed(operation: Operation) -> Any:
    """x[positions]: entries at positions that are not fixed scale alike along the axes that the positions replace."""
    x = operation.x
    positions = [None if index is None else exponents_of(index) for index in operation.args[1]]
    layout = layout_of(positions, len(x.shape), len(operation.shape))
    # Positions along several axes pair these axes up, so that lines along any of them are taken apart.
    for term in x.terms:
        if len({varies_along(term.ids, axis) for axis in layout.axes}) > 1:
            operation.demands.forbid_mixing([term], operation.reason)
    if all(index is None or index.fixed for index in positions):
        return moved(operation)
    for index in positions:
        if index is not None:
            operation.require_zero(index)
    if layout.axes == (0,) and is_stack(x) and len(positions) == 1:
        matrices = matrices_of(operation, x)
        variants = tuple(operation.results(_placed(each.terms, layout)) for each in matrices)
        return Choice(exponents_of(positions[0]), variants, frozenset(range(layout.width)))
    common = operation.require_equal_along(x, layout.axes, gauges=[x.parameter], why="picks entries")
    return operation.results(_placed(common.terms, layout))


def _placed(terms: Iterable[Term], layout: Layout) -> list[Term]:
    """Terms of size 1 along the axes that indices replace, with the axes of the indices in their place."""
    placed = []
    for factor, ids in terms:
        rest = without(ids, layout.axes)
        before, after = rest.shape[: layout.first], rest.shape[layout.first :]
        placed.append(Term(factor, rest.reshape(*before, *(1,) * layout.width, *after)))
    return placed


def axes_told_apart(index: ScalingExponents, dim: int) -> list[int]:
    """The axes other than `dim` along which positions of the shape of a tensor may differ, as in `torch.gather`."""
    shape = index.shape
    if index.fixed:
        shape = tuple(compressed(torch.as_tensor(index.value)).shape)
    elif index.constant:
        # Positions that the batch gives are equal along an axis only if they are expanded along it.
        strides = torch.as_tensor(index.value).stride()
        shape = tuple(1 if stride == 0 else size for size, stride in zip(index.shape, strides, strict=True))
    return [axis for axis, size in enumerate(shape) if size > 1 and axis != dim % len(shape)]


@exponent_rule("aten::index_select", "aten::gather")
def selected(operation: Operation) -> Any:
    """Entries along one axis, at positions that are given by a tensor."""
    x, dim, index = operation.x, operation.args[1], exponents_of(operation.args[2])
    if operation.key == "aten::gather":
        operation.forbid_mixing_along(x, axes_told_apart(index, dim))
    if index.fixed:
        return moved(operation)
    operation.require_zero(index)
    common = operation.require_equal_along(x, [dim], gauges=[x.parameter], why="picks entries")
    terms = []
    for factor, ids in common.terms:
        for axis, size in enumerate(operation.shape):
            if 1 < size < ids.shape[axis]:
                ids = ids.narrow(axis, 0, size)  # gather takes no more entries along an axis than the index has
        terms.append(Term(factor, ids))
    return operation.results(terms)


@exponent_rule("aten::embedding")
def embedded(operation: Operation) -> ScalingExponents:
    """Rows of a table: rows that the batch chooses scale alike, and a matrix may act on all of them."""
    table, index = operation.x, exponents_of(operation.args[1])
    if operation.argument(3, "scale_grad_by_freq", False):
        operation.require_zero(table, "has gradients that are no derivatives")
    if index.fixed:
        rows: Tensor = torch.as_tensor(index.value)
        terms = tuple(Term(factor, compressed(ids.expand(table.shape)[rows])) for factor, ids in table.terms)
    else:
        operation.require_zero(index)
        terms = _rows_in_common(operation, table)
    result = ScalingExponents(operation.shape, terms)
    operation.allow_mixing(result, -1)
    return result


@exponent_rule("aten::_embedding_bag")
def bagged(operation: Operation) -> Any:
    """Sums, means or maxima of the rows of a table."""
    if operation.argument(3, "scale_grad_by_freq", False):
        operation.require_zero(operation.x, "has gradients that are no derivatives")
    if operation.argument(4, "mode", 0) == 2:
        operation.forbid_mixing(operation.x)
    weights = operation.tensor(6, "per_sample_weights")
    if weights is not None:
        operation.require_zero(weights, "has weights of rows")
    return operation.results(_rows_in_common(operation, operation.x))


def _rows_in_common(operation: Operation, table: ScalingExponents) -> tuple[Term, ...]:
    common = operation.require_equal_along(table, [0], gauges=[table.parameter], why="looks up rows")
    ndim = len(operation.shape)
    return tuple(Term(factor, ids.reshape((1,) * (ndim - 1) + (-1,))) for factor, ids in common.terms)

"""Tensors put together out of parts, or written into others."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noetherflow.detect.exponents import ZERO, ScalingExponents, Term, aligned, compressed
from noetherflow.detect.operation import Operation, exponents_of, opaque, values_of
from noetherflow.detect.rules.registry import exponent_rule


def assembled(
    operation: Operation, parts: Sequence[ScalingExponents], build: Callable[[list[Tensor]], Tensor]
) -> ScalingExponents:
    """The exponents of a tensor whose entries are entries of its parts.

    Args:
        operation: The operation.
        parts: The parts. Parts of zeros have any exponent: they get unknowns of their own.
        build: Puts tensors of the shapes of the parts together.

    Returns:
        The exponents, term by term if all factors agree.
    """
    factors = {factor for part in parts for factor, _ in part.terms}
    if not factors:
        return ScalingExponents(operation.shape)
    factor = factors.pop() if len(factors) == 1 else 1.0
    columns = []
    for part in parts:
        if part.scale_free:
            columns.append([zeros(operation, part.shape)])
        elif all(each == factor for each, _ in part.terms):
            columns.append([ids for _, ids in part.terms])
        else:
            columns.append([operation.demands.as_single_term(part, operation.reason)])
    terms = []
    for index in range(max(map(len, columns))):
        tensors = []
        for part, column in zip(parts, columns, strict=True):
            empty = index >= len(column) or not math.prod(part.shape)
            ids = torch.full((1,) * len(part.shape), ZERO) if empty else column[index]
            tensors.append(ids.expand(part.shape))
        terms.append(Term(factor, compressed(build(tensors))))
    return ScalingExponents(operation.shape, tuple(terms))


def zeros(operation: Operation, shape: Sequence[int]) -> Tensor:
    """Unknowns of entries that are zero: they have any exponent, but no matrix mixes them with other entries."""
    ids = operation.demands.unknowns.new(shape)
    if ids.numel():
        operation.demands.allow_mixing(ids.reshape(-1), 0)
    return ids


@exponent_rule("aten::cat", "aten::stack")
def joined(operation: Operation) -> ScalingExponents:
    """Tensors side by side."""
    parts = [exponents_of(part) for part in operation.args[0]]
    return assembled(
        operation, parts, lambda tensors: operation.target(tensors, *operation.args[1:], **operation.kwargs)
    )


@exponent_rule("aten::slice_scatter", "aten::select_scatter", "aten::diagonal_scatter")
def inserted(operation: Operation) -> ScalingExponents:
    """A tensor of which a part is replaced by another."""
    parts = [operation.x, exponents_of(operation.args[1])]
    return assembled(
        operation, parts, lambda tensors: operation.target(*tensors, *operation.args[2:], **operation.kwargs)
    )


@exponent_rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scattered(operation: Operation) -> Any:
    """A tensor into which entries are written, or to which they are added, at positions along an axis."""
    base, axis = operation.x, operation.args[1] % max(1, len(operation.x.shape))
    positions, source = exponents_of(operation.args[2]), exponents_of(operation.args[3])
    adds = operation.key == "aten::scatter_add"
    if operation.key == "aten::scatter_reduce":
        how = operation.argument(4, "reduce")
        if how == "prod":
            return opaque(operation)
        adds = True
        if how in ("amax", "amin"):
            operation.forbid_mixing(base)
            operation.forbid_mixing(source)
    if operation.argument(4, "reduce") == "multiply":
        return opaque(operation)
    return written(operation, base, source, [axis], positions, adds=adds)


@exponent_rule("aten::index_put")
def put(operation: Operation) -> Any:
    """A tensor into which entries are written, or to which they are added, at given indices."""
    base, source = operation.x, exponents_of(operation.args[2])
    positions = [None if index is None else exponents_of(index) for index in operation.args[1]]
    axes = [axis for axis, index in enumerate(positions) if index is not None]
    fixed = all(index.fixed for index in positions if index is not None)
    if not operation.argument(3, "accumulate", False) and fixed:
        indices = values_of(operation.args[1])
        # Values are broadcast to the shape of the entries that they replace.
        taken = torch.zeros(base.shape, dtype=torch.bool)[tuple(slice(None) if i is None else i for i in indices)]
        spread = ScalingExponents(tuple(taken.shape), aligned(source.terms, taken.ndim), source.value, source.varies)
        if spread.constant:
            spread = ScalingExponents(spread.shape, value=torch.as_tensor(source.value).expand(spread.shape))
        return assembled(operation, [base, spread], lambda tensors: operation.target(tensors[0], indices, tensors[1]))
    if axes != list(range(axes[0], axes[0] + len(axes))) or any(
        index is not None and index.terms for index in positions
    ):
        return opaque(operation)
    # The dimensions of the indices, broadcast, stand in the place of the axes.
    width = max(len(index.shape) for index in positions if index is not None)
    first = axes[0]
    rest = len(base.shape) - first - len(axes)
    spread = ScalingExponents(source.shape, aligned(source.terms, first + width + rest))
    equal = operation.require_equal_along(spread, range(first, first + width))
    kept = tuple(
        Term(factor, ids.reshape(*ids.shape[:first], *(1,) * len(axes), *ids.shape[first + width :]))
        for factor, ids in equal.terms
    )
    return _combined(operation, base, source, kept, axes)


def written(
    operation: Operation,
    base: ScalingExponents,
    source: ScalingExponents,
    axes: Sequence[int],
    positions: ScalingExponents,
    *,
    adds: bool,
) -> ScalingExponents:
    """Entries of a source, written into a base or added to it, along axes at positions of the shape of the source."""
    if positions.fixed and not adds and source.shape == positions.shape:
        index = torch.as_tensor(positions.value)
        return assembled(operation, [base, source], lambda tensors: tensors[0].scatter(axes[0], index, tensors[1]))
    operation.require_zero(positions)
    return _combined(operation, base, source, operation.require_equal_along(source, axes).terms, axes)


def _combined(
    operation: Operation,
    base: ScalingExponents,
    source: ScalingExponents,
    terms: Sequence[Term],
    axes: Sequence[int],
) -> ScalingExponents:
    """Base and source at positions that are not known: all of both scale alike along the axes."""
    if source.scale_free:
        return ScalingExponents(operation.shape, operation.require_equal_along(base, axes).terms)
    common = ScalingExponents(operation.shape, tuple(terms))
    if base.scale_free:
        return common
    kept = operation.require_equal_along(base, axes)
    return ScalingExponents(operation.shape, operation.require_equal(kept, common))

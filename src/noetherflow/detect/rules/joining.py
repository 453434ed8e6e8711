"""Tensors put together out of parts, or written into others."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noetherflow.detect.exponents import ZERO, ScalingExponents, Term, aligned, compressed, varies_along
from noetherflow.detect.operation import Operation, exponents_of, opaque, values_of
from noetherflow.detect.rules.indexing import axes_told_apart, layout_of
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
            columns.append([zeros(operation, _needed(part.shape, parts))])
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


def _needed(shape: Sequence[int], parts: Sequence[ScalingExponents]) -> list[int]:
    """The shape of unknowns of zeros: only along axes along which the exponents of other parts vary."""
    axes = range(len(shape)) if all(len(part.shape) == len(shape) for part in parts) else range(1)
    rigid = [
        axis for axis in axes if not any(varies_along(ids, axis) for part in parts for _, ids in part.terms if ids.ndim)
    ]
    return [1 if axis in rigid else size for axis, size in enumerate(shape)]


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
def inserted(operation: Operation) -> Any:
    """A tensor of which a part is replaced by another."""
    parts = [operation.x, exponents_of(operation.args[1])]
    return replaced(
        operation, parts, lambda tensors: operation.target(*tensors, *operation.args[2:], **operation.kwargs)
    )


def replaced(operation: Operation, parts: Sequence[ScalingExponents], build: Callable[[list[Tensor]], Tensor]) -> Any:
    """A tensor into which another is written: no matrix may mix entries of which only a part is replaced.

    Args:
        operation: The operation.
        parts: The two tensors.
        build: Writes the second tensor of a list into the first.

    Returns:
        The exponents.
    """
    numbers = [torch.full((1,) * len(part.shape), float(number)) for number, part in enumerate(parts)]
    sources = build([number.expand(part.shape).clone() for number, part in zip(numbers, parts, strict=True)])
    if int((sources == 1).sum()) < math.prod(parts[1].shape):
        return opaque(operation)  # Of several writes to a place one counts, but all of them get gradients.
    for number, part in enumerate(parts):
        region = sources == number
        box = torch.ones((), dtype=torch.bool)
        for axis in range(region.ndim):
            others = [other for other in range(region.ndim) if other != axis]
            box = box & (region.any(dim=others, keepdim=True) if others else region)
        if not torch.equal(box.expand(region.shape), region):
            operation.forbid_mixing(part)
    return assembled(operation, parts, build)


@exponent_rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scattered(operation: Operation) -> Any:
    """A tensor into which entries are written, or to which they are added, at positions along an axis."""
    base, axis = operation.x, operation.args[1] % max(1, len(operation.x.shape))
    positions, source = exponents_of(operation.args[2]), exponents_of(operation.args[3])
    how = operation.argument(4, "reduce", "sum" if operation.key == "aten::scatter_add" else None)
    if how in ("prod", "multiply"):
        return opaque(operation)
    told_apart = axes_told_apart(positions, axis) if positions.shape else []
    for part in (base, source):
        operation.forbid_mixing_along(part, range(len(part.shape)) if how in ("amax", "amin") else told_apart)
    if source.shape != positions.shape:
        if source.shape:  # Only as many entries as there are positions are read.
            source = operation.require_equal_along(source, range(len(source.shape)))
        value = torch.as_tensor(source.value).expand(positions.shape) if not source.shape and source.constant else None
        terms = aligned(source.terms, len(positions.shape))
        source = ScalingExponents(positions.shape, terms, value=value, varies=source.varies)
    if positions.fixed and how is None:
        index = torch.as_tensor(positions.value)
        return replaced(operation, [base, source], lambda tensors: tensors[0].scatter(axis, index, tensors[1]))
    if positions.fixed:
        index = torch.as_tensor(positions.value)
        return _added(operation, base, source, lambda ids: ids.gather(axis, index))
    operation.require_zero(positions)
    operation.forbid_mixing_along(base, [axis])
    # Along the other axes, positions may reach a part of the base only.
    partial = [other for other, size in enumerate(positions.shape) if size != base.shape[other]]
    axes = {axis, *partial} if base.shape else set()
    return _combined(operation, base, source, operation.require_equal_along(source, axes).terms, sorted(axes))


@exponent_rule("aten::index_put")
def put(operation: Operation) -> Any:
    """A tensor into which entries are written, or to which they are added, at given indices."""
    base, source = operation.x, exponents_of(operation.args[2])
    positions = [None if index is None else exponents_of(index) for index in operation.args[1]]
    given = [index for index in positions if index is not None]
    adds = operation.argument(3, "accumulate", False)
    if all(index.fixed for index in given):
        return _put_at_fixed_positions(operation, base, source, adds=adds)
    if not all(index.constant for index in given):
        # Positions or a mask: all entries scale alike, unless zeros are written.
        operation.forbid_mixing(base)
        operation.forbid_mixing(source)
        for index in given:
            operation.require_zero(index)
        terms = operation.require_equal_along(source, range(len(source.shape))).terms
        numbers = aligned([Term(factor, ids.reshape(())) for factor, ids in terms], len(base.shape))
        return _combined(operation, base, source, numbers, range(len(base.shape)))
    layout = layout_of(positions, len(base.shape), None)
    if list(layout.axes) != list(range(layout.axes[0], layout.axes[-1] + 1)):
        return opaque(operation)
    operation.forbid_mixing_along(base, layout.axes)
    # The dimensions of the indices, broadcast, stand in the place of the axes.
    first, width, count = layout.first, layout.width, len(layout.axes)
    rest = len(base.shape) - first - count
    spread = ScalingExponents(source.shape, aligned(source.terms, first + width + rest), source.value, source.varies)
    equal = operation.require_equal_along(spread, range(first, first + width)) if spread.terms else spread
    kept = tuple(
        Term(factor, ids.reshape(*ids.shape[:first], *(1,) * count, *ids.shape[first + width :]))
        for factor, ids in equal.terms
    )
    return _combined(operation, base, source, kept, layout.axes)


def _put_at_fixed_positions(
    operation: Operation, base: ScalingExponents, source: ScalingExponents, *, adds: bool
) -> Any:
    """Entries written to known positions; what is added to entries scales as they do."""
    indices = values_of(operation.args[1])
    at = tuple(slice(None) if index is None else index for index in indices)
    # Values are broadcast to the shape of the entries that they replace.
    shape = torch.zeros(()).expand(base.shape)[at].shape
    value = torch.as_tensor(source.value).expand(shape) if source.constant else None
    spread = ScalingExponents(tuple(shape), aligned(source.terms, len(shape)), value, source.varies)
    if not adds:
        parts = [base, spread]
        return replaced(operation, parts, lambda tensors: operation.target(tensors[0], indices, tensors[1]))
    layout = layout_of([None if i is None else exponents_of(i) for i in operation.args[1]], len(base.shape), len(shape))
    operation.forbid_mixing_along(base, layout.axes)
    operation.forbid_mixing_along(spread, range(layout.first, layout.first + layout.width))
    return _added(operation, base, spread, lambda ids: ids[at])


def _added(
    operation: Operation, base: ScalingExponents, source: ScalingExponents, taken: Callable[[Tensor], Tensor]
) -> ScalingExponents:
    """Entries of a source, added to the entries of a base that `taken` takes: both scale alike."""
    # Callers forbid to mix entries along axes along which only a part of the base is taken.
    if source.scale_free:
        return ScalingExponents(operation.shape, base.terms)
    if base.scale_free:
        base = ScalingExponents(base.shape, (Term(1.0, operation.demands.unknowns.new(base.shape)),))
    reached = tuple(Term(factor, taken(ids.expand(base.shape))) for factor, ids in base.terms)
    operation.demands.equal(reached, source.terms, operation.reason)
    return ScalingExponents(operation.shape, base.terms)


def _combined(
    operation: Operation,
    base: ScalingExponents,
    source: ScalingExponents,
    terms: Sequence[Term],
    axes: Sequence[int],
) -> ScalingExponents:
    """Base and source at positions that are not known: all of both scale alike along the axes."""
    if source.scale_free:
        return ScalingExponents(operation.shape, base.terms)
    common = ScalingExponents(operation.shape, tuple(terms))
    if base.scale_free:
        return common
    kept = operation.require_equal_along(base, axes)
    return ScalingExponents(operation.shape, operation.require_equal(kept, common))

"""Operations that only move entries: they do to unknowns what they do to numbers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from noetherflow.detect.exponents import Term, compressed, varies_along
from noetherflow.detect.operation import Operation, opaque, tensors_in, values_of
from noetherflow.detect.rules.registry import exponent_rule

# The position of the argument `dim` of operations that keep a part of the indices along an axis.
_PARTS = {
    "slice": 1, "select": 1, "index_select": 1, "gather": 1, "unfold": 1,
    "unbind": 1, "split": 2, "split_with_sizes": 2,
}  # fmt: skip


@exponent_rule(
    "aten::view", "aten::_unsafe_view", "aten::permute", "aten::transpose", "aten::t", "aten::unsqueeze",
    "aten::squeeze", "aten::expand", "aten::slice", "aten::select", "aten::flip", "aten::roll", "aten::repeat",
    "aten::repeat_interleave", "aten::diagonal", "aten::unfold", "aten::pixel_shuffle", "aten::pixel_unshuffle",
    "aten::channel_shuffle", "aten::split", "aten::split_with_sizes", "aten::unbind",
)  # fmt: skip
def moved(operation: Operation) -> Any:
    """The operation itself, applied to the unknowns of every term."""
    x = operation.x
    if any(isinstance(argument, torch.dtype) for argument in operation.args):
        return opaque(operation)  # view(dtype) reads the bits of numbers
    if not all(other.fixed for other in tensors_in((operation.args[1:], operation.kwargs))):
        return opaque(operation)  # numbers of repetitions that the batch gives
    # Unknowns that are expanded have no memory of their own, which `view` needs.
    viewed = operation.key in ("aten::view", "aten::_unsafe_view")
    target = torch.ops.aten.reshape.default if viewed else operation.target
    arguments, options = values_of(operation.args[1:]), values_of(operation.kwargs)
    results: list[list[Term]] = [[] for _ in operation.shapes]
    several = False
    for factor, ids in x.terms:
        if _breaks_lines(operation, Term(factor, ids)):
            operation.demands.forbid_mixing([Term(factor, ids)], operation.reason)
        moved_ids = target(ids.expand(x.shape), *arguments, **options)
        several = isinstance(moved_ids, (tuple, list))
        for result, part in zip(results, moved_ids if several else [moved_ids], strict=True):
            result.append(Term(factor, compressed(part)))
    made = [
        replace(x, shape=shape, terms=tuple(terms), value=None, factors=None)
        for shape, terms in zip(operation.shapes, results, strict=True)
    ]
    return made if several or operation.several else made[0]


def _breaks_lines(operation: Operation, term: Term) -> bool:
    """Whether entries that a matrix would mix with each other are no longer side by side, or not all of them."""
    ndim, key = len(operation.x.shape), operation.key.removeprefix("aten::")

    def varies(axis: int) -> bool:
        return varies_along(term.ids, axis % max(1, ndim))

    if key == "diagonal":
        first, second = operation.argument(2, "dim1", 0), operation.argument(3, "dim2", 1)
        return varies(first) != varies(second)
    if key == "roll":
        return ndim > 1 and not operation.argument(2, "dims", ()) and term.ids.numel() > 1
    if key not in _PARTS or not ndim or not varies(operation.argument(_PARTS[key], "dim", 0)):
        return False
    # An axis that another axis was merged into repeats its unknowns. A part of it may cut through a repetition: then
    # the repetitions that are kept are not those of each unknown.
    ids = term.ids.expand(operation.x.shape) if key == "gather" else term.ids
    dim = operation.argument(_PARTS[key], "dim", 0) % ndim
    arguments, options = values_of(operation.args[1:]), values_of(operation.kwargs)
    kept, numbers = (operation.target(each, *arguments, **options) for each in (ids, _repetitions(ids, dim)))
    pairs = zip(kept, numbers, strict=True) if isinstance(kept, (tuple, list)) else [(kept, numbers)]
    return any(not _rectangular(*pair) for pair in pairs)


def _repetitions(ids: Tensor, dim: int) -> Tensor:
    """For every index along an axis, how often its unknown has already come before along that axis."""
    rows = ids.movedim(dim, -1)
    ordered, order = rows.sort(dim=-1, stable=True)
    positions = torch.arange(rows.shape[-1]).expand(rows.shape)
    starts = torch.where(ordered.diff(dim=-1, prepend=ordered[..., :1] - 1) != 0, positions, 0).cummax(-1).values
    return torch.empty_like(ids).movedim(dim, -1).contiguous().scatter(-1, order, positions - starts).movedim(-1, dim)


def _rectangular(ids: Tensor, numbers: Tensor) -> bool:
    """Whether each unknown comes with each number."""
    pairs = torch.stack([ids.reshape(-1), numbers.reshape(-1)])
    return pairs.unique(dim=1).shape[1] == ids.unique().numel() * numbers.unique().numel()

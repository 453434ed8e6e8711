"""Operations that only move entries: they do to unknowns what they do to numbers."""

from dataclasses import replace
from typing import Any

import torch

from noetherflow.detect.exponents import Term, compressed
from noetherflow.detect.operation import Operation, opaque, values_of
from noetherflow.detect.rules.registry import exponent_rule


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
    # Unknowns that are expanded have no memory of their own, which `view` needs.
    viewed = operation.key in ("aten::view", "aten::_unsafe_view")
    target = torch.ops.aten.reshape.default if viewed else operation.target
    arguments, options = values_of(operation.args[1:]), values_of(operation.kwargs)
    results: list[list[Term]] = [[] for _ in operation.shapes]
    several = False
    for factor, ids in x.terms:
        moved_ids = target(ids.expand(x.shape), *arguments, **options)
        several = isinstance(moved_ids, (tuple, list))
        for result, part in zip(results, moved_ids if several else [moved_ids], strict=True):
            result.append(Term(factor, compressed(part)))
    made = [
        replace(x, shape=shape, terms=tuple(terms), factors=None)
        for shape, terms in zip(operation.shapes, results, strict=True)
    ]
    return made if several or operation.several else made[0]

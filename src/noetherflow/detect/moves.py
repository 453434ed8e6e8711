"""Operations that only move entries: they do to unknowns what they do to numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from noetherflow.detect.call import Call, as_scaled, opaque, values
from noetherflow.detect.exponents import ZERO, Scaled, Term, collapse, compressed, single

SEVERAL = {"split", "split_with_sizes", "chunk", "unbind", "tensor_split"}


def moved(call: Call) -> Any:
    """An operation that only moves entries does to the unknowns what it does to numbers."""
    x = call.x
    # Unknowns that were expanded have no memory of their own to be viewed otherwise.
    target = torch.ops.aten.reshape.default if call.name in {"view", "_unsafe_view"} else call.target
    results: list[list[Term]] = [[] for _ in call.shapes]
    for factor, ids in x.terms:
        found = target(ids.expand(x.shape), *values(call.args[1:]), **values(call.kwargs))
        for number, one in enumerate(found if isinstance(found, (tuple, list)) else [found]):
            results[number].append(Term(factor, compressed(one)))
    made = [replace(x, shape=shape, terms=tuple(terms)) for shape, terms in zip(call.shapes, results, strict=True)]
    return made if call.name in SEVERAL else made[0]


def joined(call: Call) -> Scaled:
    """Several tensors put together."""
    parts = [as_scaled(part) for part in call.args[0]]
    if not any(part.terms for part in parts):
        return Scaled(call.shape)
    if all(len(part.terms) == 1 for part in parts if math.prod(part.shape)):
        factors = {part.terms[0].factor for part in parts if math.prod(part.shape)}
    else:
        factors = set()
    factor = factors.pop() if len(factors) == 1 else 1.0
    tensors = []
    for part in parts:
        if factor != 1.0 or (len(part.terms) == 1 and part.terms[0].factor == factor):
            ids = part.terms[0].ids if part.terms else torch.full((1,) * len(part.shape), ZERO)
        else:
            ids = single(part, call.equations, call.reason)
        tensors.append(ids.expand(part.shape) if math.prod(part.shape) else torch.zeros(part.shape, dtype=torch.long))
    found = compressed(call.target(tensors, *call.args[1:], **call.kwargs))
    return Scaled(call.shape, (Term(factor, found),))


def picked(call: Call) -> Any:
    """Entries at places that are given by a tensor: these have to scale alike, unless the places are fixed."""
    x = call.x
    if call.name == "index":
        places = [None if one is None else as_scaled(one) for one in call.args[1]]
        axes = [axis for axis, one in enumerate(places) if one is not None]
    else:
        places, axes = [as_scaled(call.args[2])], [call.args[1] % len(x.shape)]
    known = [one for one in places if one is not None]
    if any(not one.constant for one in known):
        return opaque(call)
    if x.parameter is not None or any(one.of_batch for one in known):
        x = collapse(x, axes, call.equations, f"{call.reason} picks entries", gauges=[x.parameter])
        x = replace(x, shape=call.x.shape)
    return moved(replace(call, args=(x, *call.args[1:])))


def padded(call: Call) -> Any:
    """Zeros, or repeated entries, around the last axes."""
    value = call.given(3, "value") if call.name == "pad" else call.given(2, "value") if "constant" in call.name else 0
    if value:
        return opaque(call)
    count = len(call.args[1]) // 2
    found = collapse(call.x, range(len(call.x.shape) - count, len(call.x.shape)), call.equations, call.reason)
    return Scaled(call.shape, found.terms)


def to_complex(call: Call) -> Scaled:
    """Pairs of numbers as one: both scale alike."""
    x = call.x
    found = collapse(x, [len(x.shape) - 1], call.equations, call.reason)
    return Scaled(call.shape, tuple(Term(factor, ids.squeeze(-1)) for factor, ids in found.terms))


def to_real(call: Call) -> Scaled:
    """One complex number as a pair."""
    return Scaled(call.shape, tuple(Term(factor, ids.unsqueeze(-1)) for factor, ids in call.x.terms))


def reshaped(x: Scaled, shape: Sequence[int]) -> Scaled:
    """The same entries in another shape."""
    terms = tuple(Term(factor, compressed(ids.expand(x.shape).reshape(tuple(shape)))) for factor, ids in x.terms)
    return replace(x, shape=tuple(shape), terms=terms)

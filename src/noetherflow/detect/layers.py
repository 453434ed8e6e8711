"""Normalisations, linear maps, convolutions, attention, embeddings."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from noetherflow.detect.call import SMALL, Call, alone, as_scaled
from noetherflow.detect.contraction import contract, matmul
from noetherflow.detect.exponents import Scaled, Term, aligned, collapse, compressed
from noetherflow.detect.moves import reshaped


def normalised(call: Call, x: Scaled, axes: Iterable[int], eps: float | None) -> Scaled:
    """What is divided by its own size: a common factor disappears, but for the number that keeps it from zero."""
    alone(call, x)
    common = collapse(x, axes, call.equations, call.reason)
    if eps and common.terms:
        if call.equations.tolerant and eps <= SMALL:
            call.equations.nearly((ids for _, ids in common.terms), f"{call.reason} adds eps = {eps:g}")
        else:
            call.equations.vanish(common.terms, f"{call.reason} has eps = {eps:g}")
    return Scaled(x.shape)


def affine(call: Call, x: Scaled, gain: Any, bias: Any, axis: int | None) -> Scaled:
    """Gain and bias after a normalisation, along one axis or, for None, along the last ones."""
    ndim = len(x.shape)

    def placed(one: Scaled) -> tuple[Term, ...]:
        if axis is None:
            return aligned(one.terms, ndim)
        shape = [1] * ndim
        shape[axis] = -1
        return tuple(Term(factor, ids.reshape(shape)) for factor, ids in one.terms)

    terms: tuple[Term, ...] = ()
    if gain is not None:
        terms = placed(gain)
        alone(call, gain)
    if bias is not None:
        call.equations.equal(terms, placed(bias), f"{call.reason}: gain and bias")
        terms = terms if placed(bias) else ()
    return Scaled(x.shape, terms)


def layer_norm(call: Call) -> Scaled:
    """Also RMSNorm, which has no bias."""
    axes = range(len(call.x.shape) - len(call.args[1]), len(call.x.shape))
    bias, eps = (call.given(3, "bias"), call.given(4, "eps", 1e-5)) if call.name == "layer_norm" else (None, None)
    if call.name == "rms_norm":
        eps = call.given(3, "eps")
        eps = torch.finfo(torch.float32).eps if eps is None else eps
    return affine(call, normalised(call, call.x, axes, eps), call.given(2, "weight"), bias, None)


def group_norm(call: Call) -> Scaled:
    """Groups of channels, each with all its places."""
    x, groups = call.x, call.args[1]
    batch, channels, *rest = x.shape
    shape = (batch, groups, channels // groups, *rest)
    terms = tuple(Term(factor, compressed(ids.expand(x.shape).reshape(shape))) for factor, ids in x.terms)
    normalised(call, Scaled(shape, terms), range(2, len(shape)), call.given(4, "eps", 1e-5))
    return affine(call, Scaled(x.shape), call.given(2, "weight"), call.given(3, "bias"), 1)


def batch_norm(call: Call) -> Scaled:
    """By the batch's own statistics, or a fixed affine map."""
    x, gain, bias, mean, _, training = (*call.args, None, None, None, None, None)[:6]
    if training or mean is None:
        axes = [axis for axis in range(len(x.shape)) if axis != 1]
        out = normalised(call, x, axes, call.given(7, "eps", 1e-5))
    else:
        # A running mean that is zero today will not be tomorrow.
        call.equations.vanish(x.terms, f"{call.reason} subtracts a running mean")
        out = Scaled(x.shape)
    return affine(call, out, gain, bias, 1)


def instance_norm(call: Call) -> Scaled:
    """Each channel of each example."""
    out = normalised(call, call.x, range(2, len(call.x.shape)), call.given(7, "eps", 1e-5))
    return affine(call, out, call.given(1, "weight"), call.given(2, "bias"), 1)


def weight_norm(call: Call) -> Scaled:
    """V / |v| times g: exactly without scale."""
    v, g, axis = call.x, as_scaled(call.args[1]), call.given(2, "dim", 0)
    alone(call, v)
    alone(call, g)
    collapse(v, [one for one in range(len(v.shape)) if one != axis], call.equations, call.reason, gauges=[v.parameter])
    return Scaled(call.shape, g.terms)


def cosine(call: Call) -> Scaled:
    """Cosine similarity, which knows directions only."""
    axis = call.given(2, "dim", 1)
    for x in (as_scaled(call.args[0]), as_scaled(call.args[1])):
        normalised(call, x, [axis % len(x.shape)], None)
    return Scaled(call.shape)


def linear(call: Call) -> Scaled:
    """X W^T + b."""
    x, weight, bias = call.x, as_scaled(call.args[1]), call.given(2, "bias")
    letters = "abcdefgh"[: len(x.shape) - 1]
    out = contract(f"{letters}i,oi->{letters}o", [x, weight], call.equations, call.reason)
    return _biased(call, out, bias)


def addmm(call: Call) -> Scaled:
    """B + x W."""
    bias, x, weight = (as_scaled(one) for one in call.args[:3])
    return _biased(call, matmul(x, weight, call.equations, call.reason), bias)


def _biased(call: Call, x: Scaled, bias: Scaled | None, axis: int | None = None) -> Scaled:
    if bias is None:
        return replace(x, shape=call.shape)
    shape = [1] * len(call.shape)
    if axis is not None:
        shape[axis] = -1
    placed = tuple(
        Term(factor, ids.reshape(shape)) if axis is not None else aligned([Term(factor, ids)], len(call.shape))[0]
        for factor, ids in bias.terms
    )
    call.equations.equal(x.terms, placed, f"{call.reason}: weight and bias")
    return Scaled(call.shape, x.terms if placed else (), scores=x.scores)


def bilinear(call: Call) -> Scaled:
    """X W y + b."""
    first, second, weight = (as_scaled(one) for one in call.args[:3])
    letters = "abcdefgh"[: len(first.shape) - 1]
    operands = [first, weight, second]
    out = contract(f"{letters}i,oij,{letters}j->{letters}o", operands, call.equations, call.reason)
    return _biased(call, out, call.given(3, "bias"))


def convolution(call: Call) -> Scaled:
    """Channels are contracted group by group; places and the entries of the kernel are all alike."""
    count = int(next(letter for letter in call.name if letter.isdigit()))
    transposed = "transpose" in call.name
    x, weight, bias = call.x, as_scaled(call.args[1]), call.given(2, "bias")
    groups = call.given(7 if transposed else 6, "groups", 1)
    places = range(len(x.shape) - count, len(x.shape))
    x = collapse(x, places, call.equations, call.reason)
    kernel = range(2, 2 + count)
    flat = collapse(weight, kernel, call.equations, call.reason, gauges=[weight.parameter])
    lead = x.shape[: len(x.shape) - count - 1]
    channels, first, second = x.shape[-count - 1], weight.shape[0], weight.shape[1]
    x = reshaped(x, (*lead, groups, channels // groups))
    flat = replace(reshaped(flat, (groups, first // groups, second)), parameter=weight.parameter)
    letters = "abcdefgh"[: len(lead)]
    spec = f"{letters}xi,xio->{letters}xo" if transposed else f"{letters}xi,xoi->{letters}xo"
    out = contract(spec, [x, flat], call.equations, call.reason)
    out = reshaped(out, (*lead, math.prod(out.shape[-2:])) + (1,) * count)
    return _biased(call, out, bias, axis=-count - 1)


def attention(call: Call) -> Scaled:
    """softmax(q k^T) v, with fewer heads of k and v than of q if it is said so."""
    query, key, value = (as_scaled(one) for one in call.args[:3])
    mask = call.given(3, "attn_mask")
    if mask is not None:
        call.equations.vanish(mask.terms, call.reason)
    if call.given(7, "enable_gqa"):
        key, value = (_repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    letters = "abcdefg"[: len(query.shape) - 2]
    scores = contract(f"{letters}le,{letters}se->{letters}ls", [query, key], call.equations, call.reason)
    call.equations.tag(scores.scores, "Q-K")
    call.equations.vanish(scores.terms, call.reason)
    weights = Scaled(scores.shape, attention=True)
    out = contract(f"{letters}ls,{letters}se->{letters}le", [weights, value], call.equations, call.reason)
    return replace(out, scores=())


def _repeated(x: Scaled, times: int) -> Scaled:
    terms = [Term(f, compressed(ids.expand(x.shape).repeat_interleave(times, -3))) for f, ids in x.terms]
    return replace(x, shape=(*x.shape[:-3], x.shape[-3] * times, *x.shape[-2:]), terms=tuple(terms))


def embedded(call: Call) -> Scaled:
    """Rows of a table, chosen by the batch: all rows must scale alike."""
    weight, index = call.x, as_scaled(call.args[1])
    found = collapse(weight, [0], call.equations, f"{call.reason} looks up rows", gauges=[weight.parameter])
    ndim = len(call.shape)
    terms = tuple(Term(factor, ids.reshape((1,) * (ndim - 1) + (-1,))) for factor, ids in found.terms)
    for _, ids in terms:
        call.equations.line(ids, ndim - 1)
    call.equations.vanish(index.terms, call.reason)
    return Scaled(call.shape, terms)

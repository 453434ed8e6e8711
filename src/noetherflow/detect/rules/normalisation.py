"""Normalisations: what is divided by its own size loses a common factor."""

from collections.abc import Iterable
from typing import Any

import torch

from noetherflow.detect.exponents import ScalingExponents, Term, aligned, reshaped
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.elementwise import TINY
from noetherflow.detect.rules.registry import exponent_rule


def normalised(operation: Operation, x: ScalingExponents, axes: Iterable[int], eps: float | None) -> ScalingExponents:
    """Entries divided by their norm over some axes, up to the eps that keeps the norm from vanishing."""
    operation.forbid_mixing(x)
    common = operation.require_equal_along(x, axes)
    if eps and common.terms:
        operation.ignore_small(common, eps, f"adds eps = {eps:g}")
    return ScalingExponents(x.shape)


def affine(
    operation: Operation,
    x: ScalingExponents,
    gain: ScalingExponents | None,
    bias: ScalingExponents | None,
    axis: int | None,
) -> ScalingExponents:
    """Gain and bias after a normalisation, along one axis or, for None, along the last axes."""
    ndim = len(x.shape)

    def placed(tensor: ScalingExponents) -> tuple[Term, ...]:
        if axis is None:
            return aligned(tensor.terms, ndim)
        shape = [1] * ndim
        shape[axis] = -1
        return tuple(Term(factor, ids.reshape(shape)) for factor, ids in tensor.terms)

    terms: tuple[Term, ...] = ()
    if gain is not None:
        terms = placed(gain)
        operation.forbid_mixing(gain)
    if bias is not None and not bias.scale_free:
        operation.demands.equal(terms, placed(bias), f"{operation.reason} adds a bias")
        terms = terms if placed(bias) else ()
    return ScalingExponents(x.shape, terms)


def _first(operation: Operation, result: ScalingExponents) -> Any:
    """The result among the statistics that a normalisation also returns, which do not scale."""
    rest = [ScalingExponents(shape) for shape in operation.shapes[1:]]
    return [result, *rest] if rest else result


@exponent_rule("aten::layer_norm", "aten::native_layer_norm")
def layer_norm(operation: Operation) -> Any:
    """LayerNorm over the last axes."""
    x, shape = operation.x, operation.args[1]
    result = normalised(
        operation, x, range(len(x.shape) - len(shape), len(x.shape)), operation.argument(4, "eps", 1e-5)
    )
    return _first(
        operation, affine(operation, result, operation.tensor(2, "weight"), operation.tensor(3, "bias"), None)
    )


@exponent_rule("aten::rms_norm", "aten::_fused_rms_norm")
def rms_norm(operation: Operation) -> Any:
    """RMSNorm over the last axes, which has no bias."""
    x, shape, eps = operation.x, operation.args[1], operation.argument(3, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    result = normalised(operation, x, range(len(x.shape) - len(shape), len(x.shape)), eps)
    return _first(operation, affine(operation, result, operation.tensor(2, "weight"), None, None))


@exponent_rule("aten::group_norm")
def group_norm(operation: Operation) -> ScalingExponents:
    """GroupNorm: groups of channels, each with all its positions."""
    x, groups = operation.x, operation.args[1]
    batch, channels, *rest = x.shape
    normalised(
        operation,
        reshaped(x, (batch, groups, channels // groups, *rest)),
        range(2, 3 + len(rest)),
        operation.argument(4, "eps", 1e-5),
    )
    gain, bias = operation.tensor(2, "weight"), operation.tensor(3, "bias")
    return affine(operation, ScalingExponents(x.shape), gain, bias, 1)


@exponent_rule("aten::_native_batch_norm_legit_functional")
def batch_norm_of_a_batch(operation: Operation) -> Any:
    """BatchNorm in train mode, with the running statistics as further results."""
    x, gain, bias, _, _, training = operation.args[:6]
    eps = operation.argument(7, "eps", 1e-5)
    return _first(operation, _batch_norm(operation, x, gain, bias, eps, running=not training))


@exponent_rule("aten::_native_batch_norm_legit_no_training")
def batch_norm_of_running_statistics(operation: Operation) -> Any:
    """BatchNorm in eval mode."""
    x, gain, bias = operation.args[:3]
    return _first(operation, _batch_norm(operation, x, gain, bias, None, running=True))


@exponent_rule("aten::_native_batch_norm_legit")
def batch_norm_without_statistics(operation: Operation) -> Any:
    """BatchNorm that keeps no running statistics, and InstanceNorm."""
    x, gain, bias = operation.args[:3]
    with_statistics = len(operation.args) > 6  # (x, gain, bias, mean, variance, training, momentum, eps)
    running = with_statistics and not operation.args[5]
    return _first(operation, _batch_norm(operation, x, gain, bias, operation.args[-1], running=running))


def _batch_norm(
    operation: Operation,
    x: ScalingExponents,
    gain: ScalingExponents | None,
    bias: ScalingExponents | None,
    eps: float | None,
    *,
    running: bool,
) -> ScalingExponents:
    if running:
        # A running mean that is zero now is another number after a step of training.
        operation.require_zero(x, "subtracts a running mean")
        result = ScalingExponents(x.shape)
    else:
        result = normalised(operation, x, [axis for axis in range(len(x.shape)) if axis != 1], eps)
    return affine(operation, result, gain, bias, 1)


@exponent_rule("aten::_weight_norm")
def weight_norm(operation: Operation) -> Any:
    """G v / |v|: v has no scale."""
    v, g, axis = operation.x, exponents_of(operation.args[1]), operation.argument(2, "dim", 0)
    operation.forbid_mixing(v)
    operation.forbid_mixing(g)
    operation.require_equal_along(v, [other for other in range(len(v.shape)) if other != axis], gauges=[v.parameter])
    return _first(operation, ScalingExponents(operation.shape, aligned(g.terms, len(operation.shape))))


@exponent_rule("aten::cosine_similarity")
def cosine(operation: Operation) -> ScalingExponents:
    """Cosine similarity, which knows directions only."""
    tensors = operation.x, exponents_of(operation.args[1])
    axis, eps = operation.argument(2, "dim", 1), operation.argument(3, "eps", 1e-8)
    ndim = max(len(x.shape) for x in tensors)
    for x in tensors:
        placed = ScalingExponents((1,) * (ndim - len(x.shape)) + x.shape, aligned(x.terms, ndim))
        # The norm is clamped at eps, which does nothing as long as eps is tiny.
        normalised(operation, placed, [axis % max(1, ndim)], eps if eps > TINY else None)
    return ScalingExponents(operation.shape)

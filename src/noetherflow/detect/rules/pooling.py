"""Pooling, resizing and sampling over the last axes, channel by channel."""

from typing import Any

from noetherflow.detect.exponents import ScalingExponents, Term
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.registry import Rule, exponent_rule


def spatial(*, linear: bool) -> Rule:
    """The rule of an operation over the last axes, as many as its name says: entries scale alike along them."""

    def rule(operation: Operation) -> Any:
        count = int(next(letter for letter in operation.key if letter.isdigit()))
        x = operation.x
        if not linear:
            operation.forbid_mixing(x)
        return operation.results(operation.require_equal_along(x, range(len(x.shape) - count, len(x.shape))).terms)

    return rule


exponent_rule(
    "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d",
    "aten::adaptive_avg_pool1d", "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d",
    "aten::upsample_nearest1d", "aten::upsample_nearest2d", "aten::upsample_nearest3d",
    "aten::upsample_linear1d", "aten::upsample_bilinear2d", "aten::upsample_trilinear3d", "aten::upsample_bicubic2d",
    "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa",
)(spatial(linear=True))  # fmt: skip
exponent_rule(
    "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices",
    "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d",
)(spatial(linear=False))  # fmt: skip


@exponent_rule("aten::grid_sampler_2d", "aten::grid_sampler_3d")
def sampled(operation: Operation) -> Any:
    """Values at positions of a grid, interpolated; the positions do not scale."""
    operation.require_zero(exponents_of(operation.args[1]))
    return spatial(linear=True)(operation)


@exponent_rule("aten::im2col")
def unfolded(operation: Operation) -> ScalingExponents:
    """Windows as columns: (B, C, H, W) to (B, C times the size of a window, windows)."""
    x = operation.x
    common = operation.require_equal_along(x, (-2, -1))
    size = operation.shape[-2] // x.shape[-3]
    terms = tuple(Term(factor, _per_window(ids.squeeze(-1), size)) for factor, ids in common.terms)
    return ScalingExponents(operation.shape, terms)


def _per_window(ids: Any, size: int) -> Any:
    """Every unknown of a channel, repeated for each entry of a window."""
    return ids.repeat_interleave(size, -2) if ids.shape[-2] > 1 else ids


@exponent_rule("aten::col2im")
def folded(operation: Operation) -> ScalingExponents:
    """Columns added up to a picture: all entries of a window of a channel scale alike."""
    x, channels = operation.x, operation.shape[-3]
    lead = x.shape[:-2]
    windows = ScalingExponents(
        (*lead, channels, x.shape[-2] // channels, x.shape[-1]),
        tuple(
            Term(factor, ids.expand(*ids.shape[:-2], x.shape[-2], ids.shape[-1]).reshape(
                *ids.shape[:-2], channels, -1, ids.shape[-1]))
            for factor, ids in x.terms
        ),
    )  # fmt: skip
    return ScalingExponents(operation.shape, operation.require_equal_along(windows, (-2, -1)).terms)

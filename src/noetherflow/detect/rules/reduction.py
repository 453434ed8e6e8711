"""Sums, norms, extremes and orders along axes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from noetherflow.detect.exponents import ScalingExponents, Term, power, without
from noetherflow.detect.operation import Operation, exponents_of
from noetherflow.detect.rules.contraction import contract
from noetherflow.detect.rules.elementwise import extreme
from noetherflow.detect.rules.registry import Rule, exponent_rule


def reduced(*, degree: float = 1.0, linear: bool = True, position: int = 1, default: int | None = None) -> Rule:
    """The rule of a reduction over axes.

    Args:
        degree: The power of a common factor that comes out.
        linear: Whether the reduction is linear, so that matrices may act on other axes.
        position: The position of the argument `dim`.
        default: The axis if `dim` is not given; None for all axes.

    Returns:
        The rule.
    """

    def rule(operation: Operation) -> Any:
        x = operation.x
        axes = _axes(operation.argument(position, "dim", default), len(x.shape))
        if x.factors is not None:
            x = _contracted(operation, x.factors, axes)
        elif not linear:
            operation.forbid_mixing(x)
        common = power(operation.require_equal_along(x, axes), degree)
        gone = () if len(operation.shape) == len(x.shape) else axes
        return operation.results(Term(factor, without(ids, gone)) for factor, ids in common.terms)

    return rule


def _axes(dims: Any, ndim: int) -> tuple[int, ...]:
    """Axes as numbers from 0; all of them for None and for an empty list."""
    if dims is None or dims == [] or isinstance(dims, bool):  # var(x, unbiased)
        return tuple(range(ndim))
    return tuple(dim % max(1, ndim) for dim in ([dims] if isinstance(dims, int) else dims))


def _contracted(
    operation: Operation, factors: tuple[ScalingExponents, ScalingExponents], axes: Sequence[int]
) -> ScalingExponents:
    """A product and the sum that follows as one contraction; with size 1 along the axes."""
    shape = factors[0].shape
    labels = "abcdefghijkl"[: len(shape)]
    output = "".join(label for axis, label in enumerate(labels) if axis not in axes)
    result = contract(f"{labels},{labels}->{output}", factors, operation.demands, operation.reason)

    def with_axes(sizes: Iterable[int]) -> list[int]:
        rest = iter(sizes)
        return [1 if axis in axes else next(rest) for axis in range(len(shape))]

    terms = tuple(Term(factor, ids.reshape(with_axes(ids.shape))) for factor, ids in result.terms)
    return replace(result, shape=tuple(with_axes(result.shape)), terms=terms)


exponent_rule("aten::sum", "aten::mean")(reduced())
exponent_rule("aten::amax", "aten::amin", "aten::median", "aten::nanmedian")(reduced(linear=False))
exponent_rule("aten::mode")(reduced(linear=False, default=-1))
exponent_rule("aten::kthvalue")(reduced(linear=False, position=2, default=-1))
exponent_rule("aten::var")(reduced(linear=False, degree=2.0))
exponent_rule("aten::argmax", "aten::argmin")(reduced(linear=False, degree=0.0))


@exponent_rule("aten::max", "aten::min")
def extreme_along(operation: Operation) -> Any:
    """The largest entry along an axis, or of all entries; with a second tensor, the larger of two entries."""
    if isinstance(operation.argument(1, "other"), ScalingExponents):
        return extreme(operation)
    return reduced(linear=False)(operation)


@exponent_rule("aten::linalg_vector_norm")
def norm(operation: Operation) -> Any:
    """A norm of order p; of order 0 it counts entries."""
    order = operation.argument(1, "ord", 2)
    return reduced(linear=False, position=2, degree=1.0 if order else 0.0)(operation)


@exponent_rule("aten::_cdist_forward")
def distances(operation: Operation) -> ScalingExponents:
    """Distances between points of two sets, which scale alike."""
    first, second = (exponents_of(points) for points in operation.args[:2])
    for points in (first, second):
        operation.forbid_mixing(points)
    axes = (-2, -1)
    terms = operation.require_equal(
        operation.require_equal_along(first, axes), operation.require_equal_along(second, axes)
    )
    return ScalingExponents(operation.shape, terms if operation.argument(2, "p") else ())


@exponent_rule("aten::prod")
def multiplied_along(operation: Operation) -> Any:
    """The product of n entries: n times the common exponent."""
    axes = _axes(operation.argument(1, "dim"), len(operation.x.shape))
    count = 1
    for axis in axes:
        count *= operation.x.shape[axis]
    return reduced(linear=False, degree=float(count))(operation)


@exponent_rule("aten::cumsum")
def running(operation: Operation) -> ScalingExponents:
    """A cumulative sum."""
    common = operation.require_equal_along(operation.x, [operation.argument(1, "dim")])
    return ScalingExponents(operation.shape, common.terms)


@exponent_rule("aten::cummax", "aten::cummin")
def running_extreme(operation: Operation) -> Any:
    """The largest entry so far along an axis, and its position."""
    operation.forbid_mixing(operation.x)
    return operation.results(operation.require_equal_along(operation.x, [operation.argument(1, "dim")]).terms)


@exponent_rule("aten::sort", "aten::topk")
def ordered(operation: Operation) -> Any:
    """Entries along an axis in their order: all of them scale alike; the positions do not scale."""
    position = 2 if operation.key == "aten::topk" else 1
    operation.forbid_mixing(operation.x)
    common = operation.require_equal_along(operation.x, [operation.argument(position, "dim", -1)])
    return operation.results(common.terms)

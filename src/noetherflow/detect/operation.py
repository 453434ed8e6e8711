"""One operation of a computation, as its exponent rule sees it: arguments, results, and what the rule may demand."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from noetherflow.detect.demands import Demands
from noetherflow.detect.exponents import ScalingExponents, Term, aligned, compressed, varies_along

_K = TypeVar("_K")

# The largest number that is taken for one that keeps a norm from vanishing.
SMALL = 1e-3


@final
@dataclass(frozen=True, eq=False)
class Operation:
    """An operation, for its exponent rule.

    Args:
        key: The name with its namespace, such as `aten::glu`.
        target: The function of PyTorch.
        args: The positional arguments; tensors are `ScalingExponents`.
        kwargs: The arguments by name, likewise.
        shapes: The shapes of the results.
        dtypes: The types of the results.
        reason: The name of the operation and the module in whose forward pass it runs, for explanations.
        demands: Where demands on exponents go.
        summed: Whether the result is summed over axes and used nowhere else.
        several: Whether the operation returns a list of tensors, also if the list has only one.

    Examples:
        >>> import noetherflow as nf
        >>> @nf.exponent_rule("mylib::ramp")
        ... def ramp(operation: nf.Operation) -> nf.ScalingExponents:
        ...     if operation.argument(1, "threshold", 0.0) != 0.0:
        ...         operation.require_zero(operation.x)
        ...         return operation.results()
        ...     operation.forbid_mixing(operation.x)
        ...     return operation.results(operation.x.terms)
    """

    key: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    reason: str
    demands: Demands
    summed: bool = False
    several: bool = False

    @property
    def x(self) -> ScalingExponents:
        """The exponents of the first argument."""
        return exponents_of(self.args[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result."""
        return self.shapes[0]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensor(self, position: int, name: str) -> ScalingExponents | None:
        """The exponents of a tensor, or of a number, among the arguments; None if it is not given."""
        value = self.argument(position, name)
        return None if value is None else exponents_of(value)

    def require_zero(self, x: ScalingExponents, why: str = "") -> None:
        """Demand that a tensor does not scale."""
        self.demands.vanish(x.terms, self._because(why))

    def require_equal(self, x: ScalingExponents, y: ScalingExponents, why: str = "") -> tuple[Term, ...]:
        """Demand that two tensors, broadcast to each other, scale alike. Zeros scale like any other tensor.

        Returns:
            The terms that both have in common.
        """
        ndim = max(len(x.shape), len(y.shape))
        left, right = aligned(x.terms, ndim), aligned(y.terms, ndim)
        if x.scale_free:
            return right
        if y.scale_free:
            return left
        self.demands.equal(left, right, self._because(why))
        if not left or not right:
            return ()
        return left if len(left) <= len(right) else right

    def require_equal_along(
        self, x: ScalingExponents, axes: Iterable[int], *, gauges: Iterable[str | None] = (), why: str = ""
    ) -> ScalingExponents:
        """Demand that a tensor scales alike at all indices along some axes; returns it with size 1 there."""
        if not x.shape:
            return x  # PyTorch takes a number for a tensor with a single axis of size 1.
        return self.demands.equal_along(x, axes, self._because(why), gauges=tuple(gauges))

    def allow_mixing(self, x: ScalingExponents, axis: int) -> None:
        """Say that the operation treats all indices along an axis alike, so that a matrix may act on them."""
        for _, ids in x.terms:
            self.demands.allow_mixing(ids, axis % len(x.shape))

    def forbid_mixing(self, x: ScalingExponents) -> None:
        """Say that the operation treats every entry by itself, so that only factors may act."""
        self.demands.forbid_mixing(x.terms, self.reason)

    def forbid_mixing_along(self, x: ScalingExponents, axes: Iterable[int]) -> None:
        """Forbid to mix entries of x along some axes, because the operation tells their indices apart."""
        chosen = {axis % max(1, len(x.shape)) for axis in axes}
        for term in x.terms:
            if any(varies_along(term.ids, axis) for axis in chosen):
                self.demands.forbid_mixing([term], self.reason)

    def forbid_mixing_by(self, x: ScalingExponents, factor: ScalingExponents) -> None:
        """Forbid to mix entries of x that are multiplied by different entries of a factor."""
        ndim = len(self.shape)
        shape = (1,) * (ndim - len(factor.shape)) + factor.shape
        if factor.fixed and isinstance(factor.value, Tensor):
            shape = tuple(compressed(factor.value.reshape(shape)).shape) if factor.value.numel() > 1 else (1,) * ndim
        for term in aligned(x.terms, ndim):
            if any(varies_along(term.ids, axis) and shape[axis] > 1 for axis in range(ndim)):
                self.demands.forbid_mixing([term], self.reason)

    def ignore_small(self, x: ScalingExponents, size: float, why: str) -> bool:
        """Whether a small number that is added to a tensor may be ignored; otherwise the tensor must not scale."""
        if x.terms and self.demands.tolerant and 0 < size <= SMALL:
            self.demands.approximate(x.terms, self._because(why))
            return True
        self.require_zero(x, why)
        return False

    def results(self, *terms: Iterable[Term]) -> Any:
        """The results with the given terms, in order; a list if there are several. Further results do not scale."""
        given = [tuple(each) for each in terms] + [()] * (len(self.shapes) - len(terms))
        made = [ScalingExponents(shape, each) for shape, each in zip(self.shapes, given, strict=True)]
        return made if self.several else made[0]

    def _because(self, why: str) -> str:
        return f"{self.reason} {why}" if why else self.reason


def opaque(operation: Operation) -> Any:
    """The rule of an operation that is not homogeneous, or not known: no input may scale, and no output does."""
    for x in tensors_in((operation.args, operation.kwargs)):
        operation.require_zero(x)
    return operation.results()


def unchanged(operation: Operation) -> ScalingExponents:
    """The rule of an operation that multiplies its first argument by fixed numbers at most: the exponents stay."""
    return replace(operation.x, shape=operation.shape, value=None)


def homogeneous(operation: Operation) -> ScalingExponents:
    """The rule of a function of every entry with f(c x) = c f(x) for all c > 0, such as a ReLU."""
    operation.forbid_mixing(operation.x)
    return ScalingExponents(operation.shape, aligned(operation.x.terms, len(operation.shape)))


def scale_invariant(operation: Operation) -> ScalingExponents:
    """The rule of a function of every entry with f(c x) = f(x) for all c > 0, such as the sign."""
    operation.forbid_mixing(operation.x)
    return ScalingExponents(operation.shape)


def plus(operation: Operation, x: ScalingExponents, y: ScalingExponents | None, why: str = "") -> ScalingExponents:
    """The exponents of a sum of two tensors, broadcast to the shape of the result."""
    if y is None:
        return replace(x, shape=operation.shape)
    terms = aligned(operation.require_equal(x, y, why), len(operation.shape))
    return ScalingExponents(operation.shape, terms, scores=x.scores or y.scores)


def instances_in(kind: type[_K], value: Any) -> list[_K]:
    """All objects of a class in nested arguments."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [x for each in value for x in instances_in(kind, each)] if isinstance(value, (list, tuple)) else []


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested arguments with a function applied to everything that is no container."""
    if isinstance(value, dict):
        return {key: mapped(function, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        # Lists of a graph have a class of their own, which operations do not take.
        results = [mapped(function, each) for each in value]
        return tuple(results) if isinstance(value, tuple) else results
    return function(value)


def tensors_in(value: Any) -> list[ScalingExponents]:
    """All tensors in nested arguments."""
    return instances_in(ScalingExponents, value)


def exponents_of(value: Any) -> ScalingExponents:
    """The exponents of an argument: a number is a tensor that does not scale."""
    if isinstance(value, ScalingExponents):
        return value
    # In float32 a number such as 1e-150 would be zero.
    dtype = torch.float64 if isinstance(value, float) else None
    return ScalingExponents((), value=torch.tensor(value, dtype=dtype))


def values_of(value: Any) -> Any:
    """Nested arguments with the tensors themselves in the place of their exponents."""
    return mapped(lambda each: each.value if isinstance(each, ScalingExponents) else each, value)

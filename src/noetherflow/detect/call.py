"""One operation of a graph, and what most of them have in common."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from noetherflow.detect.exponents import Equations, Scaled, aligned, compressed, varying

# A number added under a root or a norm so that nothing is divided by zero.
SMALL = 1e-3


@final
@dataclass(frozen=True, eq=False)
class Call:
    """One operation: its name, its arguments (tensors as `Scaled`), the shapes it returns, and where it stands.

    `summed` says that its result goes into a sum over axes and nowhere else.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    reason: str
    equations: Equations
    summed: bool = False

    def given(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def x(self) -> Scaled:
        """The first argument."""
        return as_scaled(self.args[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the only result."""
        return self.shapes[0]


def opaque(call: Call) -> Any:
    """Whatever scales must not reach it."""
    for x in scaled_in((call.args, call.kwargs)):
        call.equations.vanish(x.terms, call.reason)
    results = [Scaled(shape) for shape in call.shapes]
    return results[0] if len(results) == 1 else results


def passed(call: Call) -> Scaled:
    """What is the same as its first argument, entry by entry, up to fixed factors."""
    return replace(call.x, shape=call.shape)


def homogeneous(call: Call) -> Scaled:
    """f(c x) = c f(x) for c > 0, entry by entry."""
    alone(call, call.x)
    return Scaled(call.shape, call.x.terms)


def alone(call: Call, x: Scaled) -> None:
    """Entries of x are treated one by one."""
    for _, ids in x.terms:
        call.equations.alone(ids, call.reason)


def mixing(call: Call, x: Scaled, factor: Scaled) -> None:
    """Entries that are multiplied by factors of their own cannot be mixed."""
    ndim = len(call.shape)
    shape = (1,) * (ndim - len(factor.shape)) + factor.shape
    if factor.constant and isinstance(factor.value, Tensor) and not factor.of_batch:
        shape = tuple(compressed(factor.value.reshape(shape)).shape) if factor.value.numel() > 1 else (1,) * ndim
    for _, ids in aligned(x.terms, ndim):
        if any(varying(ids, axis) and shape[axis] > 1 for axis in range(ndim)):
            call.equations.alone(ids, call.reason)


def offset(call: Call, x: Scaled, size: float) -> Scaled:
    """A number added to what scales: allowed only if it is as good as nothing, and then it is said."""
    if x.terms and call.equations.tolerant and 0 < size <= SMALL:
        call.equations.nearly((ids for _, ids in x.terms), f"{call.reason} adds {size:g}")
        return Scaled(call.shape, aligned(x.terms, len(call.shape)), scores=x.scores)
    call.equations.vanish(x.terms, f"{call.reason} adds {size:g}" if size else call.reason)
    return Scaled(call.shape, scores=x.scores)


def scaled_in(value: Any) -> list[Scaled]:
    """All tensors in nested arguments."""
    if isinstance(value, Scaled):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [x for one in value for x in scaled_in(one)] if isinstance(value, (list, tuple)) else []


def as_scaled(value: Any) -> Scaled:
    """A number is a tensor that does not scale."""
    return value if isinstance(value, Scaled) else Scaled((), value=torch.tensor(value))


def values(value: Any) -> Any:
    """Arguments with the tensors themselves in them."""
    if isinstance(value, Scaled):
        return value.value
    if isinstance(value, dict):
        return {key: values(one) for key, one in value.items()}
    return type(value)(values(one) for one in value) if isinstance(value, (list, tuple)) else value


def nonzero(x: Scaled) -> bool:
    """Whether a constant is anything but zeros."""
    return bool(torch.as_tensor(x.value).bool().any())


def without(ids: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A term without some axes of size one."""
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])


Rule = Callable[[Call], Any]

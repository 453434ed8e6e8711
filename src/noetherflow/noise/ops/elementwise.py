"""Functions of single entries: a parameter is expanded over the examples, so that each has a gradient of its own."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.calls import is_in_place, leaves_of, mapped, named
from noetherflow.noise.capture.layouts import Apart, Layout, Listed, Regular, Several, Single
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import per_example
from noetherflow.noise.capture.sources import Tracked
from noetherflow.noise.ops.aligned import aligned
from noetherflow.noise.ops.registry import gradient_rule

_NAMES = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub", "pow", "maximum", "minimum",
    "where", "lerp", "addcmul", "addcdiv", "atan2", "hypot", "copysign",
)  # fmt: skip
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv")
_SUMS = {
    getattr(space, name)
    for space in (torch, Tensor)
    for name in ("add", "sub", "subtract", "__add__", "__radd__", "__sub__", "__rsub__", "add_", "sub_", "__iadd__")
    if hasattr(space, name)
}


@gradient_rule(
    *(getattr(torch, name) for name in _NAMES if hasattr(torch, name)),
    *(getattr(Tensor, name) for name in _NAMES if hasattr(Tensor, name)),
    *(getattr(Tensor, f"{name}_") for name in _NAMES if hasattr(Tensor, f"{name}_")),
    *(getattr(Tensor, f"__{name}__") for name in (*_OPERATORS, *_IN_PLACE)),
)
def elementwise(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function of single entries; all data have their examples along the same dimension."""
    leaves = list(leaves_of((*args, *kwargs.values())))
    data = [leaf for leaf in leaves if not capture.is_constant(leaf)]
    if func in _SUMS and _adds_constant(capture, leaves, data):
        return func(*args, **kwargs)
    if is_in_place(func) and capture.tracked(args[0]):
        return NotImplemented
    ndim = max(leaf.ndim for leaf in leaves)
    layout = _common([(leaf, capture.layout(leaf)) for leaf in data], ndim)
    if layout is None:
        return NotImplemented

    def put(leaf: Tensor) -> Tensor | None:
        tracked = capture.tracked(leaf)
        return leaf if tracked is None else expanded(capture, tracked, layout, ndim)

    args, kwargs = mapped(put, args), mapped(put, kwargs)
    if len(list(leaves_of((*args, *kwargs.values())))) < len(leaves):
        return NotImplemented  # a parameter that cannot be expanded is None
    return func(*args, **kwargs)


@gradient_rule(torch.cat, torch.stack, torch.concat)
def joined(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter that is repeated for every example, beside data: the token of a class."""
    tensors, dim = named(("tensors", "dim"), args, kwargs)
    dim = dim or 0
    data = [(leaf, capture.layout(leaf)) for leaf in tensors if not capture.is_constant(leaf)]
    ndim = data[0][0].ndim
    layout = _common(data, ndim)
    if not isinstance(layout, tuple) or (func is not torch.stack and dim % ndim == layout[0]):
        return NotImplemented
    parts = [
        leaf if (tracked := capture.tracked(leaf)) is None else expanded(capture, tracked, layout, ndim)
        for leaf in tensors
    ]
    return NotImplemented if any(part is None for part in parts) else func(parts, dim)


@gradient_rule(functional.prelu, torch.prelu)
def prelu(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A slope for negative inputs, of each channel or of all."""
    x, weight = named(("input", "weight"), args, kwargs)
    if capture.tracked(weight) is None or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    with capture:
        slope = weight.reshape(-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else weight
        return torch.where(x > 0, x, slope * x)


# A dimension, its length, and the layout of a tensor whose first dimension that is; or a single example.
_Common = tuple[int, int, Apart] | Single


def _adds_constant(capture: Capture, leaves: list[Tensor], data: list[Tensor]) -> bool:
    """Whether parameters are added to a sum over all examples: a penalty. Its gradient has no noise."""
    layouts = [capture.layout(leaf) for leaf in data]
    if not all(isinstance(layout, Several) and layout.additive for layout in layouts):
        return False
    for leaf in leaves:
        tracked = capture.tracked(leaf)
        if tracked is not None:
            tracked.source.constant = True
            if tracked.views:
                tracked.source.refuse("a penalty on a part of a parameter")
    return True


def _common(data: list[tuple[Tensor, Layout]], ndim: int) -> _Common | None:
    """Along which dimension of the result the examples are."""
    places: list[_Common] = []
    for leaf, layout in data:
        if not isinstance(layout, Apart) or layout.scaled or not layout.is_complete:
            return None
        if isinstance(layout, Single):
            places.append(layout)
        elif isinstance(layout, Regular):
            places.append((layout.dim - leaf.ndim + ndim, leaf.shape[layout.dim], Regular(0, layout.inner)))
        elif isinstance(layout, Listed):
            places.append((layout.dim - leaf.ndim + ndim, leaf.shape[layout.dim], Listed(0, layout.owners)))
    first = places[0]
    for place in places[1:]:
        if isinstance(first, tuple) and isinstance(place, tuple) and isinstance(first[2], Listed):
            if first[:2] != place[:2] or not isinstance(place[2], Listed):
                return None
            if not torch.equal(first[2].owners, place[2].owners):
                return None
        elif place != first:
            return None
    return first


def expanded(capture: Capture, tracked: Tracked, place: _Common, ndim: int) -> Tensor | None:
    """A parameter with an entry for every example, whose gradient is recorded.

    Args:
        capture: The forward pass.
        tracked: The parameter.
        place: Where the examples are in what it meets.
        ndim: The number of dimensions of what it meets.

    Returns:
        A tensor that broadcasts as the parameter does; None if there is none.
    """
    original = tuple(tracked.tensor.shape)
    if isinstance(place, Single):

        def note_single(gradient: Tensor) -> Tensor | None:
            return tracked.note(per_example(tracked.views, place.rows(gradient, len(original), capture.size)))

        return autograd.spread(tracked.tensor, original, note_single, [tracked.root])
    dim, length, layout = place
    shape = (1,) * (ndim - len(original)) + original
    if shape[dim] != 1:
        return aligned(capture, tracked, dim - ndim + len(original), layout) if shape[dim] == length else None
    wide = (*shape[:dim], length, *shape[dim + 1 :])

    def note(gradient: Tensor) -> Tensor | None:
        vectors = gradient.movedim(dim, 0).reshape(length, *original)
        return tracked.note(per_example(tracked.views, layout.rows(vectors, len(original), capture.size)))

    return autograd.spread(tracked.tensor, wide, note, [tracked.root])

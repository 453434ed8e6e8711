"""Calls in which parameters meet no data: views of parameters, and what is computed from parameters alone."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import DROPOUT, as_function, is_in_place, leaves_of, name_of
from noetherflow.noise.capture.sources import Call, Source, Tracked, is_view

if TYPE_CHECKING:
    from noetherflow.noise.capture.mode import Capture


def derive(capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call in which parameters meet no data: a view of a parameter, or something computed from parameters."""
    leaves = list(leaves_of((*args, *kwargs.values())))
    known = {id(leaf): tracked for leaf in leaves if (tracked := capture.tracked(leaf)) is not None}
    parents = tuple(known.values())
    if is_in_place(func) or func in DROPOUT:
        capture.refuse(name_of(func), args, kwargs)
        return func(*args, **kwargs)
    result = func(*args, **kwargs)
    for index, leaf in enumerate([result] if isinstance(result, Tensor) else list(leaves_of((result,)))):
        if not leaf.requires_grad or capture.tracked(leaf):
            continue
        if len(parents) == 1 and is_view(leaf, parents[0].tensor):  # of the same numbers
            again = as_function(func, args, kwargs, parents[0].tensor)
            view = again if isinstance(result, Tensor) else _part_of(again, index)
            capture.track(replace(parents[0], tensor=leaf, views=(*parents[0].views, view)))
        elif isinstance(result, Tensor):
            again = as_function(func, args, kwargs, *(parent.tensor for parent in parents))
            capture.gather(leaf, Source(None, leaf.shape, parents, again, _call_of(func, args, kwargs, parents)))
        else:
            capture.refuse(name_of(func), args, kwargs)
    return result


def _call_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parents: tuple[Tracked, ...]) -> Call | None:
    """A linear map of constants, or places of a table, that may have a row for each example."""
    index = {id(parent.tensor): number for number, parent in enumerate(parents)}
    if args and isinstance(args[0], Tensor) and id(args[0]) not in index and args[0].requires_grad:
        return None  # autograd carries its gradient on
    if name_of(func) in ("expand", "broadcast_to", "repeat", "expand_as") and len(parents) == 1:
        return Call("expand", parents[0].tensor, 0)
    if func is functional.linear and not kwargs and id(args[0]) not in index and id(args[1]) in index:
        bias = index.get(id(args[2])) if len(args) > 2 and args[2] is not None else None
        return Call("linear", args[0], index[id(args[1])], bias)
    plain = func is functional.embedding and all(
        not kwargs.get(k) for k in ("max_norm", "sparse", "scale_grad_by_freq")
    )
    if plain and len(args) > 1 and id(args[1]) in index and len(args) == 2 and kwargs.get("padding_idx") is None:
        return Call("table", args[0], index[id(args[1])])
    return None


def _part_of(function: Any, index: int) -> Any:
    """One of several views that a function returns."""
    return lambda tensor: list(leaves_of((function(tensor),)))[index]

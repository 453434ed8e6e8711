"""Every other function: the gradient of an example is that of a call with this example alone."""

import itertools
from typing import Any

import torch
from torch import Tensor

from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.calls import as_function, is_in_place, leaves_of, unseen
from noetherflow.noise.capture.layouts import Regular, Rows
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import per_example
from noetherflow.noise.capture.pulling import pulled
from noetherflow.noise.capture.sources import Tracked
from noetherflow.noise.ops.aligned import aligned
from noetherflow.noise.ops.registry import gradient_rule

# Numbers of the gradients of all examples.
_MOST = 2**26


@gradient_rule(None)
def other(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function without a rule, if it treats the examples separately: `einsum`, `bilinear`, products of stacks."""
    leaves = list({id(leaf): leaf for leaf in leaves_of((*args, *kwargs.values()))}.values())
    tracked = [known for leaf in leaves if (known := capture.tracked(leaf)) is not None]
    data = [leaf for leaf in leaves if not capture.is_constant(leaf)]
    layouts = [capture.apart(leaf, 0) for leaf in data]
    if is_in_place(func) or "out" in kwargs or not all(isinstance(layout, Regular) for layout in layouts):
        return NotImplemented
    if _is_random(func, args, kwargs):
        return NotImplemented  # a call of an example alone would draw other numbers
    result = _by_example(capture, func, args, kwargs, tracked, data, layouts)
    return _of_rows(capture, func, args, kwargs, tracked, data, layouts) if result is NotImplemented else result


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function draws random numbers; a call that finds out leaves the generators as they are."""
    devices = list({leaf.device for leaf in leaves_of((*args, *kwargs.values())) if leaf.is_cuda})
    with unseen(), torch.no_grad(), torch.random.fork_rng(devices=devices):
        before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        func(*args, **kwargs)
        after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return not all(map(torch.equal, before, after))


def _by_example(
    capture: Capture,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tracked: list[Tracked],
    data: list[Tensor],
    layouts: list[Any],
) -> Any:
    """A call with every example alone."""
    if sum(known.tensor.numel() for known in tracked) * capture.size > _MOST:
        return NotImplemented
    call = as_function(func, args, kwargs, *data, *(known.tensor for known in tracked))
    fixed = [known.tensor.detach() for known in tracked]
    output = call(*data, *fixed)
    if not isinstance(output, Tensor):
        return NotImplemented
    with unseen(), torch.no_grad():
        results = capture.places.of(
            func, args, kwargs, {id(x): (x, y) for x, y in zip(data, layouts, strict=True)}, [output.detach()]
        )
        (place,) = results
        if not isinstance(place, Regular) or not _is_separate(capture.size, call, data, layouts, fixed, output, place):
            return NotImplemented

    def note(_: Tensor, gradient: Tensor) -> list[Tensor | None]:
        examples = [_stack(leaf.detach(), layout, capture.size) for leaf, layout in zip(data, layouts, strict=True)]
        gradients = _stack(gradient, place, capture.size)

        stacks = pulled(call, examples, fixed, gradients)
        return [
            known.note(per_example(known.views, Rows(stack[:, None], None)))
            for known, stack in zip(tracked, stacks, strict=True)
        ]

    return autograd.tap(output.clone(), output.new_empty(0), note, [known.root for known in tracked])


def _of_rows(
    capture: Capture,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tracked: list[Tracked],
    data: list[Tensor],
    layouts: list[Any],
) -> Any:
    """A call with tensors computed from parameters that have a row for each row of the data."""
    given = {id(leaf): (leaf, layout) for leaf, layout in zip(data, layouts, strict=True)}
    lengths = {leaf.shape[layout.dim]: layout.inner for leaf, layout in zip(data, layouts, strict=True)}
    choices = [
        [(dim, lengths[length]) for dim, length in enumerate(known.tensor.shape) if length in lengths]
        for known in tracked
    ]
    for places in itertools.product(*choices):
        rows = {id(k.tensor): (k.tensor, Regular(*place)) for k, place in zip(tracked, places, strict=True)}
        with unseen(), torch.no_grad():
            output = func(*args, **kwargs)
            if not isinstance(output, Tensor):
                return NotImplemented
            (layout,) = capture.places.of(func, args, kwargs, given | rows, [output])
        if not isinstance(layout, Regular):
            continue
        moved = []
        for known, (dim, inner) in zip(tracked, places, strict=True):
            tensor = aligned(capture, known, dim, Regular(0, inner))
            if tensor is None:
                return NotImplemented
            capture.marks.place(tensor, Regular(dim, inner))
            moved.append(tensor)
        call = as_function(func, args, kwargs, *(known.tensor for known in tracked))
        with capture:
            return call(*moved)
    return NotImplemented


def _stack(tensor: Tensor, layout: Regular, size: int) -> Tensor:
    """The examples of a tensor, each with all of its dimensions, stacked."""
    split = tensor.unflatten(layout.dim, (-1, size, layout.inner)).movedim(layout.dim + 1, 0)
    return split.flatten(layout.dim + 1, layout.dim + 2)


def _is_separate(
    size: int, call: Any, data: list[Tensor], layouts: list[Any], fixed: list[Tensor], output: Tensor, place: Regular
) -> bool:
    """Whether a call with the last example alone gives its part of the result."""
    examples = [_stack(leaf, layout, size)[-1] for leaf, layout in zip(data, layouts, strict=True)]
    expected = _stack(output, place, size)[-1]
    try:
        single = call(*examples, *fixed)
    except (RuntimeError, ValueError, IndexError):
        return False
    if single.shape != expected.shape:
        return False
    rounding = 100 * torch.finfo(output.dtype).eps
    return torch.allclose(
        single,
        expected,
        rtol=rounding,
        atol=rounding * float(expected.abs().max() if expected.numel() else 0),
        equal_nan=True,
    )

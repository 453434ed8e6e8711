"""Every other function: the gradient of an example is that of a call with this example alone."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from noetherflow._per_example import own_randomness
from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.calls import FunctionCall, as_function, is_in_place, leaves_of, name_of, unseen
from noetherflow.noise.capture.layouts import Layout, Regular, Rows
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
    layouts = [layout for leaf in data if isinstance(layout := capture.apart(leaf, 0), Regular)]
    if is_in_place(func) or "out" in kwargs or len(layouts) < len(data):
        return NotImplemented
    given = {id(leaf): (leaf, layout) for leaf, layout in zip(data, layouts, strict=True)}
    call = _Meeting(capture, FunctionCall(func, args, kwargs, given), tracked, data, layouts)
    plan = capture.places.kept(call.call, [capture.is_tracked(leaf) for leaf in leaves], call.plan)
    if plan is None:
        if not call.is_small:
            cause = f"its {capture.size} examples together would have gradients of more than {_MOST:,} numbers"
            capture.refuse(f"{name_of(func)}: {cause}", args, kwargs)
        return NotImplemented
    return call.by_example(plan) if isinstance(plan, Regular) else call.of_rows(plan)


# Where the examples are in the result of a call with each example alone, or in each tensor computed from parameters.
_Plan = Regular | tuple[Regular, ...] | None


@final
@dataclass(frozen=True, eq=False)
class _Meeting:
    """A call in which parameters meet data.

    Args:
        capture: The forward pass.
        call: The call.
        tracked: The parameters among these, and what is computed from parameters alone.
        data: The tensors that depend on the batch.
        layouts: Where the examples are in each.
    """

    capture: Capture
    call: FunctionCall
    tracked: list[Tracked]
    data: list[Tensor]
    layouts: list[Regular]

    @property
    def is_small(self) -> bool:
        """Whether the gradients of all examples together are few enough numbers to be formed."""
        return sum(known.tensor.numel() for known in self.tracked) * self.capture.size <= _MOST

    def plan(self) -> _Plan:
        """How the gradients of single examples can be had; the generators of random numbers stay as they are."""
        devices = list({leaf.device for leaf in self.data if leaf.is_cuda})
        with unseen(), torch.no_grad(), own_randomness(self.data[0].device):
            before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
            output = self.call.func(*self.call.args, **self.call.kwargs)
            after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
            # A call of an example alone would draw other random numbers.
            if not isinstance(output, Tensor) or not all(map(torch.equal, before, after)):
                return None
            place = self._place(output, {})
            if self.is_small and place is not None and self._is_separate(output, place):
                return place
            lengths = {leaf.shape[at.dim]: at.inner for leaf, at in zip(self.data, self.layouts, strict=True)}
            choices = [
                [Regular(dim, lengths[length]) for dim, length in enumerate(known.tensor.shape) if length in lengths]
                for known in self.tracked
            ]
            for places in itertools.product(*choices):
                rows = {id(k.tensor): (k.tensor, at) for k, at in zip(self.tracked, places, strict=True)}
                if self._place(output, rows) is not None:
                    return places
        return None

    def by_example(self, place: Regular) -> Tensor:
        """The result, whose gradient is pulled through a call with every example alone."""
        size, fixed = self.capture.size, [known.tensor.detach() for known in self.tracked]
        call = self._function(*self.data, *(known.tensor for known in self.tracked))

        def note(_: Tensor, gradient: Tensor) -> list[Tensor | None]:
            examples = [_stack(leaf.detach(), at, size) for leaf, at in zip(self.data, self.layouts, strict=True)]
            stacks = zip(self.tracked, pulled(call, examples, fixed, _stack(gradient, place, size)), strict=True)
            return [known.note(per_example(known.views, Rows(stack[:, None], None))) for known, stack in stacks]

        output = call(*self.data, *fixed)
        return autograd.tap(output.clone(), output.new_empty(0), note, [known.root for known in self.tracked])

    def of_rows(self, places: tuple[Regular, ...]) -> Any:
        """A call with tensors computed from parameters that have a row for each row of the data."""
        moved = []
        for known, place in zip(self.tracked, places, strict=True):
            tensor = aligned(self.capture, known, place.dim, Regular(0, place.inner))
            if tensor is None:
                return NotImplemented
            self.capture.marks.place(tensor, place)
            moved.append(tensor)
        call = self._function(*(known.tensor for known in self.tracked))
        with self.capture:
            return call(*moved)

    def _function(self, *tensors: Tensor) -> Callable[..., Any]:
        """The call as a function of some of its tensors."""
        return as_function(self.call.func, self.call.args, self.call.kwargs, *tensors)

    def _place(self, output: Tensor, rows: Mapping[int, tuple[Tensor, Layout]]) -> Regular | None:
        (layout,) = self.capture.places.of(self.call.with_given({**self.call.given, **rows}), [output])
        return layout if isinstance(layout, Regular) else None

    def _is_separate(self, output: Tensor, place: Regular) -> bool:
        """Whether a call with the last example alone gives its part of the result."""
        size = self.capture.size
        examples = [_stack(leaf, at, size)[-1] for leaf, at in zip(self.data, self.layouts, strict=True)]
        expected = _stack(output, place, size)[-1]
        try:
            alone = self._function(*self.data)(*examples)
        except (RuntimeError, ValueError, IndexError):
            return False
        if alone.shape != expected.shape:
            return False
        rounding = 100 * torch.finfo(output.dtype).eps
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        return torch.allclose(alone, expected, rtol=rounding, atol=rounding * largest, equal_nan=True)


def _stack(tensor: Tensor, layout: Regular, size: int) -> Tensor:
    """The examples of a tensor, each with all of its dimensions, stacked."""
    split = tensor.unflatten(layout.dim, (-1, size, layout.inner)).movedim(layout.dim + 1, 0)
    return split.flatten(layout.dim + 1, layout.dim + 2)

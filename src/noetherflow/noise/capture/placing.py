"""Where the examples are in what a function returns: PyTorch's functions are called again, and the answers are kept.

Functions that move entries are given the labels of examples instead of numbers. Any other function is probed: it is
called again with the entries of some examples replaced. So a function needs no rule, and a function that joins
examples is found out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import FunctionCall, leaves_of, mapped, named, unseen
from noetherflow.noise.capture.kinds import ADDS, CASTS, FACTORIES, FACTORS, INDICES, LINEAR, MOVES, PICKS, WRITES
from noetherflow.noise.capture.layouts import (
    EMPTY,
    NO_EXAMPLE,
    SHARED,
    Apart,
    Layout,
    Listed,
    Lost,
    Regular,
    Several,
    Shared,
    Single,
    layout_of,
)
from noetherflow.noise.capture.probe import Probe, can_be_nan

T = TypeVar("T")

# Parts of the names of functions whose results depend on the numbers of rows that they are given.
_BY_VALUE = ("scatter", "index", "put", "segment", "take", "gather", "unique")
# Answers that are kept; a training loop repeats the calls of its first step.
_MOST = 4096


@final
class Places:
    """Answers the question where the examples are in the result of a call, and remembers the answers.

    Args:
        size: Number of examples B.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._answers: dict[Any, list[Layout]] = {}
        self._decisions: dict[Any, Any] = {}

    def of(self, call: FunctionCall, results: Sequence[Tensor]) -> list[Layout]:
        """The layout of every tensor that a call returned.

        Args:
            call: The call.
            results: The tensors that came out, or that were written.

        Returns:
            A layout for each.
        """
        name = call.name
        if name in FACTORIES:
            return [SHARED] * len(results)
        if self.size == 1:
            return [Single(0)] * len(results)
        if _picks(call):
            first = id(call.args[0])
            call = call.with_given(
                {first: call.given[first]}
            )  # which entries are picked does not change whose they are
        if name in INDICES and len(call.args) + len(call.kwargs) - ("as_tuple" in call.kwargs) == 1:
            return self._listed(call, len(results))
        for layout in call.layouts:
            if isinstance(layout, Lost):
                return [layout] * len(results)
        if any(isinstance(layout, Several) for layout in call.layouts):
            return [_joined(call, result) if can_be_nan(result) else SHARED for result in results]
        if name in CASTS:
            return [call.layouts[0]] * len(results)
        key = _key(call)
        if key is not None and key in self._answers:
            return self._answers[key]
        if name not in MOVES and any(can_be_nan(result) and bool(result.isnan().any()) for result in results):
            return [Lost(f"{name}, whose result holds NaN")] * len(results)  # of this step: no answer to keep
        answer = self._answer(call, results)
        # Numbers of rows have no gradient: a choice that all examples make together is a constant.
        answer = [
            SHARED if isinstance(layout, (Several, Lost)) and not can_be_nan(leaf) else layout
            for layout, leaf in zip(answer, results, strict=True)
        ]
        if any(leaf.requires_grad and leaf.numel() for leaf, _ in call.given.values()):
            answer = [
                Lost(f"{name}, in whose result nothing changes with the examples")
                if layout is SHARED and leaf.requires_grad
                else layout
                for layout, leaf in zip(answer, results, strict=True)
            ]
        if scales := {layout.scaled for layout in call.layouts if isinstance(layout, Apart) and layout.scaled}:
            answer = [part.with_scale(min(scales)) if isinstance(part, Apart) else part for part in answer]
        # That nothing changed with other numbers of rows may be an accident of this step.
        accident = SHARED in answer and not all(can_be_nan(leaf) for leaf, _ in call.given.values())
        if key is not None and not accident:
            if len(self._answers) >= _MOST:
                self._answers.clear()
            self._answers[key] = answer
        return answer

    def kept(self, call: FunctionCall, tracked: Sequence[bool], decide: Callable[[], T]) -> T:
        """A decision about a call that holds for all calls of its kind, and is made once.

        Args:
            call: The call.
            tracked: Which of its tensors are computed from parameters alone.
            decide: Makes the decision.

        Returns:
            The decision.
        """
        key = _key(call)
        if key is None:
            return decide()
        key = key, tuple(tracked)
        if key not in self._decisions:
            self._decisions[key] = decide()
        decision: T = self._decisions[key]
        return decision

    def _listed(self, call: FunctionCall, count: int) -> list[Layout]:
        """The owners of the entries of a mask that are not zero."""
        (mask,) = call.leaves
        return [layout_of(self._labels(call, mask)[mask.cpu() != 0], self.size)] * count

    def _answer(self, call: FunctionCall, results: Sequence[Tensor]) -> list[Layout]:
        name, layouts = call.name, set(call.layouts)
        if any(result.numel() == 0 for result in results):
            return [_empty(result.shape) if result.numel() == 0 else SHARED for result in results]
        with unseen(), torch.no_grad():
            try:
                if name in MOVES or name in WRITES or _picks(call):
                    return self._moved(call, len(results))
                if name.rstrip("_") in ADDS:
                    return [self._added(call)] * len(results)
                if len(layouts) == 1 and isinstance(only := next(iter(layouts)), Single):
                    return [only] * len(results)
                return Probe(self.size, call).layouts()
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as problem:
                return [Lost(f"{name} ({type(problem).__name__})")] * len(results)

    def _labels(self, call: FunctionCall, leaf: Tensor) -> Tensor:
        return call.layout(leaf).labels(leaf.shape, self.size)

    def _moved(self, call: FunctionCall, count: int) -> list[Layout]:
        """The function of the labels."""
        func, args, kwargs, name = call.func, call.args, call.kwargs, call.name
        if name in MOVES:
            args = mapped(lambda leaf: self._labels(call, leaf), args)
            kwargs = mapped(lambda leaf: self._labels(call, leaf), kwargs)
            if "view" in name:  # of dimensions that labels expand
                args = mapped(Tensor.contiguous, args)
            if name in ("pad", "_pad"):
                func, args, kwargs = functional.pad, _padding(args, kwargs), {}
        else:
            # Which entries is said by the other tensors; what is written is the last.
            labels = self._labels(call, args[0])
            key = next((key for key in ("source", "src", "values") if key in kwargs), None)
            value = args[-1] if key is None else kwargs[key]
            rest, kwargs = mapped(Tensor.cpu, args[1:]), mapped(Tensor.cpu, kwargs)
            if name in WRITES:
                labels = labels.clone()
                written = self._labels(call, value) if isinstance(value, Tensor) else NO_EXAMPLE
                if key is None:
                    rest = (*rest[:-1], written)
                else:
                    kwargs[key] = written
            args = (labels, *rest)
        moved = func(*args, **kwargs)
        if name == "__setitem__":
            moved = args[0]
        moved_layouts = [layout_of(labels, self.size) for labels in leaves_of((moved,))]
        return _with_cause(moved_layouts, name) if len(moved_layouts) == count else [Lost(name)] * count

    def _added(self, call: FunctionCall) -> Layout:
        """Entries are added to entries of the same example, or of none."""
        name = call.name.rstrip("_")
        values = [*call.args, *(call.kwargs[key] for key in ("dim", "index", "source", "src") if key in call.kwargs)]
        target, dim, index, source = values[:4]
        before, added = (self._labels(call, leaf) for leaf in (target, source))
        index = index.cpu()
        rows = ADDS[name] == "index"
        read = before.index_select(dim, index) if rows else before.gather(dim, index)
        added = added.expand(read.shape) if rows else added[tuple(slice(length) for length in read.shape)]
        if bool(((read != added) & (read != NO_EXAMPLE) & (added != NO_EXAMPLE)).any()):
            return Several(additive=False, cause=name)
        merged = torch.where(added == NO_EXAMPLE, read, added)
        after = before.clone()
        after = after.index_copy(dim, index, merged) if rows else after.scatter(dim, index, merged)
        again = after.index_select(dim, index) if rows else after.gather(dim, index)
        if bool((again != merged).any()):
            return Several(additive=False, cause=name)
        return _with_cause([layout_of(after, self.size)], name)[0]


def _picks(call: FunctionCall) -> bool:
    """Whether a call picks entries of a tensor that depends on the batch."""
    return call.name in PICKS and bool(call.args) and id(call.args[0]) in call.given


def _key(call: FunctionCall) -> Any | None:
    """What the layouts of results depend on; None if they depend on the numbers in a tensor."""
    if not all(isinstance(layout, (Regular, Shared)) for layout in call.layouts):
        return None
    name, leaves = call.name, call.leaves
    by_value = any(part in name for part in _BY_VALUE) or any(leaf.layout is not torch.strided for leaf in leaves)
    if (
        (name in PICKS and len(leaves) > 1)
        or name in WRITES
        or name.rstrip("_") in ADDS
        or (by_value and len(leaves) > 1)
    ):
        return None
    key = call.func, _fixed(call.args, call), _fixed(call.kwargs, call)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _fixed(value: Any, call: FunctionCall) -> Any:
    """What an argument says but for the numbers in tensors."""
    # No function inside the method that calls it: a function that refers to itself keeps tensors until cycles are
    # collected.
    if isinstance(value, Tensor):
        return value.shape, value.dtype, call.layout(value)
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, (tuple, list)):
        return tuple(_fixed(part, call) for part in value)
    if isinstance(value, dict):
        return tuple((key, _fixed(part, call)) for key, part in value.items())
    return value


def _with_cause(layouts: list[Layout], name: str) -> list[Layout]:
    return [replace(layout, cause=name) if isinstance(layout, Several) else layout for layout in layouts]


def _joined(call: FunctionCall, result: Tensor) -> Layout:
    """The layout of a function of tensors of which at least one depends on several examples."""
    name, args, given = call.name, call.args, call.given
    several = [(leaf, layout) for leaf, layout in given.values() if isinstance(layout, Several)]
    apart = [(leaf, layout) for leaf, layout in given.values() if isinstance(layout, Apart)]
    numbers = all(leaf.numel() == 1 and not leaf.requires_grad for leaf, _ in several)
    if apart and numbers and len({layout for _, layout in apart}) == 1:
        layout = apart[0][1]
        if all(leaf.shape == result.shape for leaf, _ in apart):
            return layout.with_scale(several[0][1].cause)
    moving = name in MOVES or name in CASTS or _picks(call)
    additive = all(layout.additive or not leaf.requires_grad for leaf, layout in several)
    if name in FACTORS:
        # A product is linear in one factor if the other is a constant, or a number without a gradient.
        factors = [leaf for leaf in call.leaves if id(leaf) in given]
        varying = [leaf for leaf in factors if leaf.requires_grad]
        divisor = args[1] if len(args) > 1 and "div" in name else None
        constant = not (isinstance(divisor, Tensor) and divisor.requires_grad and id(divisor) in given)
        additive = additive and len(varying) <= 1 and constant
    linear = moving or name in LINEAR or name in ("stack", "cat")
    if additive and not linear:
        return Several(additive=False, cause=name)
    # Of what is no sum any more, the function that made it so is kept.
    worst = next((layout for _, layout in several if not layout.additive), several[0][1])
    summed = additive and (moving or call.adds_up) and all(layout.summed for _, layout in several)
    return Several(additive, worst.cause, summed)


def _padding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a padding of labels: a constant belongs to no example."""
    labels, widths, mode, _ = named(("input", "pad", "mode", "value"), args, kwargs)
    mode = mode or "constant"
    return labels.contiguous(), widths, mode, NO_EXAMPLE if mode == "constant" else None


def _empty(shape: torch.Size) -> Layout:
    return Listed(next(dim for dim, length in enumerate(shape) if not length), EMPTY)

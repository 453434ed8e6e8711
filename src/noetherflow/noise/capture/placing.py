"""Where the examples are in what a function returns: PyTorch's functions are called again, and the answers are kept.

Functions that move entries are given the labels of examples instead of numbers. Any other function is probed: it is
called again with the entries of some examples replaced by NaN. So a function needs no rule, and a function that joins
examples is found out.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import leaves_of, mapped, name_of, named, unseen
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

    def of(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, tuple[Tensor, Layout]],
        results: Sequence[Tensor],
    ) -> list[Layout]:
        """The layout of every tensor that a call returned.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Its named arguments.
            given: The tensors among these that depend on the batch, with their layouts, by identity.
            results: The tensors that came out, or that were written.

        Returns:
            A layout for each.
        """
        name = name_of(func)
        if name in FACTORIES:
            return [SHARED] * len(results)
        if self.size == 1:
            return [Single(0)] * len(results)
        if name in PICKS and args and id(args[0]) in given:
            given = {id(args[0]): given[id(args[0])]}  # which entries are picked does not change whose they are
        layouts = [layout for _, layout in given.values()]
        if name in INDICES and len(args) + len(kwargs) - ("as_tuple" in kwargs) == 1:
            return self._listed(args[0] if args else kwargs["input"], given, len(results))
        for layout in layouts:
            if isinstance(layout, Lost):
                return [layout] * len(results)
        if any(isinstance(layout, Several) for layout in layouts):
            return [_joined(name, args, kwargs, given, result) if can_be_nan(result) else SHARED for result in results]
        if name in CASTS:
            return [layouts[0]] * len(results)
        key = self._key(func, name, args, kwargs, given)
        if key is not None and key in self._answers:
            return self._answers[key]
        if name not in MOVES and any(can_be_nan(result) and bool(result.isnan().any()) for result in results):
            return [Lost(f"{name}, whose result holds NaN")] * len(results)  # of this step: no answer to keep
        answer = self._answer(func, name, args, kwargs, given, results)
        # Numbers of rows have no gradient: a choice that all examples make together is a constant.
        answer = [
            SHARED if isinstance(layout, (Several, Lost)) and not can_be_nan(leaf) else layout
            for layout, leaf in zip(answer, results, strict=True)
        ]
        if any(leaf.requires_grad and leaf.numel() for leaf, _ in given.values()):
            answer = [
                Lost(f"{name}, in whose result nothing changes with the examples")
                if layout is SHARED and leaf.requires_grad
                else layout
                for layout, leaf in zip(answer, results, strict=True)
            ]
        if scales := {layout.scaled for layout in layouts if isinstance(layout, Apart) and layout.scaled}:
            answer = [part.with_scale(min(scales)) if isinstance(part, Apart) else part for part in answer]
        # That nothing changed with other numbers of rows may be an accident of this step.
        accident = SHARED in answer and not all(can_be_nan(leaf) for leaf, _ in given.values())
        if key is not None and not accident:
            if len(self._answers) >= _MOST:
                self._answers.clear()
            self._answers[key] = answer
        return answer

    def _listed(self, mask: Tensor, given: dict[int, tuple[Tensor, Layout]], count: int) -> list[Layout]:
        """The owners of the entries of a mask that are not zero."""
        labels = self._labels(given, mask)
        return [layout_of(labels[mask.cpu() != 0], self.size)] * count

    def _key(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[int, Any]
    ) -> Any | None:
        """What the answer depends on; None if it depends on the numbers in a tensor."""
        if not all(isinstance(layout, (Regular, Shared)) for _, layout in given.values()):
            return None
        base = name.rstrip("_")
        leaves = list(leaves_of((*args, *kwargs.values())))
        by_value = any(part in name for part in _BY_VALUE) or any(leaf.layout is not torch.strided for leaf in leaves)
        if (name in PICKS and len(leaves) > 1) or name in WRITES or base in ADDS or (by_value and len(leaves) > 1):
            return None

        key = func, _fixed(args, given), _fixed(kwargs, given)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _answer(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, tuple[Tensor, Layout]],
        results: Sequence[Tensor],
    ) -> list[Layout]:
        layouts = {layout for _, layout in given.values()}
        if any(result.numel() == 0 for result in results):
            return [_empty(result.shape) if result.numel() == 0 else SHARED for result in results]
        with unseen(), torch.no_grad():
            try:
                moves = name in MOVES or (name in PICKS and args and id(args[0]) in given)
                if moves or name in WRITES:
                    return self._moved(func, name, args, kwargs, given, len(results))
                if name.rstrip("_") in ADDS:
                    return [self._added(name.rstrip("_"), args, kwargs, given)] * len(results)
                if len(layouts) == 1 and isinstance(only := next(iter(layouts)), Single):
                    return [only] * len(results)
                return Probe(self.size, func, args, kwargs, given, results).layouts()
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as problem:
                return [Lost(f"{name} ({type(problem).__name__})")] * len(results)

    def _labels(self, given: dict[int, tuple[Tensor, Layout]], leaf: Tensor) -> Tensor:
        entry = given.get(id(leaf))
        layout = SHARED if entry is None else entry[1]
        return layout.labels(leaf.shape, self.size)

    def _moved(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, tuple[Tensor, Layout]],
        count: int,
    ) -> list[Layout]:
        """The function of the labels."""
        if name in MOVES:
            args = mapped(lambda leaf: self._labels(given, leaf), args)
            kwargs = mapped(lambda leaf: self._labels(given, leaf), kwargs)
            if "view" in name:  # of dimensions that labels expand
                args = mapped(Tensor.contiguous, args)
            if name in ("pad", "_pad"):
                func, args, kwargs = functional.pad, _padding(args, kwargs), {}
        else:
            # Which entries is said by the other tensors; what is written is the last.
            labels = self._labels(given, args[0])
            key = next((key for key in ("source", "src", "values") if key in kwargs), None)
            value = args[-1] if key is None else kwargs[key]
            rest, kwargs = mapped(Tensor.cpu, args[1:]), mapped(Tensor.cpu, kwargs)
            if name in WRITES:
                labels = labels.clone()
                written = self._labels(given, value) if isinstance(value, Tensor) else NO_EXAMPLE
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

    def _added(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[int, tuple[Tensor, Layout]]
    ) -> Layout:
        """Entries are added to entries of the same example, or of none."""
        values = list(args) + [kwargs[key] for key in ("dim", "index", "source", "src") if key in kwargs]
        target, dim, index, source = values[:4]
        before, added = (self._labels(given, leaf) for leaf in (target, source))
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


def _fixed(value: Any, given: dict[int, tuple[Tensor, Layout]]) -> Any:
    """What an argument says but for the numbers in tensors."""
    # No function inside the method that calls it: a function that refers to itself keeps tensors until cycles are
    # collected.
    if isinstance(value, Tensor):
        entry = given.get(id(value))
        return value.shape, value.dtype, None if entry is None else entry[1]
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, (tuple, list)):
        return tuple(_fixed(part, given) for part in value)
    if isinstance(value, dict):
        return tuple((key, _fixed(part, given)) for key, part in value.items())
    return value


def _with_cause(layouts: list[Layout], name: str) -> list[Layout]:
    return [Several(layout.additive, name) if isinstance(layout, Several) else layout for layout in layouts]


def _joined(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: dict[int, tuple[Tensor, Layout]],
    result: Tensor,
) -> Layout:
    """The layout of a function of tensors of which at least one depends on several examples."""
    several = [(leaf, layout) for leaf, layout in given.values() if isinstance(layout, Several)]
    apart = [(leaf, layout) for leaf, layout in given.values() if isinstance(layout, Apart)]
    numbers = all(leaf.numel() == 1 and not leaf.requires_grad for leaf, _ in several)
    if apart and numbers and len({layout for _, layout in apart}) == 1:
        layout = apart[0][1]
        if all(leaf.shape == result.shape for leaf, _ in apart):
            return layout.with_scale(several[0][1].cause)
    moving = name in MOVES or name in CASTS or (name in PICKS and id(args[0]) in given)
    additive = all(layout.additive or not leaf.requires_grad for leaf, layout in several)
    if name in FACTORS:
        # A product is linear in one factor if the other is a constant, or a number without a gradient.
        factors = [leaf for leaf in leaves_of((*args, *kwargs.values())) if id(leaf) in given]
        varying = [leaf for leaf in factors if leaf.requires_grad]
        divisor = args[1] if len(args) > 1 and "div" in name else None
        constant = not (isinstance(divisor, Tensor) and divisor.requires_grad and id(divisor) in given)
        additive = additive and len(varying) <= 1 and constant
    linear = moving or name in LINEAR or name in ("stack", "cat")
    if additive and not linear:
        return Several(additive=False, cause=name)
    # Of what is no sum any more, the function that made it so is kept.
    worst = next((layout for _, layout in several if not layout.additive), several[0][1])
    return Several(additive=additive, cause=worst.cause)


def _padding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a padding of labels: a constant belongs to no example."""
    labels, widths, mode, _ = named(("input", "pad", "mode", "value"), args, kwargs)
    mode = mode or "constant"
    return labels.contiguous(), widths, mode, NO_EXAMPLE if mode == "constant" else None


def _empty(shape: torch.Size) -> Layout:
    return Listed(next(dim for dim, length in enumerate(shape) if not length), EMPTY)

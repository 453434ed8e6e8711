"""Where the examples are in what a function returns: PyTorch's own functions are asked, and the answers are kept.

Functions that move entries are given the labels of examples instead of numbers. Any other function is called again
with the entries of some examples replaced by NaN (numbers that cannot be NaN by others): what changes depends on these
examples. So a function needs no rule, and a function that joins examples is found out.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import is_in_place, leaves_of, mapped, name_of, unseen
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
    inners,
    layout_of,
)

# Functions whose results are entries of their arguments, in another order, or a constant.
_MOVES = set(
    "view view_as reshape reshape_as permute transpose swapaxes swapdims movedim moveaxis t adjoint flatten ravel "
    "unflatten expand expand_as broadcast_to broadcast_tensors squeeze unsqueeze select narrow split split_with_sizes "
    "chunk tensor_split hsplit vsplit dsplit unbind cat concat concatenate stack hstack vstack dstack column_stack "
    "roll flip fliplr flipud rot90 repeat tile diagonal contiguous clone detach detach_ __get__ atleast_1d atleast_2d "
    "atleast_3d tril triu pad _pad unsafe_chunk unsafe_split".split()
)
# Functions that return where entries are.
_INDICES = {"nonzero", "argwhere", "where"}
# The same, where further tensors say which entries.
_PICKS = set(
    "__getitem__ index_select gather take_along_dim masked_select take repeat_interleave unfold as_strided".split()
)
# Functions that write entries of one tensor into another.
_WRITES = {"__setitem__", "copy_", "index_put_", "index_put", "index_copy", "index_copy_", "scatter", "scatter_"}
# Functions that add them, and how the entries that they add to are read, and written.
_ADDS = {"index_add": "index", "scatter_add": "scatter"}
# Functions that change no place.
_CASTS = set(
    "to float double half bfloat16 long int bool short char byte type type_as cpu cuda requires_grad_ pin_memory "
    "retain_grad".split()
)
# Functions that are linear in their tensors, if no more than one factor depends on the batch.
_LINEAR = set(
    "add sub subtract neg negative mul multiply div divide true_divide rsub sum mean nansum __add__ __radd__ __sub__ "
    "__rsub__ __mul__ __rmul__ __truediv__ __neg__ __iadd__ __isub__ __imul__ __itruediv__ add_ sub_ mul_ div_ "
    "positive __pos__".split()
)
_FACTORS = set("mul multiply div divide true_divide __mul__ __rmul__ __truediv__ __imul__ __itruediv__ mul_ div_".split())
_SUMS = {"sum", "mean", "nansum"}
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
        if self.size == 1:
            return [Single(0)] * len(results)
        name = name_of(func)
        if name in _PICKS and args and id(args[0]) in given:
            given = {id(args[0]): given[id(args[0])]}  # which entries are picked does not change whose they are
        layouts = [layout for _, layout in given.values()]
        if name in _INDICES and len(args) + len(kwargs) - ("as_tuple" in kwargs) == 1:
            return self._listed(args[0] if args else kwargs["input"], given, len(results))
        for layout in layouts:
            if isinstance(layout, Lost):
                return [layout] * len(results)
        if any(isinstance(layout, Several) for layout in layouts):
            return [
                _joined(name, args, kwargs, given, result) if _can_be_nan(result) else SHARED for result in results
            ]
        if name in _CASTS:
            return [layouts[0]] * len(results)
        key = self._key(func, name, args, kwargs, given)
        if key is not None and key in self._answers:
            return self._answers[key]
        answer = self._found(func, name, args, kwargs, given, results)
        # Numbers of rows have no gradient: a choice that all examples make together is a constant.
        answer = [
            SHARED if isinstance(layout, (Several, Lost)) and not _can_be_nan(leaf) else layout
            for layout, leaf in zip(answer, results, strict=True)
        ]
        if scales := {layout.scaled for layout in layouts if isinstance(layout, Apart) and layout.scaled}:
            answer = [one.with_scale(min(scales)) if isinstance(one, Apart) else one for one in answer]
        if key is not None:
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
        count = sum(1 for _ in leaves_of((*args, *kwargs.values())))
        if (name in _PICKS and count > 1) or name in _WRITES or base in _ADDS:
            return None

        key = func, _fixed(args, given), _fixed(kwargs, given)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _found(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, tuple[Tensor, Layout]],
        results: Sequence[Tensor],
    ) -> list[Layout]:
        layouts = {layout for _, layout in given.values()}
        if any(result.numel() == 0 for result in results) and len(layouts) == 1:
            return [_empty(result.shape) if result.numel() == 0 else SHARED for result in results]
        with unseen(), torch.no_grad():
            try:
                moves = name in _MOVES or (name in _PICKS and args and id(args[0]) in given)
                if moves or name in _WRITES:
                    return self._moved(func, name, args, kwargs, given, len(results))
                if name.rstrip("_") in _ADDS:
                    return [self._added(name.rstrip("_"), args, kwargs, given)] * len(results)
                if len(layouts) == 1 and isinstance(only := next(iter(layouts)), Single):
                    return [only] * len(results)
                return _Probe(self.size, func, args, kwargs, given, results).layouts()
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
        if name in _MOVES:
            args = mapped(lambda leaf: self._labels(given, leaf), args)
            kwargs = mapped(lambda leaf: self._labels(given, leaf), kwargs)
            if "view" in name:  # of dimensions that labels expand
                args = mapped(Tensor.contiguous, args)
            if name in ("pad", "_pad"):
                padding = kwargs.get("pad", args[1] if len(args) > 1 else ())
                mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
                labels = args[0] if args else kwargs["input"]
                return [layout_of(functional.pad(labels.contiguous(), padding, mode, NO_EXAMPLE if mode == "constant" else None), self.size)]
        else:
            # Which entries is said by the other tensors; what is written is the last.
            first = self._labels(given, args[0])
            rest = mapped(lambda leaf: leaf.cpu(), args[1:])
            if name in _WRITES:
                first = first.clone()
                value = args[-1] if len(args) > 1 else None
                label = self._labels(given, value) if isinstance(value, Tensor) else NO_EXAMPLE
                rest = (*rest[:-1], label) if not kwargs else rest
                kwargs = {key: self._labels(given, v) if key in ("source", "src", "values") and isinstance(v, Tensor) else v for key, v in kwargs.items()}
            args, kwargs = (first, *rest), mapped(lambda leaf: leaf.cpu(), kwargs)
        moved = func(*args, **kwargs)
        if name == "__setitem__":
            moved = args[0]
        found = [layout_of(labels, self.size) for labels in leaves_of((moved,))]
        return _with_cause(found, name) if len(found) == count else [Lost(name)] * count

    def _added(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[int, tuple[Tensor, Layout]]
    ) -> Layout:
        """Entries are added to entries of the same example, or of none."""
        values = list(args) + [kwargs[key] for key in ("dim", "index", "source", "src") if key in kwargs]
        target, dim, index, source = values[:4]
        before, added = (self._labels(given, leaf) for leaf in (target, source))
        index = index.cpu()
        rows = _ADDS[name] == "index"
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


def _with_cause(found: list[Layout], name: str) -> list[Layout]:
    return [Several(layout.additive, name) if isinstance(layout, Several) else layout for layout in found]


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
        leaf, layout = apart[0]
        if all(leaf.shape == result.shape for leaf, _ in apart):
            return layout.with_scale(several[0][1].cause)
    moving = name in _MOVES or name in _CASTS or (name in _PICKS and id(args[0]) in given)
    additive = all(layout.additive or not leaf.requires_grad for leaf, layout in several)
    if name in _FACTORS:
        # A product is linear in one factor if the other is a constant, or a number without a gradient.
        factors = [leaf for leaf in leaves_of((*args, *kwargs.values())) if id(leaf) in given]
        varying = [leaf for leaf in factors if leaf.requires_grad]
        divisor = args[1] if len(args) > 1 and "div" in name else None
        constant = not (isinstance(divisor, Tensor) and divisor.requires_grad and id(divisor) in given)
        additive = additive and len(varying) <= 1 and constant
    linear = moving or name in _LINEAR or name in ("stack", "cat")
    if additive and not linear:
        return Several(additive=False, cause=name)
    # Of what is no sum any more, the function that made it so is kept.
    worst = next((layout for _, layout in several if not layout.additive), several[0][1])
    return Several(additive=additive, cause=worst.cause)


@final
class _Probe:
    """A function that is called again with the entries of some examples replaced.

    Args:
        size: Number of examples.
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        given: The tensors that depend on the batch.
        results: What it returned.
    """

    def __init__(
        self,
        size: int,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, tuple[Tensor, Layout]],
        results: Sequence[Tensor],
    ) -> None:
        self._size, self._func, self._name = size, func, name_of(func)
        self._args, self._kwargs, self._given = args, kwargs, given
        in_place = is_in_place(func) or "out" in kwargs
        devices = {leaf.device for leaf in leaves_of((*args, *kwargs.values())) if leaf.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            self._results = list(self._called(None, _other)) if in_place else list(results)
            self._changed = [(chosen, self._changes(chosen)) for chosen in _subsets(size)]

    def layouts(self) -> list[Layout]:
        """Of every result."""
        return [self._layout(index) for index in range(len(self._results))]

    def _called(self, chosen: Tensor | None, other: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def put(leaf: Tensor) -> Tensor:
            entry = self._given.get(id(leaf))
            if chosen is None or entry is None:
                return leaf.clone()
            labels = entry[1].labels(leaf.shape, self._size).long()
            inside = torch.cat([torch.zeros(1, dtype=torch.bool), chosen])[labels].to(leaf.device)
            return torch.where(inside, other(leaf), leaf)

        returned = self._func(*mapped(put, self._args), **mapped(put, self._kwargs))
        return list(leaves_of((returned,)))

    def _changes(self, chosen: Tensor) -> list[Tensor]:
        """Where NaN arrives; where a result cannot be NaN, or no argument, where it is another."""
        spreads = all(_can_be_nan(leaf) for leaf, _ in self._given.values())
        arrives = [spreads and _can_be_nan(result) for result in self._results]
        spread = self._called(chosen, _nan) if any(arrives) else self._results
        moved = self._results if all(arrives) else self._called(chosen, _other)
        changes = []
        for before, nan, after, is_spread in zip(self._results, spread, moved, arrives, strict=True):
            if is_spread:
                changes.append((nan.isnan() & ~before.isnan()).cpu())
            else:
                changes.append(((after != before) & ~((after != after) & (before != before))).cpu())
        return changes

    def _layout(self, index: int) -> Layout:
        """The first candidate along which no entry changes with examples that are others'."""
        shape = self._results[index].shape
        changed = [(chosen, changes[index]) for chosen, changes in self._changed]
        if not any(bool(changes.any()) for _, changes in changed):
            return SHARED
        touched = {
            dim: [changes.movedim(dim, 0).reshape(shape[dim], -1).any(1) for _, changes in changed]
            for dim in range(len(shape))
        }
        for candidate in self._candidates(shape):
            if isinstance(candidate, Single):
                leaks = any(bool(c.any()) and not bool(chosen[candidate.example]) for chosen, c in changed)
            else:
                owners = candidate.labels(shape, self._size)
                owners = owners[tuple(slice(None) if d == candidate.dim else 0 for d in range(len(shape)))].long()
                inside = [torch.cat([torch.zeros(1, dtype=torch.bool), chosen])[owners] for chosen, _ in changed]
                leaks = any(bool((t & ~i).any()) for t, i in zip(touched[candidate.dim], inside, strict=True))
            if not leaks:
                return candidate
        return Several(additive=self._is_additive(), cause=self._name)

    def _candidates(self, shape: torch.Size) -> list[Any]:
        """Where the examples may be: best where they were, counted from the left or from the right."""
        near: list[Any] = []
        for leaf, layout in self._given.values():
            if isinstance(layout, Single):
                near.append(layout)
            if isinstance(layout, (Regular, Listed)):
                for dim in (layout.dim, layout.dim - leaf.ndim + len(shape)):
                    if not 0 <= dim < len(shape) or shape[dim] == 0:
                        continue
                    if isinstance(layout, Regular) and layout.inner in inners(shape[dim], self._size):
                        near.append(Regular(dim, layout.inner))
                    if isinstance(layout, Listed) and shape[dim] == len(layout.owners):
                        near.append(Listed(dim, layout.owners))
        every = [Regular(dim, inner) for dim, length in enumerate(shape) for inner in inners(length, self._size)]
        return near + every

    def _is_additive(self) -> bool:
        """Whether a function that joins examples sums over them: a sum, or a loss that would be one per example."""
        if self._name in _SUMS:
            return True
        if "reduction" not in self._kwargs and not hasattr(functional, self._name):
            return False
        if self._kwargs.get("reduction", "mean") == "none" or not _takes_reduction(self._func):
            return False
        single = {**self._kwargs, "reduction": "none"}
        with unseen(), torch.no_grad():
            results = list(leaves_of((self._func(*self._args, **single),)))
            layouts = _Probe(self._size, self._func, self._args, single, self._given, results).layouts()
        return all(isinstance(layout, (Apart, Shared)) for layout in layouts)


def _empty(shape: torch.Size) -> Layout:
    return Listed(next(dim for dim, length in enumerate(shape) if not length), EMPTY)


def _takes_reduction(func: Any) -> bool:
    code = getattr(func, "__code__", None)
    return code is not None and "reduction" in code.co_varnames


def _nan(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, torch.nan)


def _other(leaf: Tensor) -> Tensor:
    """A tensor whose every entry is as far from the other end of the range."""
    if leaf.dtype is torch.bool:
        return ~leaf
    if leaf.is_complex():
        return -leaf
    return (leaf.max() + leaf.min() - leaf) if leaf.numel() else leaf


def _can_be_nan(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _subsets(size: int) -> list[Tensor]:
    """Some of the examples, and the others, so that no shift and no grouping leaves all of these sets unchanged.

    Two balanced sets and their complements: up to four examples every pair is told apart. For more, sets are drawn until
    no cyclic shift of the examples, and no division into equal groups, leaves both sets as they are.
    """
    index = torch.arange(size)
    if size <= 4:
        sets = [index % 2 == 1, index // 2 % 2 == 1][: 1 if size == 2 else 2]
    else:
        generator = torch.Generator().manual_seed(size)
        while True:
            sets = [torch.randperm(size, generator=generator) < size // 2 for _ in range(2)]
            code = sets[0] * 2 + sets[1] * 1
            shifts = all(bool((code.roll(shift) != code).any()) for shift in range(1, size))
            widths = [width for width in range(2, size) if size % width == 0]
            groups = all(
                bool((code.view(-1, width) != code.view(-1, width)[:, :1]).any())
                and bool((code.view(width, -1) != code.view(width, -1)[:1]).any())
                for width in widths
            )
            if shifts and groups:
                break
    return [part for chosen in sets for part in (chosen, ~chosen)]

"""A function that is called again with the entries of some examples replaced: what changes depends on these."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from noetherflow._per_example import own_randomness
from noetherflow.noise.capture.calls import FunctionCall
from noetherflow.noise.capture.kinds import SUMS
from noetherflow.noise.capture.layouts import SHARED, Apart, Layout, Listed, Regular, Several, Shared, Single, inners


@final
class Probe:
    """A function that is called again with the entries of some examples replaced.

    Args:
        size: Number of examples.
        call: The call of the function.
    """

    def __init__(self, size: int, call: FunctionCall) -> None:
        self._size, self._call = size, call
        with own_randomness(call.leaves[0].device):
            self._before = self._called(None, _other)
            self._changed = [(chosen, self._changes(chosen)) for chosen in _subsets(size)]

    def layouts(self) -> list[Layout]:
        """Of every result."""
        return [self._layout(index) for index in range(len(self._before))]

    def _called(self, chosen: Tensor | None, other: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def put(leaf: Tensor) -> Tensor:
            layout = self._call.layout(leaf)
            if chosen is None or layout is SHARED:
                return leaf.clone()
            # Few copies of the leaf at a time: of a large model, the first step is the one that needs most memory.
            labels = _unexpanded(layout.labels(leaf.shape, self._size)).long()
            inside = torch.cat([torch.zeros(1, dtype=torch.bool), chosen])[labels].to(leaf.device)
            replaced = other(leaf)
            return torch.where(inside, replaced, leaf, out=replaced)

        torch.manual_seed(0)  # the same random numbers in every call
        return self._call.results(put)

    def _changes(self, chosen: Tensor) -> list[Tensor]:
        """Where NaN arrives, and where a result is another for other numbers: some functions swallow NaN."""
        others = self._called(chosen, _other)
        changes = [_differ(before, after) for before, after in zip(self._before, others, strict=True)]
        if not any(can_be_nan(leaf) for leaf, _ in self._call.given.values()):
            return changes
        try:
            spread = self._called(chosen, _nan)
        except (RuntimeError, ValueError):
            return changes  # a function that refuses NaN, such as a loss of probabilities
        for index, (before, nan) in enumerate(zip(self._before, spread, strict=True)):
            if can_be_nan(before):
                changes[index] |= (nan.isnan() & ~before.isnan()).cpu()
        return changes

    def _layout(self, index: int) -> Layout:
        """The first candidate along which no entry changes with examples that are others'."""
        shape = self._before[index].shape
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
        additive = self._is_additive()
        return Several(additive, self._call.name, summed=additive and self._call.adds_up)

    def _candidates(self, shape: torch.Size) -> list[Any]:
        """Where the examples may be: best where they were, counted from the left or from the right."""
        near: list[Any] = []
        for leaf, layout in self._call.given.values():
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
        call = self._call
        if call.name in SUMS:
            return True
        if call.kwargs.get("reduction", "mean") == "none" or not _takes_reduction(call.func):
            return False
        single = replace(call, kwargs={**call.kwargs, "reduction": "none"})
        return all(isinstance(layout, (Apart, Shared)) for layout in Probe(self._size, single).layouts())


def _takes_reduction(func: Any) -> bool:
    code = getattr(func, "__code__", None)
    return code is not None and "reduction" in code.co_varnames


def _differ(before: Tensor, after: Tensor) -> Tensor:
    """Where two results differ by more than rounding."""
    if not can_be_nan(before):
        return (after != before).cpu()
    # Products of matrices round in another way where memory begins elsewhere.
    eps = torch.finfo(before.dtype).eps
    slack = (100 * eps if eps < 1e-6 else 4 * eps) * _largest(before)
    gap = after - before
    close = gap.abs_() <= slack if not gap.is_complex() else gap.abs() <= slack
    del gap
    return (~close & (before != after) & ~(before.isnan() & after.isnan())).cpu()


def _largest(tensor: Tensor) -> float:
    """The largest absolute value of a finite entry; without a copy, if all entries are finite."""
    if tensor.numel() and not tensor.is_complex():
        largest = max(map(abs, map(float, tensor.aminmax())))
        if math.isfinite(largest):
            return largest
    finite = tensor.abs()[tensor.isfinite()]
    return float(finite.max() if finite.numel() else 0.0)


def _unexpanded(tensor: Tensor) -> Tensor:
    """A tensor with size 1 along the dimensions along which it is expanded."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _nan(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, torch.nan) if can_be_nan(leaf) else _other(leaf)


def _other(leaf: Tensor) -> Tensor:
    """A new tensor whose every entry is as far from the other end of the range, or of the sorted whole numbers."""
    if leaf.dtype is torch.bool:
        return ~leaf
    if leaf.is_complex():
        return -leaf
    if not leaf.is_floating_point():
        # Numbers of rows stay numbers of rows, beside a mark that is none: -100 for a token without a label.
        values, ranks = leaf.unique(return_inverse=True)
        return values.flip(0)[ranks]
    return (leaf.max() + leaf.min() - leaf) if leaf.numel() else leaf.clone()


def can_be_nan(leaf: Tensor) -> bool:
    """Whether the entries of a tensor can be NaN."""
    return leaf.is_floating_point() or leaf.is_complex()


def _subsets(size: int) -> list[Tensor]:
    """Some of the examples, and the others, so that no shift and no grouping leaves all of these sets unchanged.

    Two balanced sets and their complements tell every pair of up to four examples apart. For more, sets are drawn until
    no cyclic shift of the examples, and no division into equal groups, leaves both sets as they are.

    Args:
        size: Number of examples B.

    Returns:
        Masks of shape (B,).
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

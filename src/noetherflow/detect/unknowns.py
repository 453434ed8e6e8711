"""The unknown exponents of parameters: one for every index of every axis, and what can be chosen among them."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.detect.exponents import ScalingExponents, Term


class AxisUnknowns(NamedTuple):
    """The unknowns of one axis of a parameter, shape (size of the axis,).

    `block` is (axis, start, stop) if the unknowns hold only in that range of another axis: one matrix of a stack.
    """

    parameter: str
    axis: int
    ids: Tensor
    block: tuple[int, int, int] | None = None


class Stack(NamedTuple):
    """A parameter that is a stack of matrices: its exponents along `axis` differ between the `parts` of `over`."""

    parameter: str
    axis: int
    over: int
    parts: int


@final
class Unknowns:
    """All unknowns of a computation. Unknown 0 is the exponent of a tensor that does not scale.

    Args:
        stacks: Parameters that are stacks of matrices, which need more unknowns than one per index of each axis.

    Attributes:
        count: The number of unknowns.
        axes: The unknowns of the axes of parameters.
        requested: Stacks that operations have asked for.
    """

    def __init__(self, stacks: frozenset[Stack] = frozenset()) -> None:
        self.count = 1
        self.axes: list[AxisUnknowns] = []
        self.requested: set[Stack] = set()
        self._stacks = stacks
        self._starts: list[int] = []  # The first unknown of each of `axes`, in increasing order.
        # An entry of a parameter scales by the sum of the unknowns of its axes, so that a number that is added to those
        # of one axis can be subtracted from those of another: the sizes of such gauge freedoms that are still left.
        self._gauges: dict[str, list[int]] = {}

    def new(self, shape: Sequence[int]) -> Tensor:
        """New unknowns, in a tensor of a shape."""
        first, self.count = self.count, self.count + math.prod(shape)
        return torch.arange(first, self.count).reshape(tuple(shape))

    def parameter(self, name: str, shape: Sequence[int]) -> ScalingExponents:
        """The exponents of a trainable parameter: the sum of an unknown for each of its indices."""
        terms = []
        for axis in range(len(shape)) or (0,):
            stack = next((each for each in self._stacks if (each.parameter, each.axis) == (name, axis)), None)
            size, layout = shape[axis] if shape else 1, [1] * len(shape)
            if shape:
                layout[axis] = size
            if stack is None:
                ids = self.new((size,))
                self._add(AxisUnknowns(name, axis, ids))
                terms.append(Term(1.0, ids.reshape(layout)))
                continue
            length = shape[stack.over] // stack.parts
            ids = self.new((stack.parts, size))
            for part in range(stack.parts):
                self._add(AxisUnknowns(name, axis, ids[part], (stack.over, part * length, (part + 1) * length)))
            spread = ids.repeat_interleave(length, 0)
            layout[stack.over] = len(spread)
            terms.append(Term(1.0, (spread if stack.over < axis else spread.T).reshape(layout)))
        parts = {stack.axis: stack.parts for stack in self._stacks if stack.parameter == name}
        sizes = sorted((parts.get(axis, 1) for axis in range(len(shape))), reverse=True)
        self._gauges[name] = sizes[: len(terms) - 1]
        return ScalingExponents(tuple(shape), tuple(terms), parameter=name)

    def use_gauge(self, name: str | None, size: int, left_over: Iterable[Term]) -> bool:
        """Use a gauge freedom of a parameter to set a common exponent to zero.

        Args:
            name: The parameter, if any.
            size: The number of entries of the common exponent.
            left_over: The terms that do not enter the common exponent. The freedom moves a number between axes, so a
                term of the parameter has to be among them.

        Returns:
            Whether there was such a freedom.
        """
        sizes = self._gauges.get(name, []) if name is not None else []
        if size not in sizes or not any(self._belongs(ids, name) for _, ids in left_over):
            return False
        sizes.remove(size)
        return True

    def use_remaining_gauges(self, alike: Callable[[Tensor], Tensor], zero: Callable[[Tensor], bool]) -> list[Tensor]:
        """Use what gauge freedom is left, on axes along which many exponents are equal if there are any.

        Of the rows of a gate, which silu forbids to scale, and of its columns, which scale as a norm before it, the
        rows are kept where they are.

        Args:
            alike: The largest part of some unknowns that are equal, as far as is known.
            zero: Whether unknowns vanish, because a gauge freedom has been used on them.

        Returns:
            Unknowns that can be set to zero without loss of generality.
        """
        chosen = []
        by_parameter: dict[str, dict[int, list[Tensor]]] = {name: {} for name in self._gauges}
        for each in self.axes:
            by_parameter[each.parameter].setdefault(each.axis, []).append(each.ids)
        for name, sizes in self._gauges.items():
            axes = by_parameter[name]
            for size in sizes:
                for stack in self._stacks:
                    if stack.parameter == name and stack.parts == size and len(axes.get(stack.over, ())) == 1:
                        (ids,) = axes[stack.over]
                        axes[stack.over] = list(ids.reshape(size, -1))
                fitting = {
                    axis: parts for axis, parts in axes.items() if len(parts) == size and not all(map(zero, parts))
                }
                if fitting:
                    equal = {axis: [alike(ids) for ids in parts] for axis, parts in fitting.items()}
                    axis = min(fitting, key=lambda axis: (*_different(fitting[axis], equal[axis]), -axis))
                    chosen += [ids[:1] for ids in equal[axis]]
                    del axes[axis]
            sizes.clear()
        return chosen

    def request_stack(self, over: Tensor, parts: int, axis: Tensor) -> None:
        """Ask for separate unknowns along the axis of `axis` in each part of the axis of `over`.

        Args:
            over: Unknowns of one axis of a parameter.
            parts: The number of parts.
            axis: Unknowns of another axis of that parameter.
        """
        here, there = self._axis_of(axis), self._axis_of(over)
        if here and there and here.parameter == there.parameter and here.block is None and here.axis != there.axis:
            self.requested.add(Stack(here.parameter, here.axis, there.axis, parts))

    def _add(self, axis: AxisUnknowns) -> None:
        self.axes.append(axis)
        self._starts.append(int(axis.ids[0]))

    def _axis_of(self, ids: Tensor) -> AxisUnknowns | None:
        """The axis of a parameter to which unknowns belong; None for the common exponents that operations introduce."""
        first = int(ids.reshape(-1)[0])
        index = bisect.bisect_right(self._starts, first) - 1
        axis = self.axes[index] if index >= 0 else None
        return axis if axis is not None and first < self._starts[index] + len(axis.ids) else None

    def _belongs(self, ids: Tensor, name: str | None) -> bool:
        """Whether unknowns are those of an axis of a parameter, or a common value that came out of them."""
        axis = self._axis_of(ids)
        return axis is None or axis.parameter == name


def _different(parts: Sequence[Tensor], equal: Sequence[Tensor]) -> tuple[bool, bool, int]:
    """How little the unknowns of an axis are alike, smaller if they are more alike: all, many, or a short axis."""
    all_equal = all(len(part) == len(most) for part, most in zip(parts, equal, strict=True))
    several = all(len(most) > 1 for most in equal)
    return not all_equal, not (all_equal or several), len(parts[0])

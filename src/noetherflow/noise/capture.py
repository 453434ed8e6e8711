"""A forward pass in which every use of a trained parameter is noted, and a backward pass that turns uses into squares.

Parameters are recognised by identity wherever PyTorch functions meet them, so that tied weights, modules used several
times, slices of packed projections and parameters of hand-written layers are all the same to it. Nothing is attached to
the model.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from noetherflow._per_example import each
from noetherflow.noise.asked import Asked, Page
from noetherflow.noise.collect import collect, stacked
from noetherflow.noise.kernels import accumulator
from noetherflow.noise.ledger import Contents, Ledger, Sums
from noetherflow.noise.modes import CALMED, DROPOUT, aside, calmed, own_code
from noetherflow.noise.taps import Note, spread, tap
from noetherflow.noise.tracked import (
    Layout,
    Source,
    Tracked,
    as_function,
    is_view,
    leaves_of,
    mapped,
    part_of,
    roots_of,
)
from noetherflow.noise.uses import Rows, Whole

# Properties that are views of a tensor; all others say something about it, or cut it off from its gradient.
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
_APART = {Tensor.requires_grad_, Tensor.detach}
# What says something about a tensor and is no tensor: asked for all the time.
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_nested")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
}
# Backward passes.
_OWN_CODE: dict[Any, Any] = {
    one: own_code(one) for one in (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
}


@final
class Fate(Enum):
    """What becomes of the sum of gradients of a parameter."""

    PASSED_ON = auto()  # to the parameter, as ever
    KEPT = auto()  # in the capture
    DROPPED = auto()  # or never formed, if its squares can be had for less


class Rule(Protocol):
    """What to do about a call of one function in which parameters meet data."""

    def __call__(self, capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call, or NotImplemented."""


@final
class Capture(TorchFunctionMode):
    """The mode under which a forward pass runs.

    Args:
        params: Trained parameters by name; of these, every use is noted.
        contents: What to add up for each.
        size: Number of examples of the batch.
        batch: Its tensors that have an entry per example.
        rules: What to do about each function that meets a parameter and data.
        fate: What becomes of the parameters' own gradients.
        calm: Run without dropout.

    Attributes:
        layout: How tensors are laid out at this point of the forward pass.
        ledger: The squares of all parameters, added up in the backward pass.
        gradients: The sum of the gradients of each one that was reached, if it is kept, or None.
        leaves: What stands for the parameters in the graph, if gradients do not go on to them.
        unknown: After the block: the operation that stood in the way, for parameters that could not be seen.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        contents: Contents,
        size: int,
        batch: Iterable[Tensor],
        rules: Mapping[Any, Rule],
        *,
        fate: Fate,
        calm: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.ledger = Ledger.blank(contents, next(iter(params.values())))
        self.gradients: dict[str, Tensor | None] = {}
        self._rules, self._fate, self._calm = rules, fate, calm
        # Strong references, so that no identity is used twice.
        self._data = {id(tensor): tensor for tensor in batch}
        self._tracked: dict[int, Tracked] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.layout = Layout(size, second=False)
        self._depth = 0
        self.unknown: dict[str, str] = {}
        self.leaves: list[Tensor] = []
        self._params = params

    def __exit__(self, *raised: Any) -> None:
        """Leave the mode, and with the outermost block everything that was held on to.

        What autograd keeps of a forward pass refers to this object: without this, both would wait for Python's cycle
        collector, and every step would take fresh memory.
        """
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if not self._depth:
            sources = [one.source for one in self._tracked.values()]
            self.unknown = {one.name: one.unknown for one in sources if one.name is not None and one.unknown}
            for one in sources:
                one.uses.clear()  # of a backward pass that was broken off
            for _, hook in self._hooks:
                hook.remove()
            for kept in (self._hooks, self._data, self._tracked, self._stand_ins):
                kept.clear()

    def __enter__(self) -> "Capture":
        """Enter the mode, once more if it is active."""
        if not self._depth:
            # All at once, not when the forward pass meets them: code between large products is out of the cache.
            with torch.enable_grad():
                for name, leaf in self._params.items():
                    # Who keeps gradients may give detached tensors; others may have frozen one in the meantime.
                    if leaf.requires_grad or self._fate is Fate.KEPT:
                        self._gather(self._root(leaf), Source(name, leaf.shape))
        super().__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1
        return self

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See to one call."""
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*args, **kwargs)
        if func in _OWN_CODE:
            with self:  # layers under checkpoint are computed again, and have to be seen again
                return _OWN_CODE[func](*args, **kwargs)
        calm = self._calm and func in CALMED
        known = self._knows(args) or (bool(kwargs) and self._knows(kwargs.values()))
        if calm or not known or not torch.is_grad_enabled() or _is_apart(func):
            # Nearly all calls: little is done, for between large products that little is felt.
            found = calmed(func, args, kwargs) if calm else func(*args, **kwargs)
            if isinstance(found, Tensor) and found.requires_grad:
                return found
            return self._mark(found, args, kwargs) if self._have_data(args, kwargs.values()) else found
        data = self._have_data(args, kwargs.values())
        if self._stand_ins:
            args, kwargs = mapped(self._stand_in, args), mapped(self._stand_in, kwargs)
        if not data:
            return self._derive(func, args, kwargs)
        rule = self._rules.get(func)
        found = NotImplemented if rule is None else rule(self, func, args, kwargs)
        if found is NotImplemented:
            self._refuse(func, args, kwargs)
            found = func(*args, **kwargs)
        return self._mark(found, args, kwargs)

    def _knows(self, values: Iterable[Any]) -> bool:
        """Whether there are parameters among some arguments, or what is made of them."""
        for one in values:
            if id(one) in self._tracked or id(one) in self._stand_ins:
                return True
            if isinstance(one, (tuple, list)) and self._knows(one):
                return True
        return False

    def _have_data(self, *values: Iterable[Any]) -> bool:
        """Whether there is a tensor among some arguments that depends on the batch."""
        return any(id(leaf) not in self._stand_ins and self.is_data(leaf) for one in values for leaf in leaves_of(one))

    def tracked(self, tensor: Any) -> Tracked | None:
        """What is known of an argument, if it is made of parameters alone."""
        return self._tracked.get(id(tensor))

    def is_data(self, tensor: Any) -> bool:
        """Whether a tensor depends on the batch."""
        if id(tensor) in self._tracked:
            return False
        # What requires a gradient and is not made of parameters alone does: nothing need be attached to it.
        return tensor.requires_grad or id(tensor) in self._data or getattr(tensor, "_of_batch", False)

    def tap(self, output: Tensor, source: Tensor, note: Note, *tracked: Tracked) -> Tensor:
        """The output of an operation computed without its parameters' gradients, with a note to be made of them.

        Args:
            output: What the operation returned: no view, and not saved for its own backward pass.
            source: A tensor that the note will need again.
            note: Called in the backward pass with that tensor and the gradient of the output; returns what each
                parameter's `Tracked.note` does.
            tracked: The parameters it is about.

        Returns:
            The output, which now requires gradients.
        """
        return tap(output, source, note, roots_of(*tracked))

    def spread(self, tracked: Tracked, shape: tuple[int, ...]) -> Tensor:
        """A parameter once per example, as a tensor whose gradient is noted.

        Args:
            tracked: The parameter.
            shape: (B, ...), to which the parameter can be expanded.

        Returns:
            The expanded tensor.
        """

        def note(gradient: Tensor) -> Tensor | None:
            return tracked.note(Whole(tracked.views, gradient.reshape(self.size, *tracked.tensor.shape)))

        return spread(tracked.tensor, shape, note, tracked.root)

    @contextmanager
    def batch_second(self) -> Iterator[None]:
        """A block of calls, seen by the mode too, in which tensors are laid out (tokens, examples, ...)."""
        before, self.layout = self.layout, Layout(self.size, second=True)
        try:
            with self:
                yield
        finally:
            self.layout = before

    @property
    def _pass_on(self) -> bool:
        return self._fate is Fate.PASSED_ON

    def _stand_in(self, leaf: Tensor) -> Tensor:
        return self._stand_ins.get(id(leaf), leaf)

    def _root(self, leaf: Tensor) -> Tensor:
        """What stands for a parameter in the graph: best the parameter."""
        if self._pass_on and not leaf._backward_hooks:
            return leaf
        if self._pass_on:
            root = leaf.view_as(leaf)  # hooks of the user's come after it, and see the whole gradient
        else:
            root = leaf.detach().requires_grad_()
            self.leaves.append(root)
        self._stand_ins[id(leaf)] = root
        return root

    def _gather(self, root: Tensor, source: Source) -> Tracked:
        """A tensor as a source: what arrives at its place in the graph is replaced by what was noted of it."""
        node, place = root.grad_fn, root.output_nr
        if node is None:
            node = root.view_as(root).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            assert node is not None

        def arrive(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            with aside():
                found = self._finish(source, root, gradients[place])
            return (*gradients[:place], found, *gradients[place + 1 :])

        # Held as well: that of a parameter lives no longer than what refers to it.
        self._hooks.append((node, node.register_prehook(arrive)))
        return self._track(Tracked(source, root, root, self._zero(root).expand(root.shape)))

    def _zero(self, like: Tensor) -> Tensor:
        kind = like.dtype, like.device
        if kind not in self._zeros:
            self._zeros[kind] = like.new_zeros(())
        return self._zeros[kind]

    def _track(self, tracked: Tracked) -> Tracked:
        self._tracked[id(tracked.tensor)] = tracked
        return tracked

    def _mark(self, found: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Note of the results of a call that they depend on the batch."""
        for one in (found,) if isinstance(found, Tensor) else leaves_of((found,)):
            if one.requires_grad:
                continue
            if any(one is leaf for leaf in leaves_of((*args, *(kwargs or {}).values()))):
                self._data[id(one)] = one  # a tensor of the user's: nothing is attached to it
            else:
                one._of_batch = True  # type: ignore[attr-defined]
        return found

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call in which parameters meet no data: a view of one, or something made of them."""
        leaves = list(leaves_of((*args, *kwargs.values())))
        parents = tuple(self._tracked[id(leaf)] for leaf in leaves if id(leaf) in self._tracked)
        name = getattr(func, "__name__", "")
        if func is functional.embedding and leaves[0].ndim > 1 and len(leaves[0]) == self.size:
            # Constants, but one for each example: the types of tokens that nobody gave.
            return self._mark(self._rules[func](self, func, args, kwargs), args, kwargs)
        if (name.endswith("_") and not name.endswith("__")) or func in DROPOUT:
            self._refuse(func, args, kwargs)
            return func(*args, **kwargs)
        if name in ("expand", "repeat", "broadcast_to") and len(parents) == 1 and parents[0].tensor.ndim:
            # A class token, repeated for every example.
            shape, own = tuple(func(*args, **kwargs).shape), tuple(parents[0].tensor.shape)
            if shape[0] == self.size and own in (shape[1:], (1, *shape[1:])):
                return self._mark(self.spread(parents[0], shape))
        result = func(*args, **kwargs)
        for index, one in enumerate([result] if isinstance(result, Tensor) else list(leaves_of((result,)))):
            if not one.requires_grad or id(one) in self._tracked:
                continue
            if len(parents) == 1 and is_view(one, parents[0].tensor):
                again = as_function(func, args, kwargs, parents[0].tensor)
                view = again if isinstance(result, Tensor) else part_of(again, index)
                self._track(replace(parents[0], tensor=one, views=(*parents[0].views, view)))
            elif isinstance(result, Tensor):
                source = Source(
                    None, one.shape, parents, as_function(func, args, kwargs, *(parent.tensor for parent in parents))
                )
                if func is functional.embedding and len(parents) == 1 and len(args) == 2 and not kwargs:
                    source.ids = args[0]
                return self._gather(one, source).tensor
            else:
                self._refuse(func, args, kwargs)
        return result

    def _refuse(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for leaf in leaves_of((*args, *kwargs.values())):
            if id(leaf) in self._tracked:
                self._tracked[id(leaf)].source.refuse(getattr(func, "__name__", str(func)))

    def _finish(self, source: Source, like: Tensor, incoming: Tensor | None) -> Tensor | None:
        """All uses of a source are there: add up what is asked for, and let the gradient go on."""
        uses, source.uses = source.uses, []
        if uses and source.name in self.gradients:
            source.refuse("a second backward pass")
        if not self._pass_on and (source.unknown or not uses):
            return None
        if source.unknown:
            own = [use for use in uses if not use.native]
            found = collect(own, Sums.blank(Page.of(source.shape, Asked()), like), like) if own else None
            parts = [one for one in (incoming, found) if one is not None]
            return torch.stack(parts).sum(0).to(like.dtype) if parts else None
        if not uses:
            return incoming
        if source.name is not None:
            wanted = self._fate is not Fate.DROPPED
            gradient = collect(uses, self.ledger.sums(source.name, accumulator(like)), like, wanted=wanted)
            if gradient is not None and gradient.dtype is not like.dtype:
                gradient = gradient.to(like.dtype)
            # A gradient that goes on is not held on to, or autograd would copy it.
            self.gradients[source.name] = gradient if self._fate is Fate.KEPT else None
            return gradient if self._pass_on else None
        stack = stacked(uses, source.shape, like)
        if source.ids is not None:
            (table,) = source.parents
            ids = source.ids.reshape(1, -1).expand(self.size, -1)
            table.note(Rows(table.views, ids, stack.reshape(self.size, ids.shape[1], -1), native=True))
        else:
            assert source.function is not None
            pull = vjp(source.function, *(parent.tensor.detach() for parent in source.parents))[1]
            for parent, one in zip(source.parents, each(pull, (stack,), (False,), randomness="same"), strict=True):
                parent.note(Whole(parent.views, one, native=True))
        return stack.sum(0) if self._pass_on else None


def _is_apart(func: Any) -> bool:
    """Whether a call has nothing to do with the gradient of its arguments."""
    if func in _APART:
        return True
    return getattr(func, "__name__", "") in ("__get__", "__set__") and func not in _VIEWS

"""A forward pass in which every use of a trained parameter is recorded, and a backward pass that collects statistics.

Parameters are recognised by identity wherever PyTorch functions meet them, so that tied weights, modules used several
times, slices of packed projections and parameters of hand-written layers are treated alike. Nothing is attached to the
model. Every tensor that depends on the batch carries a layout: which entries belong to which example.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import debug_unwrap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from noetherflow.noise.capture import autograd, finish
from noetherflow.noise.capture.autograd import DerivativeError
from noetherflow.noise.capture.calls import (
    DROPOUT,
    WITH_DROPOUT,
    as_function,
    is_detached,
    is_in_place,
    leaves_of,
    mapped,
    name_of,
    own_code,
    unseen,
    without_dropout,
)
from noetherflow.noise.capture.fate import Fate
from noetherflow.noise.capture.layouts import SHARED, Apart, Layout, Lost, Regular, Several, Single
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.capture.sources import Call, Source, Tracked, is_view, roots_of
from noetherflow.noise.ledger import Contents, Ledger

# What says something about a tensor and is no tensor: requested all the time.
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_nested")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
}
_BACKWARD: dict[Any, Any] = {one: own_code(one) for one in (torch.autograd.backward, Tensor.backward)}
_GRAD = own_code(torch.autograd.grad)


class Rule(Protocol):
    """What to do about a call of a function in which parameters meet data."""

    def __call__(self, capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call, or NotImplemented."""


@final
class Capture(TorchFunctionMode):
    """The mode under which a forward pass runs.

    Args:
        params: Trained parameters by name; of these, every use is recorded.
        contents: What to add up for each.
        places: Where examples are in results; it serves for all steps with as many examples.
        batch: The tensors of the batch that have an entry per example.
        rules: What to do about each function that meets a parameter and data.
        fate: What becomes of the parameters' own gradients.
        calm: Run without dropout.

    Attributes:
        ledger: The squares of all parameters, added up in the backward pass.
        gradients: The sum of the gradients of each parameter that was reached, if it is kept, or None.
        refused: After the block: the parameters whose gradients cannot be taken apart by example, with the cause.
        joined: What joined the examples in front of the backward pass; empty if each has a loss of its own.
        met: Whether a tensor of the batch met a parameter.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        contents: Contents,
        places: Places,
        batch: Iterable[Tensor],
        rules: Mapping[Any, Rule],
        *,
        fate: Fate,
        calm: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.places, self.fate = places.size, places, fate
        self.ledger = Ledger.blank(contents, next(iter(params.values())))
        self.gradients: dict[str, Tensor | None] = {}
        self.refused: dict[str, str] = {}
        self.joined = ""
        self.met = False
        self._rules, self._calm, self._params = rules, calm, params
        # Tensors of the user's, to which nothing is attached. Strong references, so that no identity is used twice.
        first = Regular(0) if self.size > 1 else Single(0)
        self._given: dict[int, tuple[Tensor, Layout]] = {id(leaf): (leaf, first) for leaf in batch}
        self._token = object()
        self._tracked: dict[int, Tracked] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._depth = 0
        self._again = False  # in a backward pass, where layers under a checkpoint are computed again

    def __enter__(self) -> "Capture":
        """Enter the mode, once more if it is active."""
        if not self._depth:
            # All at once, not when the forward pass meets them: code between large products is out of the cache.
            with torch.enable_grad():
                for name, leaf in self._params.items():
                    if leaf.requires_grad:  # it may have been frozen in the meantime
                        self._gather(self._root(leaf), Source(name, leaf.shape))
        super().__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1
        return self

    def __exit__(self, *raised: Any) -> None:
        """Leave the mode, and with the outermost block everything that was held on to.

        What autograd keeps of a forward pass refers to this object: without this, both would wait for Python's cycle
        collector, and every step would take fresh memory.
        """
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if not self._depth:
            for tracked in self._tracked.values():
                source = tracked.source
                if source.name is not None and source.refused and source.arrived:
                    self.refused[source.name] = source.refused
                source.uses.clear()  # of a backward pass that was broken off
            for _, hook in self._hooks:
                hook.remove()
            for kept in (self._hooks, self._given, self._tracked, self._stand_ins):
                kept.clear()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See to a call."""
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*args, **kwargs)
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        if func is torch.autograd.grad:
            return self._grad(args, kwargs)
        leaves = list(leaves_of((*args, *kwargs.values())))
        tracked = [leaf for leaf in leaves if id(leaf) in self._tracked or id(leaf) in self._stand_ins]
        data: dict[int, tuple[Tensor, Layout]] = {}
        for leaf in leaves:
            layout = self.layout(leaf)
            if layout is not SHARED:
                data[id(leaf)] = (leaf, layout)
        if self._calm and func in WITH_DROPOUT:
            result = without_dropout(func, args, kwargs)
        elif not tracked or not torch.is_grad_enabled() or is_detached(func):
            result = func(*args, **kwargs)
        else:
            if self._stand_ins:
                args, kwargs = mapped(self._stand_in, args), mapped(self._stand_in, kwargs)
            if not data:
                return self._derive(func, args, kwargs)
            self.met = True
            result = self._met(func, args, kwargs, data)
        return self._place(func, args, kwargs, data, result)

    def layout(self, leaf: Tensor) -> Layout:
        """Where the examples are in an argument."""
        entry = getattr(leaf, "_examples", None)
        if entry is not None and entry[0] is self._token:
            return entry[1]
        if id(leaf) in self._given:
            return self._given[id(leaf)][1]
        if id(leaf) in self._tracked or id(leaf) in self._stand_ins:
            return SHARED
        if debug_unwrap(leaf) is not leaf:
            return Lost("a transform of torch.func")
        if (again := self._layout_of_memory(leaf)) is not None:
            return again
        if leaf.is_leaf or not leaf.requires_grad:
            return SHARED
        return Lost(f"{type(leaf.grad_fn).__name__}, of a forward pass that was not seen")

    def _layout_of_memory(self, leaf: Tensor) -> Layout | None:
        """The layout of a tensor with the same memory: a checkpoint detaches, unseen, what it keeps of an inner one."""
        if not self._again or leaf.layout is not torch.strided:
            return None
        entry = getattr(leaf.untyped_storage(), "_examples", None)
        if entry is None or entry[0] is not self._token or entry[1] != _place_of(leaf):
            return None
        return entry[2]

    def place(self, leaf: Tensor, layout: Layout) -> None:
        """Write down where the examples are in a tensor that a forward pass made."""
        leaf._examples = (self._token, layout)  # type: ignore[attr-defined]
        if self._again and leaf.layout is torch.strided:
            leaf.untyped_storage()._examples = (self._token, _place_of(leaf), layout)  # type: ignore[attr-defined]

    def tracked(self, tensor: Any) -> Tracked | None:
        """What is known of an argument, if it is computed from parameters alone."""
        return self._tracked.get(id(tensor))

    def is_constant(self, *tensors: Tensor | None) -> bool:
        """Whether tensors are parameters, what is computed from these, or constants."""
        return all(tensor is None or self.layout(tensor) is SHARED for tensor in tensors)

    def apart(self, tensor: Tensor, kept: int) -> Apart | None:
        """The layout of a tensor whose vectors belong to an example each.

        Args:
            tensor: A tensor that depends on the batch.
            kept: How many last dimensions a vector has.

        Returns:
            None if it is computed from parameters alone, or its vectors join examples.
        """
        layout = self.layout(tensor)
        if self.tracked(tensor) or not isinstance(layout, Apart) or layout.scaled:
            return None
        if not layout.ends_before(tensor.ndim, kept) or not layout.is_complete:
            return None
        return layout

    def tap(self, output: Tensor, source: Tensor, note: autograd.Note, *tracked: Tracked | None) -> Tensor:
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
        return autograd.tap(output, source, note, roots_of(*tracked))

    def _stand_in(self, leaf: Tensor) -> Tensor:
        return self._stand_ins.get(id(leaf), leaf)

    def _root(self, leaf: Tensor) -> Tensor:
        """What stands for a parameter in the graph: best the parameter."""
        if not leaf._backward_hooks:
            return leaf
        # Hooks of the user's see the complete gradient, or nothing.
        root = leaf.detach().requires_grad_() if self.fate is Fate.DROPPED else leaf.view_as(leaf)
        self._stand_ins[id(leaf)] = root
        return root

    def _gather(self, root: Tensor, source: Source) -> Tracked:
        """A tensor as a source: to what arrives at its place in the graph is added what was recorded of it."""
        edge = get_gradient_edge(root)
        node, place = edge.node, edge.output_nr
        zero = self._zero(root).expand(root.shape)

        def arrive(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            with unseen():
                result = finish.arrived(self, source, root, zero, gradients[place])
            return (*gradients[:place], result, *gradients[place + 1 :])

        # Held as well: the node of a parameter lives no longer than what refers to it.
        self._hooks.append((node, node.register_prehook(arrive)))
        tracked = Tracked(source, root, root, zero)
        self._tracked[id(root)] = tracked
        return tracked

    def _zero(self, like: Tensor) -> Tensor:
        kind = like.dtype, like.device
        if kind not in self._zeros:
            self._zeros[kind] = like.new_zeros(())
        return self._zeros[kind]

    def _met(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], data: dict[int, tuple[Tensor, Layout]]
    ) -> Any:
        """A call in which parameters meet data."""
        if all(leaf.numel() == 0 for leaf, _ in data.values()):
            return func(*args, **kwargs)  # the tokens of an expert that has none: autograd's gradient is zero
        rule = self._rules.get(func) or self._rules.get(name_of(func)) or self._rules[None]
        result = rule(self, func, args, kwargs)
        if result is NotImplemented:
            causes = [layout.cause for _, layout in data.values() if isinstance(layout, (Several, Lost))]
            self.refuse(name_of(func), args, kwargs, *causes[:1])
            result = func(*args, **kwargs)
        return result

    def refuse(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], cause: str = "") -> None:
        """Note of all parameters among arguments that their gradients cannot be taken apart by example."""
        for leaf in leaves_of((*args, *kwargs.values())):
            if id(leaf) in self._tracked:
                self._tracked[id(leaf)].source.refuse(f"{name}, after {cause}" if cause else name)

    def _place(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        data: dict[int, tuple[Tensor, Layout]],
        result: Any,
    ) -> Any:
        """Write down where the examples are in the results of a call."""
        results = list(leaves_of((result,)))
        if name_of(func) == "__setitem__":
            results = [args[0]]
        if not data:
            for leaf in results:
                if leaf.grad_fn is not None and id(leaf) not in self._tracked:
                    self.place(leaf, SHARED)
            return result
        results = [leaf for leaf in results if id(leaf) not in self._tracked and not self._is_placed(leaf, args)]
        if not results:
            return result
        for leaf, layout in zip(results, self.places.of(func, args, kwargs, data, results), strict=True):
            entry = getattr(leaf, "_examples", None)
            mine = entry is not None and entry[0] is self._token
            if not mine and any(leaf is given for given in leaves_of((*args, *kwargs.values()))):
                self._given[id(leaf)] = (leaf, layout)
            else:
                self.place(leaf, layout)
        return result

    def _is_placed(self, leaf: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether a rule made of further calls, which were seen, returned a tensor."""
        entry = getattr(leaf, "_examples", None)
        if entry is None or entry[0] is not self._token:
            return False
        return all(leaf is not given for given in leaves_of(args))

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call in which parameters meet no data: a view of a parameter, or something computed from parameters."""
        leaves = list(leaves_of((*args, *kwargs.values())))
        parents = tuple({id(leaf): self._tracked[id(leaf)] for leaf in leaves if id(leaf) in self._tracked}.values())
        if is_in_place(func) or func in DROPOUT:
            self.refuse(name_of(func), args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        for index, leaf in enumerate([result] if isinstance(result, Tensor) else list(leaves_of((result,)))):
            if not leaf.requires_grad or id(leaf) in self._tracked:
                continue
            if len(parents) == 1 and is_view(leaf, parents[0].tensor):
                again = as_function(func, args, kwargs, parents[0].tensor)
                view = again if isinstance(result, Tensor) else _part_of(again, index)
                self._tracked[id(leaf)] = replace(parents[0], tensor=leaf, views=(*parents[0].views, view))
            elif isinstance(result, Tensor):
                again = as_function(func, args, kwargs, *(parent.tensor for parent in parents))
                self._gather(leaf, Source(None, leaf.shape, parents, again, _call_of(func, args, kwargs, parents)))
            else:
                self.refuse(name_of(func), args, kwargs)
        return result

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A backward pass, in which layers under a checkpoint are computed again, and have to be seen again."""
        _require_once(kwargs.get("create_graph", False))
        roots = list(leaves_of(args[:1] if args else (kwargs.get("tensors", ()),)))
        for root in roots:
            layout = self.layout(root)
            if isinstance(layout, Lost):
                self.joined = self.joined or f"{layout.cause}, hides where they are"
            if isinstance(layout, Several) and not layout.additive:
                self.joined = self.joined or f"{layout.cause} joins them"
        before, self._again = self._again, True
        try:
            with self:
                return _BACKWARD[func](*args, **kwargs)
        finally:
            self._again = before

    def _grad(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gradients of something other than parameters: what is recorded on the way is forgotten."""
        _require_once(kwargs.get("create_graph", False))
        inputs = list(leaves_of(args[1:2] or (kwargs.get("inputs", ()),)))
        if any(id(leaf) in self._tracked or id(leaf) in self._stand_ins for leaf in inputs):
            raise DerivativeError(
                "torch.autograd.grad by parameters, inside a block in which noise is measured: call backward(), or "
                "compute these gradients outside of the block"
            )
        sources = [tracked.source for tracked in self._tracked.values()]
        before = [list(source.uses) for source in sources]
        with self:
            result = _GRAD(*args, **kwargs)
        for source, uses in zip(sources, before, strict=True):
            source.uses = uses
        return result


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _require_once(create_graph: bool) -> None:
    if create_graph:
        raise DerivativeError(
            "the loss takes derivatives of the model (create_graph=True), inside a block in which noise is measured. "
            "Use estimate_noise(exact=True), or MicrobatchMeter"
        )


def _call_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parents: tuple[Tracked, ...]
) -> Call | None:
    """A linear map of constants, or places of a table, that may have a row for each example."""
    index = {id(parent.tensor): number for number, parent in enumerate(parents)}
    if name_of(func) in ("expand", "broadcast_to", "repeat", "expand_as") and len(parents) == 1:
        return Call("expand", parents[0].tensor, 0)
    if func is functional.linear and not kwargs and id(args[0]) not in index and id(args[1]) in index:
        bias = index.get(id(args[2])) if len(args) > 2 and args[2] is not None else None
        return Call("linear", args[0], index[id(args[1])], bias)
    plain = func is functional.embedding and all(not kwargs.get(k) for k in ("max_norm", "sparse", "scale_grad_by_freq"))
    if plain and len(args) > 1 and id(args[1]) in index and len(args) == 2 and kwargs.get("padding_idx") is None:
        return Call("table", args[0], index[id(args[1])])
    return None


def _part_of(function: Any, index: int) -> Any:
    """One of several views that a function returns."""
    return lambda tensor: list(leaves_of((function(tensor),)))[index]

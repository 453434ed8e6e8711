"""A forward pass in which every use of a trained parameter is recorded, and a backward pass that collects statistics.

Parameters are recognised by identity wherever PyTorch functions meet them, so that tied weights, modules used several
times, slices of packed projections and parameters of hand-written layers are treated alike. Nothing is attached to the
model. Every tensor that depends on the batch carries a layout: which entries belong to which example.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from noetherflow.noise.buffers import Buffers
from noetherflow.noise.capture import autograd, backward, finish
from noetherflow.noise.capture.calls import (
    WITH_DROPOUT,
    FunctionCall,
    is_detached,
    leaves_of,
    mapped,
    name_of,
    unseen,
    without_dropout,
)
from noetherflow.noise.capture.derived import derive
from noetherflow.noise.capture.layouts import SHARED, Apart, Layout, Lost, Several
from noetherflow.noise.capture.marks import Marks
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.capture.sink import GradientSink
from noetherflow.noise.capture.sources import Source, Tracked, roots_of

# What says something about a tensor and is no tensor: requested all the time.
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_nested")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")),
}


class Rule(Protocol):
    """What to do about a call of a function in which parameters meet data."""

    def __call__(self, capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the call, or NotImplemented."""


@final
class Capture(TorchFunctionMode):
    """The mode under which a forward pass runs.

    Args:
        params: Trained parameters by name; of these, every use is recorded.
        buffers: Where the backward pass accumulates the statistics of all parameters.
        places: Where examples are in results; it serves for all steps with as many examples.
        batch: The tensors of the batch that have an entry per example.
        rules: What to do about each function that meets a parameter and data.
        sink: Where the sums of the parameters' gradients go.
        without_dropout: Leave out dropout.
        keep_sums: Keep the sum of the gradients of the examples of each parameter, wherever the gradient goes.

    Attributes:
        gradients: The sum of the gradients of each parameter that was reached, if it is kept, or None.
        sums: These sums, in the dtype in which they are formed, without what is no example's; None if not kept.
        refused: After the block: the parameters whose gradients cannot be taken apart by example, with the cause.
        joined: What joined the examples in front of the backward pass; empty if each has a loss of its own.
        summed: Whether a backward pass began at a bare sum over the examples, and not at their mean.
        met: Whether a tensor of the batch met a parameter.
        vectors: The gradients of vectors, which are squared together when the block ends: few operations.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        buffers: Buffers,
        places: Places,
        batch: Iterable[Tensor],
        rules: Mapping[Any, Rule],
        *,
        sink: GradientSink,
        without_dropout: bool = False,
        keep_sums: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.places, self.sink = places.size, places, sink
        self.buffers = buffers
        self.gradients: dict[str, Tensor | None] = {}
        self.sums: dict[str, Tensor] | None = {} if keep_sums else None
        self.refused: dict[str, str] = {}
        self.joined = ""
        self.met = self.summed = False
        self.vectors: list[tuple[str, Tensor, Tensor]] = []
        self._rules, self._without_dropout, self._params = rules, without_dropout, params
        self.marks = Marks(batch, self.size)
        self._tracked: dict[int, Tracked] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._depth = 0

    def __enter__(self) -> "Capture":
        """Enter the mode, once more if it is active."""
        if not self._depth:
            # All at once, not when the forward pass meets them: code between large products is out of the cache.
            with torch.enable_grad():
                for name, leaf in self._params.items():
                    if leaf.requires_grad:  # it may have been frozen in the meantime
                        self.gather(self._root(leaf), Source(name, leaf.shape))
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
            if self.vectors and raised[0] is None:
                with torch.no_grad():
                    self.buffers.add_vectors(self.vectors)
            for source in self.sources():
                if source.name is not None and source.refused and source.arrived:
                    self.refused[source.name] = source.refused
                source.uses.clear()  # of a backward pass that was broken off
            for _, hook in self._hooks:
                hook.remove()
            for kept in (self._hooks, self.marks, self._tracked, self._stand_ins, self.vectors):
                kept.clear()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See to a call."""
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*args, **kwargs)
        if func in backward.BACKWARD_PASSES:
            return backward.run(self, func, args, kwargs)
        leaves = list(leaves_of((*args, *kwargs.values())))
        tracked = any(map(self.is_tracked, leaves))
        data: dict[int, tuple[Tensor, Layout]] = {}
        for leaf in leaves:
            layout = self.layout(leaf)
            if layout is not SHARED:
                data[id(leaf)] = (leaf, layout)
        if self._without_dropout and func in WITH_DROPOUT:
            result = without_dropout(func, args, kwargs)
        elif not tracked or not torch.is_grad_enabled() or is_detached(func):
            result = func(*args, **kwargs)
        else:
            if self._stand_ins:
                args, kwargs = mapped(self._stand_in, args), mapped(self._stand_in, kwargs)
            if not data:
                return derive(self, func, args, kwargs)
            self.met = True
            result = self._met(func, args, kwargs, data)
        return self._place(func, args, kwargs, data, result)

    def layout(self, leaf: Tensor) -> Layout:
        """Where the examples are in an argument."""
        return SHARED if self.is_tracked(leaf) else self.marks.layout(leaf)

    def track(self, tracked: Tracked) -> None:
        """Recognise a tensor computed from parameters alone."""
        self._tracked[id(tracked.tensor)] = tracked

    def is_tracked(self, leaf: Tensor) -> bool:
        """Whether an argument is a parameter, or computed from parameters alone."""
        return id(leaf) in self._tracked or id(leaf) in self._stand_ins

    def sources(self) -> list[Source]:
        """The parameters, and what was computed from these."""
        return list({id(tracked.source): tracked.source for tracked in self._tracked.values()}.values())

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
        root = leaf.detach().requires_grad_() if self.sink is GradientSink.DROPPED else leaf.view_as(leaf)
        self._stand_ins[id(leaf)] = root
        return root

    def gather(self, root: Tensor, source: Source) -> None:
        """A tensor as a source: to what arrives at its place in the graph is added what was recorded of it."""
        edge = get_gradient_edge(root)
        node, place = edge.node, edge.output_nr
        zero = self._zero(root).expand(root.shape)

        def arrive(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            with unseen():
                result = finish.arrived(self, source, root, zero, gradients[place])
            return (*gradients[:place], result, *gradients[place + 1 :])

        # Held as well: the node of a parameter lives no longer than what refers to it.
        self._hooks.append((edge, node.register_prehook(arrive)))
        self.track(Tracked(source, root, root, zero))

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
                if leaf.grad_fn is not None and not self.is_tracked(leaf):
                    self.marks.place(leaf, SHARED)
            return result
        # A rule made of further calls, which were seen, returns a tensor that has its layout.
        results = [leaf for leaf in results if not self.is_tracked(leaf) and not self._is_made_by_rule(leaf, args)]
        if results:
            call = FunctionCall(func, args, kwargs, data)
            for leaf, layout in zip(results, self.places.of(call, results), strict=True):
                self.marks.place_result(leaf, layout, (*args, *kwargs.values()))
        return result

    def _is_made_by_rule(self, leaf: Tensor, args: tuple[Any, ...]) -> bool:
        return self.marks.is_placed(leaf) and all(leaf is not given for given in leaves_of(args))

"""The computation of a model's loss as a graph of operations without side effects."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from noetherflow._batch import tensors_of, with_tensors
from noetherflow._errors import TraceError
from noetherflow._params import aliases
from noetherflow._types import Batch, Loss
from noetherflow.detect.rules import RULES

BY_HAND = (
    "so its symmetries cannot be found; they can still be declared by hand with nf.Axis, and nf.verify_symmetry proves "
    "them"
)


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """Operations in the order in which they run, and their inputs.

    Args:
        module: The graph, and the graphs inside it.
        parameters: The canonical name of the parameter behind each input, by the name of the input.
        values: Batch, buffers and other constants, by the name of the input.
        varying: The inputs whose values change: the batch, and floating-point buffers.
    """

    module: fx.GraphModule
    parameters: dict[str, str]
    values: dict[str, Tensor]
    varying: frozenset[str]

    @property
    def unreached(self) -> set[str]:
        """The parameters that the loss does not depend on."""
        inputs = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        named = {node: self.parameters[node.name] for node in inputs if node.name in self.parameters}
        return set(named.values()) - {name for node, name in named.items() if node.users}


def trace(model: nn.Module, loss: Loss, batch: Batch) -> Graph:
    """Export the loss of a batch, in the mode in which the model is, without running it.

    Operations that have no exponent rule are taken apart into simpler operations, as far as PyTorch can. Writes in
    place are replaced by operations that return new tensors, also writes through views.

    Returns:
        The graph.

    Raises:
        TraceError: If that is not possible.
    """
    # The forward pass of DistributedDataParallel cannot be exported. It is that of the module inside.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    try:
        with _quiet(), _checkpoints_as_calls(), torch.enable_grad():
            program = torch.export.export(_Holder(inner, loss, batch), tuple(tensors_of(batch)), strict=False)
            _mark_regions_without_gradients(program.graph_module)
            _separate_shared_buffers(program)
            program = program.run_decompositions(_decompositions())
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TraceError(
            f"the computation of this model cannot be written down as a graph ({type(error).__name__}: "
            f"{reason[:200]}), {BY_HAND}"
        ) from error
    _keep_the_loss(program)
    canonical, prefix = aliases(model), "" if inner is model else "module."
    parameters, values, varying = {}, {}, set()
    user = iter(tensors_of(batch))
    for spec in program.graph_signature.input_specs:
        name, target = getattr(spec.arg, "name", ""), spec.target or ""
        if spec.kind is InputKind.PARAMETER:
            parameters[name] = canonical[prefix + target.removeprefix("model.")]
        elif spec.kind is InputKind.USER_INPUT:
            values[name] = next(user)
            varying.add(name)
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            known = program.constants if target in program.constants else program.state_dict
            values[name] = known[target]
            if spec.kind is InputKind.BUFFER and _moves(values[name]):
                varying.add(name)
    return Graph(program.graph_module, parameters, values, frozenset(varying))


def key_of(target: Any) -> str:
    """The name of an operation with its namespace and without overload, such as `aten::add`."""
    namespace = getattr(target, "namespace", "python")
    # An overload is printed as `aten.add.Tensor`, and other functions have plain names.
    parts = str(target).split(".")
    return (
        f"{namespace}::{parts[1] if parts[0] == namespace and len(parts) > 1 else getattr(target, '__name__', target)}"
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions of all operations that have no exponent rule."""
    table = default_decompositions()
    return {target: table[target] for target in list(table) if key_of(target) not in RULES}


def _moves(buffer: Tensor) -> bool:
    """Whether training moves a buffer, such as a running mean that is zero now, or a counter; not masks and indices."""
    return buffer.is_floating_point() or buffer.is_complex() or buffer.ndim == 0


def _mark_regions_without_gradients(module: fx.GraphModule) -> None:
    """Detach the results of regions under `torch.no_grad`, which lose their borders when they are functionalised."""
    for graph in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or key_of(node.target) != "higher_order::wrap_with_set_grad_enabled":
                continue
            if node.args[0]:
                continue
            for result in list(node.users):
                value = result.meta.get("val")
                if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                    continue
                with graph.graph.inserting_after(result):
                    detached = graph.graph.call_function(torch.ops.aten.detach.default, (result,))
                detached.meta = dict(result.meta)
                result.replace_all_uses_with(detached, delete_user_cb=lambda user, kept=detached: user is not kept)
        graph.recompile()


def _separate_shared_buffers(program: ExportedProgram) -> None:
    """Copy a buffer of a module that is used under two names: PyTorch refuses writes to an input of two names."""
    seen: set[int] = set()
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.target in program.state_dict:
            buffer = program.state_dict[spec.target]
            if id(buffer) in seen:
                program.state_dict[spec.target] = buffer.clone()
            seen.add(id(buffer))


def _keep_the_loss(program: ExportedProgram) -> None:
    """Remove all that the loss does not depend on: updates of buffers, assertions, heads that are not used."""
    graph = program.graph_module.graph
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    output = next(node for node in graph.nodes if node.op == "output")
    losses = [node for node, kind in zip(output.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    output.args = (tuple(losses),)
    needed = set(losses)
    for node in reversed(list(graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
        elif node.op not in ("placeholder", "output"):
            graph.erase_node(node)


class _Holder(nn.Module):
    """The loss of a batch as a function of its tensors."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self._rest: tuple[Callable[..., Any], Batch] = (loss, batch)

    def forward(self, *tensors: Tensor) -> Tensor:
        loss, batch = self._rest
        losses: Tensor = loss(self.model, with_tensors(batch, list(tensors)))
        return losses


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporter does not write messages about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _checkpoints_as_calls() -> Iterator[None]:
    """A block in which a reentrant checkpoint calls its function, so that no region without gradients is seen."""

    def called(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)

    CheckpointFunction.apply = staticmethod(called)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply  # The method of torch.autograd.Function is inherited again.

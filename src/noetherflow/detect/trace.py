"""The computation of a model's loss as a graph of operations."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.nn.parallel import DistributedDataParallel

from noetherflow._batch import tensors_of, with_tensors
from noetherflow._errors import TraceError
from noetherflow._params import aliases
from noetherflow._types import Batch, Loss


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """Operations in the order in which they run, and what goes into them.

    Args:
        module: Holds the graph, and the graphs inside it.
        parameters: The canonical name of the parameter behind each input, by the name of the input.
        values: Batch, buffers and other constants, by the name of the input.
        of_batch: The inputs that are the batch.
    """

    module: fx.GraphModule
    parameters: dict[str, str]
    values: dict[str, Tensor]
    of_batch: frozenset[str]

    @property
    def unreached(self) -> set[str]:
        """The parameters that the loss does not depend on."""
        inputs = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        named = {node: self.parameters[node.name] for node in inputs if node.name in self.parameters}
        return set(named.values()) - {name for node, name in named.items() if node.users}


def trace(model: nn.Module, loss: Loss, batch: Batch) -> Graph:
    """Export the loss of a batch, in the mode in which the model is, without running it.

    Returns:
        The graph.

    Raises:
        TraceError: If that is not possible.
    """
    # The forward pass of DistributedDataParallel cannot be exported. It is that of the module inside.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    holder = _Holder(inner, loss, batch)
    try:
        with _quiet(), torch.enable_grad():
            program = torch.export.export(holder, tuple(tensors_of(batch)), strict=False)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TraceError(
            f"the computation of this model cannot be written down as a graph ({type(error).__name__}: "
            f"{reason[:200]}), so its symmetries cannot be found; they can still be declared by hand with nf.Axis, and "
            "nf.verify_symmetry proves them"
        ) from error
    # What the loss does not depend on, such as an unused head, constrains nothing.
    program.graph_module.graph.eliminate_dead_code()
    canonical, prefix = aliases(model), "" if inner is model else "module."
    parameters, values, of_batch = {}, {}, set()
    user = iter(tensors_of(batch))
    for spec in program.graph_signature.input_specs:
        name, target = getattr(spec.arg, "name", ""), spec.target or ""
        if spec.kind is InputKind.PARAMETER:
            parameters[name] = canonical[prefix + target.removeprefix("model.")]
        elif spec.kind is InputKind.USER_INPUT:
            values[name] = next(user)
            of_batch.add(name)
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            known = program.constants if target in program.constants else program.state_dict
            values[name] = known[target]
    return Graph(program.graph_module, parameters, values, frozenset(of_batch))


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
    """What the exporter says while it works is about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

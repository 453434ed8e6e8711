"""Tensors that a loss reaches by another road than the attributes of the model's modules.

`functional_call` puts other values of a parameter in the place of the attribute of its module. A forward pass that
reaches the parameter through a list, a closure or `functools.partial` does not see these values. A tensor that requires
gradients and is no parameter, such as the weight of a layer in a Python list, is trained, and no name leads to it.
"""

from collections.abc import Collection, Iterable
from typing import Any, final

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noetherflow._autograd import is_reentrant, nodes_of
from noetherflow._batch import tensors_of
from noetherflow._precision import tensors_within
from noetherflow._types import Batch


@final
class OtherRoads(TorchFunctionMode):
    """A block that watches which tensors a loss reads while other tensors are in the places of the parameters.

    Memory tells tensors apart: the tensors in the places of the parameters are copies, so a call that reads the memory
    of a parameter itself has reached it by another road.

    Args:
        model: The model.
        batch: The batch; a tensor of the batch that requires gradients is no weight.
        leaves: The tensors in the places of the parameters.

    Attributes:
        has_cond: Whether torch.cond is called.
    """

    def __init__(self, model: nn.Module, batch: Batch, leaves: Iterable[Tensor]) -> None:
        super().__init__()
        memory = {_memory(tensor): name for name, tensor in reversed(list(model.named_parameters()))}
        self._names = {key: name for key, name in memory.items() if key}
        # What is given, and what the block computes. Weights of other roads exist before the block begins.
        self._known = {_memory(tensor) for tensor in (*tensors_of(batch), *leaves)}
        self._read: dict[int, Tensor] = {}
        self.has_cond = False

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and collect the tensors that it reads."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = tensors_within(result)
        self.has_cond |= getattr(func, "__name__", "") == "cond"
        if results:
            self._collect(tensors_within(_whose_numbers_count(func, args, kwargs)))
            self._known |= {_memory(tensor) for tensor in results}
        return result

    def of(self, losses: Tensor) -> "Roads":
        """What the graph of the losses holds, and what was read without a gradient."""
        nodes: Collection[Any] = nodes_of(losses.grad_fn) if losses.grad_fn is not None else ()
        without_gradient = set(self._read)
        self._collect([node.variable for node in nodes if hasattr(node, "variable")])
        in_graph = {_memory(node.variable) for node in nodes if hasattr(node, "variable")}
        if is_reentrant(nodes):
            # The graph inside a reentrant checkpoint does not exist before the backward pass.
            in_graph |= without_gradient
        named = {key: self._names[key] for key in self._read if key in self._names}
        return Roads(
            parameters=[name for key, name in named.items() if key in in_graph],
            detached=[name for key, name in named.items() if key not in in_graph],
            unregistered=[tensor for key, tensor in self._read.items() if key not in named and key in in_graph],
        )

    def _collect(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            key = _memory(tensor)
            is_weight = key in self._names or (tensor.requires_grad and tensor.is_leaf and key not in self._known)
            if key and is_weight:
                self._read.setdefault(key, tensor)


@final
class Roads:
    """Tensors that a loss reaches by another road.

    Attributes:
        parameters: The names of parameters of the model through which gradients flow by another road.
        detached: The names of parameters whose memory is read by another road without gradients, such as by `.data`.
        unregistered: Tensors that require gradients and are no parameters of the model.
    """

    def __init__(self, parameters: list[str], detached: list[str], unregistered: list[Tensor]) -> None:
        self.parameters = parameters
        self.detached = detached
        self.unregistered = unregistered


def _whose_numbers_count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of which a function reads more than the shape, the dtype and the device."""
    name = getattr(func, "__name__", "")
    if name.endswith("_like") or name.startswith("new_"):
        return ()
    return args[:1] if name.endswith("_as") or name == "to" else (args, kwargs)


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 for tensors without memory, such as those on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        # A tensor of several tensors (sparse), or a wrapper (vmap).
        return 0

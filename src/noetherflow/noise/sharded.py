"""Models whose parameters are sharded by FSDP2: what can be measured there, and where local gradients are seen."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeGuard, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from noetherflow._errors import SettingsError
from noetherflow._params import aliases

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# What is called with the gradients that arrive at a parameter.
Note = Callable[[str, tuple[Tensor | None, ...]], None]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a part of a larger tensor, here and on other ranks."""
    # A sharded tensor has loaded the module; for all other models, half a second is saved.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was called with."""
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [each for each in model.modules() if isinstance(each, module.FSDPModule)]


def complete(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the complete shape of each parameter, its dtype and device; of a sharded parameter without memory.

    Returns:
        Tensors by name: the parameters, or tensors of zeros.
    """
    return {name: _stand_in(p) if is_sharded(p) else p for name, p in params.items()}


def _stand_in(parameter: "DTensor") -> Tensor:
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device_mesh.device_type).expand(parameter.shape)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its entries, on every rank; if it is sharded, all ranks have to come here."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def require_unsharded(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Raise if the gradients of single examples cannot be seen, because parameters are sharded.

    Raises:
        SettingsError: If a parameter is sharded.
    """
    _require_known(model)
    if sharded_modules(model) or any(map(is_sharded, params.values())):
        raise SettingsError(
            "the parameters of the model are sharded (FSDP2 or DTensor), and the gradients of single examples are "
            "taken apart where parameters are complete. Use MicrobatchMeter(model, symmetries, group=...), which sees "
            "the gradient of each rank before the reduce-scatter"
        )


def require_data_parallel(model: nn.Module, params: Mapping[str, Tensor], group: "dist.ProcessGroup | None") -> None:
    """Raise if ranks share the computation of an example.

    Raises:
        SettingsError: If a parameter is sharded otherwise than by FSDP2, or the ranks that share it are not those of
            the group.
    """
    _require_known(model)
    within = {id(p) for module in sharded_modules(model) for p in module.parameters()}
    for name, parameter in params.items():
        if not is_sharded(parameter):
            continue
        mesh, (*before, last) = parameter.device_mesh, parameter.placements
        if id(parameter) not in within or not last.is_shard() or not all(p.is_replicate() for p in before):
            raise SettingsError(
                f"{name!r} is a DTensor with placements {parameter.placements} over {_described(mesh)}, and only "
                "those of data parallelism are measured: fully_shard over all dimensions of a mesh whose ranks have "
                "examples of their own. Under tensor parallelism several ranks share an example; measure on a copy of "
                "the model without it"
            )
        if group is not None and dist.get_world_size(group) != mesh.size():
            raise SettingsError(
                f"{name!r} is sharded over {_described(mesh)}, and the group has {dist.get_world_size(group)} ranks: "
                "give the group of all ranks of the mesh"
            )


def _described(mesh: "DeviceMesh") -> str:
    names = f" {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
    return f"a mesh{names} of {mesh.size()} ranks"


def _require_known(model: nn.Module) -> None:
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for name, each in model.named_modules():
        if isinstance(each, module.FullyShardedDataParallel):
            raise SettingsError(
                f"{name or 'the model'!r} is wrapped in FullyShardedDataParallel, which joins parameters to flat "
                "vectors without names: shard it by torch.distributed.fsdp.fully_shard, and use MicrobatchMeter"
            )


@final
class Arrivals:
    """Sees the gradients of a model's parameters on their way into `.grad`, before ranks are averaged.

    That of a complete parameter is seen at its node of the graph. The complete parameter of FSDP2 exists while the
    module that shards it computes: it is looked for when the forward pass of such a module begins, after the hook that
    puts it there.

    Args:
        model: The model.
        trained: The parameters, by name.
        note: Called with a name and a tuple with the gradient.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, Tensor], note: Note) -> None:
        self._model, self._trained, self._note = model, trained, note
        self._known: dict[str, Tensor] = {}
        # Where gradients go into .grad: a node exists only as long as somebody holds it.
        self._nodes: list[Node] = []
        self._handles: list[RemovableHandle] = []
        self._parts: dict[str, Tensor] = {}
        self._empty: set[str] = set()
        self._at_parts: set[str] = set()
        self._canonical = aliases(model)
        self._look(model, "")
        if not (sharded := sharded_modules(model)):
            return
        prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        for module in sharded:
            look = partial(self._before_forward, prefixes[module])
            self._handles.append(module.register_forward_pre_hook(look))

    @property
    def missed(self) -> list[str]:
        """The sharded parameters that got a gradient which was not seen."""
        hidden = [n for n, p in self._parts.items() if n in self._empty - self._known.keys() and p.grad is not None]
        return [name for name in self._trained if name in self._at_parts or name in hidden]

    def remove(self) -> None:
        """See no more gradients, and hold on to nothing."""
        for handle in self._handles:
            handle.remove()
        for kept in (self._handles, self._nodes, self._known, self._parts):
            kept.clear()

    def _before_forward(self, prefix: str, module: nn.Module, _: object) -> None:
        self._look(module, prefix)

    def _look(self, module: nn.Module, prefix: str) -> None:
        for suffix, parameter in module.named_parameters(remove_duplicate=False):
            name = self._canonical[prefix + suffix]
            if name not in self._trained or not parameter.requires_grad:
                continue
            if not is_sharded(parameter):
                if self._known.get(name) is not parameter:
                    self._known[name] = parameter
                    self._watch(parameter, partial(self._note, name))
            elif name not in self._parts:
                # FSDP2 writes .grad without the graph; what goes through the graph belongs to a DTensor that computes.
                self._parts[name] = parameter
                if parameter.grad is None:
                    self._empty.add(name)
                self._watch(parameter, partial(self._note_part, name))

    def _note_part(self, name: str, _: tuple[Tensor | None, ...]) -> None:
        self._at_parts.add(name)

    def _watch(self, parameter: Tensor, note: Callable[[tuple[Tensor | None, ...]], None]) -> None:
        node = get_gradient_edge(parameter).node
        self._nodes.append(node)
        self._handles.append(node.register_prehook(note))

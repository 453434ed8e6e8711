"""Walks through a graph and collects what every operation says about the exponents."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow._errors import TraceError
from noetherflow.detect.call import Call, scaled_in, values
from noetherflow.detect.exponents import Equations, Joint, Scaled
from noetherflow.detect.rules import apply
from noetherflow.detect.trace import Graph

# Regions that change how a computation is done or differentiated, but not its exponents.
_REGIONS = {"wrap_with_autocast", "wrap_with_set_grad_enabled", "tag_activation_checkpoint"}


def walk(graph: Graph, trainable: Mapping[str, bool], *, tolerant: bool = False) -> Equations:
    """All equations between the exponents of the trainable parameters of a graph.

    Args:
        graph: The computation of the loss.
        trainable: Every parameter, and whether it may move.
        tolerant: Whether small numbers that keep others from zero may be taken for nothing.

    Returns:
        The equations.
    """
    joints: frozenset[Joint] = frozenset()
    while True:
        equations = Equations(tolerant=tolerant, joints=joints)
        _Walk(graph, trainable, equations).run()
        if equations.wanted <= joints:
            return equations
        joints |= equations.wanted


class _Walk:
    """One walk, with what every node has returned."""

    def __init__(self, graph: Graph, trainable: Mapping[str, bool], equations: Equations) -> None:
        self._graph = graph
        self._trainable = trainable
        self._equations = equations
        self._found: dict[fx.Node, Any] = {}

    def run(self) -> None:
        inputs = [node for node in self._graph.module.graph.nodes if node.op == "placeholder"]
        for x in scaled_in(self._follow(self._graph.module, [self._input(node) for node in inputs])):
            self._equations.vanish(x.terms, "the loss")

    def _follow(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """What a graph returns."""
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._found[node] = next(given)
            elif node.op == "get_attr":
                self._found[node] = operator.attrgetter(str(node.target))(module)
            elif node.op == "call_function":
                self._found[node] = self._call(node)
        return self._resolved(next(node for node in module.graph.nodes if node.op == "output").args[0])

    def _enter(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """What a region returns that the exporter keeps as a graph inside the graph."""
        name = _name(node)
        if name not in _REGIONS:
            raise TraceError(
                f"the computation of this model has a part that is itself a graph ({name}), about which nothing is "
                "known, so its symmetries cannot be found; replace torch.cond, torch.while_loop and the like by plain "
                "PyTorch, or declare symmetries by hand with nf.Axis, and nf.verify_symmetry proves them"
            )
        position = next(index for index, one in enumerate(args) if isinstance(one, fx.GraphModule))
        module, inputs = args[position], args[position + 1 :]
        result = self._follow(module, inputs)
        placeholders = [one for one in module.graph.nodes if one.op == "placeholder"]
        for outer, inner in zip(node.args[position + 1 :], placeholders, strict=True):
            if isinstance(outer, fx.Node):
                self._found[outer] = self._found[inner]  # written into, perhaps
        return result

    def _input(self, node: fx.Node) -> Scaled:
        if node.name in self._graph.parameters:
            name, shape = self._graph.parameters[node.name], tuple(node.meta["val"].shape)
            # One that is frozen does not scale, and is not known to be anything in particular either.
            return self._equations.parameter(name, shape) if self._trainable[name] else Scaled(shape)
        value = self._graph.values[node.name].detach().clone()
        return Scaled(tuple(value.shape), value=value, of_batch=node.name in self._graph.of_batch)

    def _call(self, node: fx.Node) -> Any:
        name = _name(node)
        in_place = name.endswith("_") and not name.endswith("__")
        if not (node.users or in_place):
            return None
        args, kwargs = self._resolved(node.args), self._resolved(dict(node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        if any(isinstance(one, fx.GraphModule) for one in (*args, *kwargs.values())):
            return self._enter(node, args)
        given = scaled_in((args, kwargs))
        if all(x.constant for x in given):
            with torch.no_grad():
                value = node.target(*values((args, kwargs))[0], **values(kwargs))  # type: ignore[operator]
            return _constants(value, any(x.of_batch for x in given))
        call = Call(
            name=name.removesuffix("_") if in_place else name,
            target=getattr(torch.ops.aten, name.removesuffix("_")) if in_place else node.target,  # type: ignore[arg-type]
            args=tuple(args),
            kwargs=kwargs,
            shapes=_shapes(node.meta.get("val")),
            reason=_reason(name, node),
            equations=self._equations,
            summed=[_name(user) for user in node.users] in (["sum"], ["mean"]),
        )
        result = apply(call)
        if in_place and isinstance(node.args[0], fx.Node):
            self._found[node.args[0]] = result
        return result

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._found[value]
        if isinstance(value, dict):
            return {key: self._resolved(one) for key, one in value.items()}
        return (
            type(value)(self._resolved(one) for one in value)
            if type(value) in (list, tuple)
            else ([self._resolved(one) for one in value] if isinstance(value, (list, tuple)) else value)
        )


def _constants(value: Any, of_batch: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [_constants(one, of_batch) for one in value]
    if not isinstance(value, Tensor):
        return value
    return Scaled(tuple(value.shape), value=value, of_batch=of_batch)


def _shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(tuple(one.shape) for one in values if isinstance(one, Tensor))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _reason(name: str, node: fx.Node) -> str:
    """The operation, and the module in whose forward it stands."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    where = path.removeprefix("L['self'].").removeprefix("model").removeprefix(".")
    return f"{name} ({where})" if where else name

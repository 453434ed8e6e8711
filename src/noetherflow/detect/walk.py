"""Walks through a graph and collects what every operation demands of the exponents."""

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from noetherflow._errors import NoetherflowError, TraceError
from noetherflow.detect.choices import Choice, apply_to_choices, choices_in
from noetherflow.detect.demands import Demands
from noetherflow.detect.exponents import ScalingExponents
from noetherflow.detect.operation import Operation, exponents_of, mapped, opaque, tensors_in, values_of
from noetherflow.detect.rules import RULES
from noetherflow.detect.rules.experts import GROUPED
from noetherflow.detect.rules.registry import Rule
from noetherflow.detect.trace import BY_HAND, Graph, key_of
from noetherflow.detect.unknowns import Stack, Unknowns


def walk(graph: Graph, parameters: Mapping[str, torch.nn.Parameter], *, tolerant: bool = False) -> Demands:
    """All demands on the exponents of the trainable parameters of a graph.

    Args:
        graph: The computation of the loss.
        parameters: The parameters of the model by canonical name.
        tolerant: Whether small numbers, such as the eps of a normalisation, are ignored.

    Returns:
        The demands.
    """
    stacks: frozenset[Stack] = frozenset()
    while True:
        demands = Demands(Unknowns(stacks), tolerant=tolerant)
        _Walk(graph, parameters, demands).run()
        # A stack of matrices is recognised where it is used, and then needs more unknowns from the beginning.
        if demands.unknowns.requested <= stacks:
            return demands
        stacks |= demands.unknowns.requested


class _Walk:
    """One walk, with the exponents of what every node has returned."""

    def __init__(self, graph: Graph, parameters: Mapping[str, torch.nn.Parameter], demands: Demands) -> None:
        self._graph = graph
        self._parameters = parameters
        self._demands = demands
        self._results: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self._graph.module.graph.nodes:
            if node.op == "placeholder":
                self._results[node] = self._input(node)
            elif node.op == "get_attr":
                self._results[node] = operator.attrgetter(str(node.target))(self._graph.module)
            elif node.op == "call_function":
                self._results[node] = self._call(node)
            elif node.op == "output":
                result = self._resolved(node.args[0])
                variants = [choice.variants for choice in choices_in(result)]
                for x in tensors_in((result, variants)):
                    self._demands.vanish(x.terms, "the loss")

    def _input(self, node: fx.Node) -> ScalingExponents | None:
        if node.name in self._graph.parameters:
            name = self._graph.parameters[node.name]
            parameter = self._parameters[name]
            shape = tuple(parameter.shape)
            if parameter.requires_grad:
                return self._demands.unknowns.parameter(name, shape)
            # Frozen numbers do not scale, but may be others in another checkpoint. Frozen indices and masks are known.
            discrete = not (parameter.is_floating_point() or parameter.is_complex())
            return ScalingExponents(shape, value=parameter.detach().cpu() if discrete else None)
        if node.name not in self._graph.values:
            return None
        value = self._graph.values[node.name].detach().cpu().clone()
        return ScalingExponents(tuple(value.shape), value=value, varies=node.name in self._graph.varying)

    def _call(self, node: fx.Node) -> Any:
        key = key_of(node.target)
        args, kwargs = self._resolved(node.args), self._resolved(dict(node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        tensors = tensors_in((args, kwargs))
        if not choices_in((args, kwargs)) and all(x.constant for x in tensors):
            return self._constant(node, key, args, kwargs, varies=any(x.varies for x in tensors))
        value = node.meta.get("val")
        if key == "aten::sym_size":
            return exponents_of(args[0]).shape[args[1]]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._number(node, key, tensors)
        several = isinstance(value, (list, tuple))
        values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        results = [each for each in values if isinstance(each, Tensor)]
        operation = Operation(
            key=key,
            target=node.target,  # type: ignore[arg-type]
            args=tuple(args),
            kwargs=kwargs,
            shapes=self._shapes(node, results),
            dtypes=tuple(each.dtype for each in results),
            reason=_reason(key, node),
            demands=self._demands,
            summed=[key_of(user.target) for user in node.users] in (["aten::sum"], ["aten::mean"]),
            several=several,
        )
        try:
            return _apply(RULES.get(key, opaque), operation)
        except NoetherflowError:
            raise
        except Exception as error:
            # What a rule has demanded so far stays: more demands are never wrong.
            warnings.warn(
                f"{operation.reason}: the exponent rule of {key} failed ({type(error).__name__}: {error}), so nothing "
                "scales through this operation. Symmetries may be missing",
                stacklevel=2,
            )
            return _apply(opaque, operation)

    def _shapes(self, node: fx.Node, results: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """The shapes of results; where a mask decides, those of this mask."""
        if all(isinstance(size, int) for each in results for size in each.shape):
            return tuple(tuple(each.shape) for each in results)
        tensors = [source for source in node.all_input_nodes if isinstance(self._results[source], ScalingExponents)]
        unknown = [source for source in tensors if not self._results[source].constant]
        decides = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
        if choices_in([self._results[source] for source in node.all_input_nodes]) or (
            decides and (unknown == tensors or any(_is_discrete(source) for source in unknown))
        ):
            raise TraceError(
                f"{_reason(key_of(node.target), node)}: the shape of a tensor in this computation depends on values "
                f"that parameters enter, {BY_HAND}"
            )
        blank = {source: torch.zeros(self._results[source].shape, dtype=source.meta["val"].dtype) for source in unknown}
        args, kwargs = self._values(node.args, blank), self._values(dict(node.kwargs), blank)
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        given = value if isinstance(value, (list, tuple)) else [value]
        return tuple(tuple(each.shape) for each in given if isinstance(each, Tensor))

    def _values(self, value: Any, blank: Mapping[fx.Node, Tensor]) -> Any:
        """Nested arguments with numbers for all tensors."""

        def number(each: Any) -> Any:
            if not isinstance(each, fx.Node):
                return each
            return blank[each] if each in blank else values_of(self._results[each])

        return mapped(number, value)

    def _number(self, node: fx.Node, key: str, tensors: Sequence[ScalingExponents]) -> ScalingExponents:
        """A Python number that is read out of a tensor, as by `item`. No gradient passes, so it must not scale."""
        if isinstance(node.meta["val"], torch.SymInt):
            raise TraceError(f"{_reason(key, node)}: a whole number that parameters enter decides on shapes, {BY_HAND}")
        for x in tensors:
            self._demands.vanish(x.terms, f"{_reason('aten::item', node)} lets no gradient pass")
        return ScalingExponents(())

    def _constant(self, node: fx.Node, key: str, args: Any, kwargs: Any, *, varies: bool) -> Any:
        """The value of an operation on constants."""
        with torch.no_grad():
            value = node.target(*values_of(args), **values_of(kwargs))  # type: ignore[operator]
        if key.startswith("aten::empty") or key == "aten::new_empty":
            value = torch.zeros_like(value)  # What nobody has written yet is no number to rely on.
        tags = getattr(node.target, "tags", ())
        return _constants(value, varies or torch.Tag.nondeterministic_seeded in tags)

    def _resolved(self, value: Any) -> Any:
        """Nested arguments with the results of nodes in the place of the nodes."""
        return mapped(lambda each: self._results[each] if isinstance(each, fx.Node) else each, value)


def _apply(rule: Rule, operation: Operation) -> Any:
    """The result of a rule, matrix by matrix if the batch chooses between matrices."""
    if choices_in((operation.args, operation.kwargs)) and operation.key not in GROUPED:
        return apply_to_choices(operation, rule)
    result = rule(operation)
    returned = result if isinstance(result, list) else [result]
    if len(returned) != len(operation.shapes) or not all(isinstance(x, (ScalingExponents, Choice)) for x in returned):
        raise TypeError(
            f"expected ScalingExponents for {len(operation.shapes)} results, as operation.results(...) makes them; the "
            f"rule returned {type(result).__name__}"
        )
    return result


def _constants(value: Any, varies: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [_constants(each, varies) for each in value]
    if isinstance(value, float) and varies:
        value = torch.tensor(value)  # A number that is read out of the batch.
    if not isinstance(value, Tensor):
        return value
    # Unknowns are on the CPU, and fixed indices are applied to them.
    return ScalingExponents(tuple(value.shape), value=value.cpu(), varies=varies)


def _is_discrete(node: fx.Node) -> bool:
    return not (node.meta["val"].is_floating_point() or node.meta["val"].is_complex())


def _reason(key: str, node: fx.Node) -> str:
    """The operation, and the module in whose forward pass it runs."""
    name = key.split("::")[1].lstrip("_") if key.startswith(("aten::", "python::", "higher_order::")) else key
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    where = path.removeprefix("L['self'].").removeprefix("model").removeprefix(".")
    return f"{name} ({where})" if where else name

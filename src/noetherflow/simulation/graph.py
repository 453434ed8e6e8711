"""Optimisation of a recorded graph: constants are folded, views and products are merged, unused results go."""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Interpreter, Node

# Operations whose result depends only on the shape of their first argument.
_SHAPED = {"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"}
# In these types, x * tensor(c) and x * c are equal to the last bit.
_REAL = (torch.float32, torch.float64)


@final
class Recording(Interpreter):
    """One run of a recorded graph that keeps the value of every node.

    Args:
        module: The graph.
        tensors: The arguments of the run.
    """

    def __init__(self, module: GraphModule, tensors: tuple[Tensor, ...]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.result: tuple[Tensor, ...] = self.run(*tensors)


def condense(recording: Recording) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two faster functions that return what a recorded graph returns, up to rounding.

    Nodes that depend on no argument become constants. Views that change nothing, factors of 1 and nodes without users
    are removed. Adjacent numerical factors are multiplied. A transposed matrix product (A^T B)^T becomes B^T A.

    Args:
        recording: A run of the graph.

    Returns:
        A function with the result of the graph, and a function with that result without its first entry.

    Raises:
        ValueError: If the graph writes into tensors, so that the order of its operations matters.
    """
    values: dict[Node, Any] = dict(recording.env)
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(recording.module.graph, copies)  # type: ignore[arg-type]
    graph.output(output)
    values = {copies[node]: value for node, value in values.items() if node in copies}
    if any(_writes(node) for node in graph.nodes):
        raise ValueError("the graph writes into tensors")
    constants = _fold(graph, values)
    _merge_aliases(graph, values)
    _simplify_products(graph, values, constants)
    _transpose_products(graph)
    _call_methods(graph)
    return _build(graph, constants, first=True), _build(graph, constants, first=False)


def _build(graph: Graph, constants: Mapping[Node, Tensor], *, first: bool) -> Callable[..., Any]:
    """The function of a graph, with or without the first entry of its result; the constants are bound."""
    built = Graph()
    copies: dict[Node, Node] = {}
    # A constant is an argument because an attribute of a module is looked up at every use, which is slower.
    used = [node for node in graph.nodes if node in constants and any(user not in constants for user in node.users)]
    for index, node in enumerate(used):
        copies[node] = built.placeholder(f"constant_{index}")
    for node in graph.nodes:
        if node.op == "output":
            results = tuple(copies[result] for result in node.args[0])
            built.output(results if first else results[1:])
        elif node not in constants:
            copies[node] = built.node_copy(node, copies.__getitem__)
    built.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _draws(node))
    return functools.partial(GraphModule({}, built).forward, *(constants[node] for node in used))


def _fold(graph: Graph, values: dict[Node, Any]) -> dict[Node, Tensor]:
    """The values of all nodes that depend on no argument."""
    constants: dict[Node, Tensor] = {}
    for node in graph.nodes:
        fixed = node.op == "get_attr"
        if node.op == "call_function" and isinstance(node.target, OpOverload) and not _draws(node):
            needed = node.all_input_nodes
            if _name(node) in _SHAPED:
                needed = [other for other in needed if other is not node.args[0]]
            fixed = "empty" not in _name(node) and all(other in constants for other in needed)
        if fixed and isinstance(values.get(node), Tensor):
            constants[node] = values[node]
    return constants


def _merge_aliases(graph: Graph, values: Mapping[Node, Any]) -> None:
    """Keep the first of all nodes that are equal views of a tensor."""
    # Views are compared by the node whose memory they share: two arguments may share memory in one call and not in
    # the next.
    roots: dict[Node, Node] = {}
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        value = values.get(node)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            continue
        sources = (source for source in node.all_input_nodes if _share(values.get(source), value))
        source = next(sources, None)
        roots[node] = node if source is None else roots[source]
        place = value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
        first = seen.setdefault((roots[node], *place), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _share(a: Any, b: Tensor) -> bool:
    """Whether a is a tensor in the memory of b."""
    # The recording keeps all values, so no memory was freed and allocated again.
    strided = isinstance(a, Tensor) and a.layout == torch.strided
    return strided and a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _simplify_products(graph: Graph, values: dict[Node, Any], constants: dict[Node, Tensor]) -> None:
    """Remove powers with exponent 1 and factors of 1; write products by a number c as products by tensor(c)."""
    factors: dict[Node, tuple[Node, float]] = {}
    for node in list(graph.nodes):
        if node in constants or node.op != "call_function" or _dtype(values, node) not in _REAL:
            continue
        if _name(node) == "pow" and node.args[1] == 1 and isinstance(node.args[1], (int, float)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        product_of = _factor(node, values, constants)
        if product_of is None:
            continue
        source, factor = product_of
        inner = factors.get(source)
        # A factor that is a power of two is exact, so the order of two products does not change the rounding.
        if inner is not None and len(source.users) == 1 and 0.5 in (abs(math.frexp(f)[0]) for f in (inner[1], factor)):
            source, factor = inner[0], inner[1] * factor
        if factor == 1:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            constant = graph.get_attr("constant")
            product = graph.call_function(torch.ops.aten.mul.Tensor, (source, constant))
        constants[constant] = values[node].new_tensor(factor)
        values[product] = values[node]
        factors[product] = source, factor
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    for product in reversed(factors):
        if not product.users:
            graph.erase_node(product)


def _factor(node: Node, values: Mapping[Node, Any], constants: Mapping[Node, Tensor]) -> tuple[Node, float] | None:
    """The node x and the number c of a node x * c; None for all other nodes."""
    if _name(node) != "mul" or len(node.args) != 2:
        return None
    for source, other in (node.args, node.args[::-1]):
        if not isinstance(source, Node) or source in constants:
            continue
        if values[source].shape != values[node].shape or values[source].dtype != values[node].dtype:
            continue
        if isinstance(other, (int, float)):
            return source, values[node].new_tensor(other).item()
        constant = constants.get(other) if isinstance(other, Node) else None
        if constant is not None and constant.numel() and constant.dtype == values[node].dtype:
            low, high = constant.aminmax()
            if low == high:
                return source, low.item()
    return None


def _transpose_products(graph: Graph) -> None:
    """Replace (A^T B)^T by B^T A, which needs one view less and is contiguous in memory."""
    bmm = torch.ops.aten.bmm.default
    for node in list(graph.nodes):
        source = _transposed(node)
        if source is None or source.target is not bmm or len(source.users) != 1:
            continue
        factors = source.all_input_nodes if len(source.all_input_nodes) == 2 else 2 * source.all_input_nodes
        if not any(_transposed(factor) for factor in factors):
            continue
        with graph.inserting_before(node):
            transposed = [
                _transposed(factor) or graph.call_function(torch.ops.aten.transpose.int, (factor, 1, 2))
                for factor in reversed(factors)
            ]
            product = graph.call_function(bmm, tuple(transposed))
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        graph.erase_node(source)


def _transposed(node: Node) -> Node | None:
    """The node X of a node X^T, for a stack of matrices X; None for all other nodes."""
    if node.target is torch.ops.aten.transpose.int and node.args[1:] in ((1, 2), (2, 1), (-1, -2), (-2, -1)):
        return node.all_input_nodes[0]
    return None


def _call_methods(graph: Graph) -> None:
    """Replace operations by methods of tensors, whose call takes half the time because no schema is looked up."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.args:
            method = getattr(torch.Tensor, _name(node), None)
            named = node.target._schema.arguments[0].name == "self" and isinstance(node.args[0], Node)
            # The signature of a method that is written in Python may differ from the operation's.
            if named and isinstance(method, types.MethodDescriptorType):
                node.op, node.target = "call_method", _name(node)


def _name(node: Node) -> str:
    """The name of an ATen operation, such as `mul`; empty for all other nodes."""
    target = node.target
    return target._schema.name.removeprefix("aten::") if isinstance(target, OpOverload) else ""


def _dtype(values: Mapping[Node, Any], node: Node) -> torch.dtype | None:
    """The dtype of a node's value; None unless the value is a tensor."""
    value = values.get(node)
    return value.dtype if isinstance(value, Tensor) else None


def _writes(node: Node) -> bool:
    """Whether an operation changes one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _draws(node: Node) -> bool:
    """Whether an operation draws random numbers."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags

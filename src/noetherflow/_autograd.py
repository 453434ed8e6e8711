"""Autograd graphs: their nodes, and the backward pass of a graph with reentrant checkpoints."""

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node


def leaf(tensor: Tensor) -> Tensor:
    """A detached tensor of the same memory that requires gradients if its type allows."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def nodes_of(root: Node) -> set[Node]:
    """All nodes of the autograd graph below a root, the root included."""
    seen, waiting = {root}, [root]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def is_reentrant(nodes: Collection[Node]) -> bool:
    """Whether a graph holds a reentrant checkpoint, whose backward pass accepts no list of inputs."""
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes)


def accumulate(total: Tensor, nodes: Collection[Node], leaves: Collection[Tensor]) -> None:
    """Run a backward pass that writes into `.grad` of the given leaves.

    A reentrant checkpoint accepts no list of inputs, so the backward pass writes into `.grad` of all leaves of the
    graph. Leaves that are not given, such as the parameters of a second model, get their previous `.grad` back.

    Args:
        total: A scalar, shape ().
        nodes: The nodes of its graph.
        leaves: The tensors whose gradients are computed; their `.grad` is None.
    """
    given = {id(leaf) for leaf in leaves}
    variables = [node.variable for node in nodes if hasattr(node, "variable")]
    others = [variable for variable in variables if id(variable) not in given]
    before = [variable.grad for variable in others]
    for variable in others:
        variable.grad = None
    total.backward()
    for variable, gradient in zip(others, before, strict=True):
        variable.grad = gradient

"""Autograd graphs: which nodes they have, and the backward pass of those with reentrant checkpoints."""

from collections.abc import Collection

from torch import Tensor
from torch.autograd.graph import Node


def nodes_of(root: Node) -> set[Node]:
    """All nodes of an autograd graph."""
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
    """A backward pass into `.grad` of these leaves, the only kind that a reentrant checkpoint allows.

    Other leaves of the graph, such as the parameters of another model, keep their `.grad`.
    """
    inner = {id(leaf) for leaf in leaves}
    others = [node.variable for node in nodes if hasattr(node, "variable") and id(node.variable) not in inner]
    before = [leaf.grad for leaf in others]
    for leaf in others:
        leaf.grad = None
    total.backward()
    for leaf, gradient in zip(others, before, strict=True):
        leaf.grad = gradient

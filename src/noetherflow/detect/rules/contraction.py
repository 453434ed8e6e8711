"""Sums of products: linear maps, batches of matrices, einsum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from noetherflow.detect.demands import Demands
from noetherflow.detect.exponents import ScalingExponents, Term, product, varies_along
from noetherflow.detect.operation import Operation, exponents_of, plus
from noetherflow.detect.rules.registry import exponent_rule

_LETTERS = "abcdefgh"


def contract(spec: str, operands: Sequence[ScalingExponents], demands: Demands, reason: str) -> ScalingExponents:
    """The exponents of an einsum: those of the factors must add up to the same at every index that is summed over.

    Along an index that is summed over, and along an index that only one factor has, the sum treats all indices alike,
    so that matrices may act. An index that several factors share and the result keeps is a separate problem for each of
    its values.

    Args:
        spec: As for `torch.einsum`, without dots.
        operands: The factors.
        demands: Where demands go.
        reason: The operation.

    Returns:
        The exponents of the result.
    """
    inputs, output = spec.replace(" ", "").split("->")
    labels = inputs.split(",")
    summed = sorted(set("".join(labels)) - set(output))
    order = output + "".join(summed)
    sizes = {
        label: max(x.shape[axis] for names, x in zip(labels, operands, strict=True) for axis in _axes(names, label))
        for label in order
    }
    shape = tuple(sizes[label] for label in output)
    if any(x.zero for x in operands):
        return ScalingExponents(shape, value=torch.zeros(shape))
    total = ScalingExponents(tuple(1 for _ in order))
    inner: list[Tensor] = []
    attending = [x.attention for x in operands]
    for number, (names, x) in enumerate(zip(labels, operands, strict=True)):
        others = "".join(labels[:number] + labels[number + 1 :])
        shared = [label for label in names if label in others and label in output]
        _request_stacks(names, x, shared, demands)
        placed = _placed(names, x, order)
        for term in placed.terms:
            lines = [axis for axis, label in enumerate(order) if varies_along(term.ids, axis) and label not in shared]
            for axis in lines:
                demands.allow_mixing(term.ids, axis)
                if names.count(order[axis]) > 1 or "".join(labels).count(order[axis]) > 2:
                    demands.forbid_mixing([term], f"{reason} has more than two factors with an index")
            if not lines:
                demands.forbid_mixing([term], f"{reason} treats each index of a batch by itself")
            if any(order[axis] in summed for axis in lines):
                inner.append(term.ids)
            elif any(attending[:number] + attending[number + 1 :]):
                demands.label([term.ids], "V-O")
        total = product(total, placed)
    every = ScalingExponents(tuple(sizes[label] for label in order), total.terms)
    gauges = [x.parameter for x in operands]
    result = demands.equal_along(every, range(len(output), len(order)), reason, gauges=gauges)
    terms = tuple(Term(factor, ids.reshape(ids.shape[: len(output)])) for factor, ids in result.terms)
    active = sum(not x.constant and x.parameter is None for x in operands) > 1
    return ScalingExponents(shape, terms, scores=tuple(inner) if active else ())


def matrix_product(operation: Operation, first: ScalingExponents, second: ScalingExponents) -> ScalingExponents:
    """The exponents of a matrix product with any batch axes."""
    left, right = len(first.shape), len(second.shape)
    batch = _LETTERS[: max(0, max(left, right) - 2)]
    rows = batch[len(batch) - max(0, left - 2) :] + ("ik" if left > 1 else "k")
    columns = batch[len(batch) - max(0, right - 2) :] + ("kj" if right > 1 else "k")
    output = batch + ("i" if left > 1 else "") + ("j" if right > 1 else "")
    return contract(f"{rows},{columns}->{output}", [first, second], operation.demands, operation.reason)


@exponent_rule("aten::mm", "aten::matmul", "aten::bmm", "aten::mv", "aten::dot")
def multiplied(operation: Operation) -> ScalingExponents:
    """A matrix product."""
    return matrix_product(operation, operation.x, exponents_of(operation.args[1]))


@exponent_rule("aten::linear")
def linear(operation: Operation) -> ScalingExponents:
    """X W^T + b."""
    x, weight = operation.x, exponents_of(operation.args[1])
    letters = _LETTERS[: len(x.shape) - 1]
    result = contract(f"{letters}i,oi->{letters}o", [x, weight], operation.demands, operation.reason)
    return plus(operation, result, operation.tensor(2, "bias"), "adds a bias")


@exponent_rule("aten::addmm", "aten::baddbmm", "aten::addmv")
def added(operation: Operation) -> ScalingExponents:
    """Beta b + alpha x W."""
    bias, x, weight = (exponents_of(argument) for argument in operation.args[:3])
    result = matrix_product(operation, x, weight)
    if len(bias.shape) == 3:
        _request_stacks("bij", bias, ["b"], operation.demands)
    ignored = operation.kwargs.get("beta", 1) == 0
    return plus(operation, result, None if ignored else bias, "adds a bias")


@exponent_rule("aten::bilinear")
def bilinear(operation: Operation) -> ScalingExponents:
    """X W y + b."""
    first, second, weight = (exponents_of(argument) for argument in operation.args[:3])
    letters = _LETTERS[: len(first.shape) - 1]
    spec = f"{letters}i,oij,{letters}j->{letters}o"
    result = contract(spec, [first, weight, second], operation.demands, operation.reason)
    return plus(operation, result, operation.tensor(3, "bias"), "adds a bias")


@exponent_rule("aten::einsum")
def einsum(operation: Operation) -> ScalingExponents:
    """`torch.einsum`, which may have dots and no arrow."""
    spec, operands = operation.args[0], [exponents_of(x) for x in operation.args[1]]
    inputs, arrow, output = spec.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow:
        output = "".join(sorted(label for label in set(inputs) - {",", "."} if inputs.count(label) == 1))
        output = ("..." if "..." in inputs else "") + output
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in spec]
    hidden = max(len(x.shape) - len(names.replace("...", "")) for names, x in zip(labels, operands, strict=True))
    plain = []
    for names, x in zip(labels, operands, strict=True):
        missing = len(x.shape) - len(names.replace("...", ""))
        plain.append(names.replace("...", "".join(spare[hidden - missing : hidden])))
    output = output.replace("...", "".join(spare[:hidden]))
    return contract(",".join(plain) + "->" + output, operands, operation.demands, operation.reason)


def _axes(names: str, label: str) -> list[int]:
    return [axis for axis, name in enumerate(names) if name == label]


def _placed(names: str, x: ScalingExponents, order: str) -> ScalingExponents:
    """A factor with its axes in the common order, and size 1 for axes that it does not have."""
    terms = []
    for factor, ids in x.terms:
        kept, labels = ids, names
        for label in set(names):
            axes = _axes(names, label)
            if len(axes) > 1:  # A diagonal needs axes of full size.
                kept = kept.expand([x.shape[axis] if axis in axes else size for axis, size in enumerate(kept.shape)])
        while len(set(labels)) < len(labels):
            label = next(label for label in labels if labels.count(label) > 1)
            first, second = _axes(labels, label)[:2]
            kept = kept.diagonal(0, first, second)
            labels = labels[:first] + labels[first + 1 : second] + labels[second + 1 :] + label
        sizes = dict(zip(labels, kept.shape, strict=True))
        arranged = kept.permute([labels.index(label) for label in order if label in labels])
        terms.append(Term(factor, arranged.reshape([sizes.get(label, 1) for label in order])))
    shape = dict(zip(names, x.shape, strict=True))
    return ScalingExponents(tuple(shape.get(label, 1) for label in order), tuple(terms))


def _request_stacks(names: str, x: ScalingExponents, shared: Sequence[str], demands: Demands) -> None:
    """Ask for separate unknowns in each matrix of a parameter that is a stack of matrices."""
    if x.parameter is None:
        return
    batch = [axis for axis, label in enumerate(names) if label in shared and x.shape[axis] > 1]
    size = math.prod(x.shape[axis] for axis in batch)
    across = [ids for _, ids in x.terms if any(varies_along(ids, axis) for axis in batch)]
    within = [ids for _, ids in x.terms if not any(varies_along(ids, axis) for axis in batch)]
    for over in across:
        for ids in within:
            if ids.numel() > 1:
                demands.unknowns.request_stack(over, size, ids)

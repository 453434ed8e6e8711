"""Sums of products: linear maps, convolutions, attention, einsum."""

import math
from collections.abc import Sequence

from torch import Tensor

from noetherflow.detect.exponents import Equations, Scaled, Term, collapse, product, varying


def contract(spec: str, operands: Sequence[Scaled], equations: Equations, reason: str) -> Scaled:
    """The exponents of an einsum: those of the factors must add up to the same for every index summed over.

    Along an index that is summed over, and along one that only one factor has, the sum treats all indices alike, so
    that whole matrices pass. An index that several factors share and the result keeps is one problem for each value.

    Args:
        spec: As for `torch.einsum`, without dots.
        operands: The factors.
        equations: Where the conditions are written down.
        reason: Which operation has them.

    Returns:
        The result.
    """
    inputs, output = spec.replace(" ", "").split("->")
    labels = inputs.split(",")
    summed = sorted(set("".join(labels)) - set(output))
    order = output + "".join(summed)
    sizes = {
        label: max(x.shape[axis] for own, x in zip(labels, operands, strict=True) for axis in _at(own, label))
        for label in order
    }
    total = Scaled(tuple(1 for _ in order))
    inner: list[Tensor] = []
    attending = [x.attention for x in operands]
    for number, (own, x) in enumerate(zip(labels, operands, strict=True)):
        others = "".join(labels[:number] + labels[number + 1 :])
        shared = [label for label in own if label in others and label in output]
        _ask_for_joint_terms(own, x, shared, equations)
        placed = _placed(own, x, order)
        for _, ids in placed.terms:
            lines = [axis for axis, label in enumerate(order) if varying(ids, axis) and label not in shared]
            for axis in lines:
                equations.line(ids, axis)
            if not lines:
                equations.alone(ids, f"{reason} works on each index of a batch by itself")
            if any(order[axis] in summed for axis in lines):
                inner.append(ids)
            elif any(attending[:number] + attending[number + 1 :]):
                equations.tag([ids], "V-O")
        total = product(total, placed)
    gauges = [x.parameter for x in operands]
    whole = Scaled(tuple(sizes[label] for label in order), total.terms)
    result = collapse(whole, range(len(output), len(order)), equations, reason, gauges=gauges)
    terms = tuple(Term(factor, ids.reshape(ids.shape[: len(output)])) for factor, ids in result.terms)
    active = sum(not x.constant and x.parameter is None for x in operands) > 1
    return Scaled(tuple(sizes[label] for label in output), terms, scores=tuple(inner) if active else ())


def matmul(first: Scaled, second: Scaled, equations: Equations, reason: str) -> Scaled:
    """The exponents of a matrix product with whatever batch axes."""
    left, right = len(first.shape), len(second.shape)
    count = max(left, right) - 2
    batch = "abcdefgh"[: max(0, count)]
    own = batch[len(batch) - max(0, left - 2) :] + ("ik" if left > 1 else "k")
    other = batch[len(batch) - max(0, right - 2) :] + ("kj" if right > 1 else "k")
    out = batch + ("i" if left > 1 else "") + ("j" if right > 1 else "")
    return contract(f"{own},{other}->{out}", [first, second], equations, reason)


def einsum(spec: str, operands: Sequence[Scaled], equations: Equations, reason: str) -> Scaled:
    """The exponents of `torch.einsum`, which may have dots, and no arrow."""
    inputs, arrow, output = spec.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow:
        output = "".join(sorted(label for label in set(inputs) - {",", "."} if inputs.count(label) == 1))
        output = ("..." if "..." in inputs else "") + output
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in spec]
    hidden = max(len(x.shape) - len(own.replace("...", "")) for own, x in zip(labels, operands, strict=True))
    plain = []
    for own, x in zip(labels, operands, strict=True):
        missing = len(x.shape) - len(own.replace("...", ""))
        plain.append(own.replace("...", "".join(spare[hidden - missing : hidden])))
    output = output.replace("...", "".join(spare[:hidden]))
    return contract(",".join(plain) + "->" + output, operands, equations, reason)


def _at(own: str, label: str) -> list[int]:
    return [axis for axis, one in enumerate(own) if one == label]


def _placed(own: str, x: Scaled, order: str) -> Scaled:
    """A factor with its axes in the common order, size 1 for those it does not have."""
    terms = []
    for factor, ids in x.terms:
        for label in set(own):
            axes = _at(own, label)
            if len(axes) > 1:  # a diagonal
                ids = ids.expand([x.shape[axis] if axis in axes else size for axis, size in enumerate(ids.shape)])
        kept = ids
        names = own
        while len(set(names)) < len(names):
            label = next(one for one in names if names.count(one) > 1)
            first, second = _at(names, label)[:2]
            kept = kept.diagonal(0, first, second)
            names = names[:first] + names[first + 1 : second] + names[second + 1 :] + label
        sizes = dict(zip(names, kept.shape, strict=True))
        arranged = kept.permute([names.index(label) for label in order if label in names])
        terms.append(Term(factor, arranged.reshape([sizes.get(label, 1) for label in order])))
    shape = dict(zip(own, x.shape, strict=True))
    return Scaled(tuple(shape.get(label, 1) for label in order), tuple(terms))


def _ask_for_joint_terms(own: str, x: Scaled, shared: Sequence[str], equations: Equations) -> None:
    """A parameter that is many matrices: each has exponents of its own, which sums over its axes do not know."""
    if x.parameter is None:
        return
    batch = [axis for axis, label in enumerate(own) if label in shared and x.shape[axis] > 1]
    if not batch:
        return
    size = math.prod(x.shape[axis] for axis in batch)
    across = [ids for _, ids in x.terms if any(varying(ids, axis) for axis in batch)]
    within = [ids for _, ids in x.terms if not any(varying(ids, axis) for axis in batch)]
    for ids in across:
        for other in within:
            if other.numel() > 1:
                equations.join(int(ids.reshape(-1)[0]), size, int(other.reshape(-1)[0]))

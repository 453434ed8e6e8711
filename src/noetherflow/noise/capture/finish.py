"""What happens when the gradient of a parameter is complete: statistics are added up, and the gradient goes on.

The gradient is always that of autograd: what was recorded is added to whatever else arrived, so that a use that was not
seen costs the statistics of its parameter, and never the gradient.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noetherflow.noise.buffers import Buffer
from noetherflow.noise.capture.owned import Constant, Record, joined
from noetherflow.noise.capture.pulling import pulled
from noetherflow.noise.capture.sink import GradientSink
from noetherflow.noise.capture.sources import Source
from noetherflow.noise.collect import collect, stacked
from noetherflow.noise.kernels import accumulator
from noetherflow.noise.kernels.reference import budget
from noetherflow.noise.statistics import Requested, StatisticsLayout
from noetherflow.noise.uses import PerExample, Use, View

if TYPE_CHECKING:
    from noetherflow.noise.capture.mode import Capture

# Units of rounding by which the sum of gradients may differ in another order of additions.
_ROUNDING = 1000
# Vectors whose gradients take more than such a part of the memory that kernels take are not kept until a block ends.
_LARGE = 4


def arrived(capture: "Capture", source: Source, root: Tensor, zero: Tensor, incoming: Tensor | None) -> Tensor | None:
    """Add up the statistics of a source and return the gradient that goes on to it.

    Args:
        capture: The forward pass.
        source: What the gradient is of.
        root: The source as a tensor.
        zero: What stands for recorded uses in the sum of gradients that arrived.
        incoming: That sum.

    Returns:
        The gradient; None if none goes on.
    """
    records = source.take()
    if source.name is not None and source.arrived and records:
        source.refuse("a second backward pass")
    source.arrived = source.arrived or bool(records) or incoming is not None
    if incoming is not None and incoming.layout is not torch.strided:
        source.refuse("a sparse gradient")
    elif incoming is not None and incoming.data_ptr() == zero.data_ptr():
        incoming = None  # nothing but what stands for records
    uses = joined(records, capture.size)
    passes_on = capture.sink is GradientSink.PASSED_ON
    if incoming is not None and not source.refused and _is_unseen(source, incoming, records, uses):
        source.refuse("a use that was not seen")
    if source.refused:
        return _refused(root, incoming, uses) if passes_on or source.name is None else None
    if source.name is None:
        constant = source.constant or any(isinstance(record, Constant) for record in records)
        return _derived(source, root, incoming, uses, constant=constant)
    if not uses:
        return incoming if passes_on else None
    gradient = _accumulated(capture, source.name, root, uses)
    if gradient is not None:
        if capture.sums is not None:
            # A copy: what is passed on may become .grad.
            capture.sums[source.name] = gradient.clone() if passes_on else gradient
        for record in records:
            if isinstance(record, Constant):
                gradient = gradient + _embedded(record.views, record.gradient, root)
        gradient = gradient.to(root.dtype)
    # A gradient that goes on is not held on to, or autograd would copy it.
    capture.gradients[source.name] = gradient if capture.sink is GradientSink.KEPT else None
    return gradient if passes_on else None


def _accumulated(capture: "Capture", name: str, root: Tensor, uses: Sequence[Use]) -> Tensor | None:
    """Add up the statistics of a parameter; the sum of its gradients, if it was formed."""
    kind = accumulator(root)
    layout, size = capture.buffers.model_layout.layouts[name], capture.size * root.numel() * kind.itemsize
    # Large stacks are squared now: they take the memory of activations.
    waits = layout.is_of_vector and _LARGE * size <= budget(root)
    if waits and all(isinstance(use, PerExample) for use in uses):
        stack = stacked(uses, root.shape, root if root.dtype is kind else root.to(kind)).reshape(capture.size, -1)
        total = stack.sum(0)
        capture.vectors.append((name, stack, total))
        # A copy: .grad may become what is returned, and be averaged or clipped before the block ends.
        return total.view(root.shape).clone()
    buffer = capture.buffers.buffer(name, kind)
    needs_sum = capture.sums is not None or capture.sink is not GradientSink.DROPPED
    return collect(uses, buffer, root, needs_sum=needs_sum)


def _is_unseen(source: Source, incoming: Tensor, records: Sequence[Record], uses: Sequence[Use]) -> bool:
    """Whether more arrived than autograd itself carried on from what was recorded."""
    if source.constant:
        return False  # the gradient of a penalty is whatever it is
    native = [use for use in uses if isinstance(use, PerExample) and use.native]
    known = [_embedded(use.views, use.gradients.sum(0), incoming) for use in native]
    known += [_embedded(record.views, record.gradient, incoming) for record in records if isinstance(record, Constant)]
    rest = incoming
    for part in known:
        rest = rest - part
    # Of a sum of B terms that cancel, rounding is relative to the terms.
    scale = sum(float(torch.linalg.vector_norm(part.abs().float())) for part in known)
    scale += sum(math.sqrt(use.size) * float(torch.linalg.vector_norm(use.gradients.abs().float())) for use in native)
    rounding = _ROUNDING * torch.finfo(incoming.dtype).eps * scale
    return not float(torch.linalg.vector_norm(rest.abs().float())) <= rounding


def _refused(root: Tensor, incoming: Tensor | None, uses: Sequence[Use]) -> Tensor | None:
    """The gradient alone: what arrived, and what recorded uses add."""
    rest = [use for use in uses if not use.native]
    parts = [] if incoming is None else [incoming]
    if rest:
        total = collect(rest, Buffer.blank(StatisticsLayout.of(root.shape, Requested()), root), root)
        assert total is not None
        parts.append(total.to(root.dtype))
    return sum(parts[1:], parts[0]) if parts else None


def _derived(
    source: Source, root: Tensor, incoming: Tensor | None, uses: Sequence[Use], *, constant: bool
) -> Tensor | None:
    """Hand the gradients of every example on to the parents; autograd carries on their sum."""
    assert source.function is not None
    rest = incoming
    if uses:
        stack = stacked(uses, source.shape, root)
        native = [use for use in uses if isinstance(use, PerExample) and use.native]
        for part in (_embedded(use.views, use.gradients.sum(0), root) for use in native):
            rest = None if rest is None else rest - part
    params = [parent.tensor.detach() for parent in source.parents]
    if uses:
        for parent, part in zip(source.parents, pulled(source.function, [], params, stack), strict=True):
            parent.note(PerExample(parent.views, part, native=True))
    if rest is not None and constant:
        for parent, part in zip(source.parents, pulled(source.function, [], params, rest[None]), strict=True):
            parent.note(Constant(parent.views, part[0]))
    parts = [part for part in (rest, stack.sum(0) if uses else None) if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


def _embedded(views: tuple[View, ...], part: Tensor, like: Tensor) -> Tensor:
    """The gradient of a source from the gradient of a part of it, which views lead to."""
    if not views:
        return part
    complete = torch.zeros(like.shape, dtype=part.dtype, device=part.device)
    target = complete
    for view in views:
        target = view(target)
    target += part
    return complete

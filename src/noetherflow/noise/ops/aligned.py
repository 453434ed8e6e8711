"""What a forward pass computes from parameters and constants with a row for every example, beside data.

Positions that are repeated for every example, the embedding of numbers that are drawn in the step, or of types of
tokens that nobody gave: that their rows belong to examples shows where they meet data.
"""

import torch
from torch import Tensor

from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.layouts import Apart, Rows
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import outer, per_example, table
from noetherflow.noise.capture.sources import Tracked

# Numbers that a gradient of every example may have, where all but its rows are zero.
_MOST = 2**26


def aligned(capture: Capture, tracked: Tracked, dim: int, layout: Apart) -> Tensor | None:
    """A tensor computed from parameters whose rows along a dimension belong to examples, with its gradient recorded.

    Args:
        capture: The forward pass.
        tracked: The tensor.
        dim: The dimension.
        layout: The layout of a tensor whose first dimension that is.

    Returns:
        The tensor; None if the gradients of the examples would be too large.
    """
    tensor, call, size = tracked.tensor, tracked.source.call, capture.size
    dim %= tensor.ndim
    shape, parents = tuple(tensor.shape), tracked.source.parents

    def by_vector(stack: Tensor, kept: int) -> Rows:
        """Vectors of the last dimensions, by example."""
        moved = stack.movedim(dim, 0)
        values, owners = layout.rows(moved, moved.ndim - 1, size)
        last = stack.shape[stack.ndim - kept :]
        if owners is None:
            return Rows(values.reshape(size, -1, *last), None)
        vectors = values.reshape(len(values), -1, *last)
        return Rows(vectors.flatten(0, 1), owners.repeat_interleave(vectors.shape[1]))

    if call is not None and not tracked.views and dim < tensor.ndim - (call.kind != "expand"):
        if call.kind == "expand":
            (parent,) = parents
            original = tuple(parent.tensor.shape)
            behind = dim - tensor.ndim + len(original)
            if _is_expanded(original, shape, dim):

                def note_expanded(gradient: Tensor) -> Tensor | None:
                    vectors = gradient.movedim(dim, 0).reshape(shape[dim], *_without(shape, dim))
                    summed = vectors.sum_to_size(shape[dim], *_padded(original, behind, len(shape)))
                    return parent.note(
                        per_example(
                            parent.views, layout.rows(summed.reshape(shape[dim], *original), len(original), size)
                        )
                    )

                return autograd.spread(tensor, shape, note_expanded, [parent.root])
        else:
            weight, bias = parents[call.weight], None if call.bias is None else parents[call.bias]
            kept = 1 if call.kind == "linear" else 0

            def note_rows(gradient: Tensor) -> list[Tensor | None]:
                gradients, constants = by_vector(gradient, 1), by_vector(call.constant, kept)
                make = outer if call.kind == "linear" else table
                handed = [weight.note(make(weight.views, constants, gradients))]
                return handed + ([] if bias is None else [bias.note(per_example(bias.views, gradients))])

            return autograd.spread(tensor, shape, note_rows, [p.root for p in (weight, bias) if p is not None])
    if size * tensor.numel() > _MOST:
        return None

    def note(gradient: Tensor) -> Tensor | None:
        labels = layout.labels(torch.Size((shape[dim],)), size).to(gradient.device) - 1
        inside = labels == torch.arange(size, device=gradient.device)[:, None]
        inside = inside.reshape(size, *(1,) * dim, shape[dim], *(1,) * (len(shape) - dim - 1))
        return tracked.note(per_example(tracked.views, Rows((gradient * inside)[:, None], None)))

    return autograd.spread(tensor, shape, note, [tracked.root])


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _padded(original: tuple[int, ...], behind: int, ndim: int) -> tuple[int, ...]:
    """The shape of a parameter among dimensions of what it was expanded to, but the dimension of the examples."""
    rest = original if behind < 0 else _without(original, behind)
    return (1,) * (ndim - 1 - len(rest)) + rest


def _is_expanded(original: tuple[int, ...], shape: tuple[int, ...], dim: int) -> bool:
    """Whether a parameter was only broadcast: along the examples, and along dimensions of length 1."""
    lengths = (1,) * (len(shape) - len(original)) + original
    return lengths[dim] == 1 and all(a in (1, b) for a, b in zip(lengths, shape, strict=True))

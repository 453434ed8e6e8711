"""Squares of per-example gradients without forming them, and elementary sums, in batched functions of tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from noetherflow.noise.buffers import EACH, Buffer
from noetherflow.noise.kernels.base import accumulator
from noetherflow.noise.kernels.costs import sides_of
from noetherflow.noise.statistics import ABSENT
from noetherflow.symmetry import Axis


def add_table_rows(stack: Tensor, ids: Tensor, d: Tensor) -> None:
    """Add d (B, T, m) to the rows of tables (B, n, m) that ids (B, T) name."""
    examples = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
    stack.index_put_((examples, ids), d.to(stack.dtype), accumulate=True)


def tables_of(ids: Tensor, d: Tensor, shape: torch.Size) -> Tensor:
    """The gradients (B, n, m) of a table of some shape."""
    stack = d.new_zeros(len(ids), *shape)
    add_table_rows(stack, ids, d)
    return stack


def add_grams(stack: Tensor, buffer: Buffer, row: int) -> None:
    """Add Gram matrices of gradients (B, n, m) to a row of the buffer."""
    if buffer.layout.grams:
        gradients = stack.reshape(len(stack), *buffer.layout.shape)
        buffer.add_grams(row, {axis: _gram(axis, gradients) for axis in buffer.layout.grams})


def add_sums(numbers: Tensor, by_row: Tensor, rows: int, by_column: Tensor | None, columns: int) -> None:
    """Add sums by row and by column to a vector in which they begin somewhere, or nowhere; their total comes first."""
    numbers[0].add_(by_row.sum(dtype=numbers.dtype))
    for part, start in ((by_row, rows), (by_column, columns)):
        if part is not None and start != ABSENT:
            # Not `+=`, which would copy the result to where it is.
            numbers[start : start + part.numel()].add_(part)


def square_by_tokens(x: Tensor, d: Tensor, buffer: Buffer, row: int) -> None:
    """Add the squares of G_b = d_b^T x_b, for x (B, T, m) and d (B, T, n), from inner products of tokens (token Grams).

    |G|^2 = sum_st (x x^T)_st (d d^T)_st, and G G^T = d^T (x x^T) d: no G is formed.
    """
    layout, numbers = buffer.layout, buffer.numbers[row]
    on_rows, on_columns = sides_of(layout.requested)
    total: Tensor | None = None
    sides = ((0, layout.rows, on_rows, d, x), (1, layout.columns, on_columns, x, d))
    for dim, start, needed, side, other in sides:
        if not needed:
            continue
        weighted = (other @ other.mT) @ side
        by_entry = (weighted * side).sum((0, 1)).to(numbers.dtype)
        total = by_entry.sum()
        if start != ABSENT:
            numbers[start : start + len(by_entry)].add_(by_entry)
        for axis in layout.grams:
            if axis.dim % 2 == dim:
                first, second = (replace(axis, dim=0).rows(tokens.flatten(0, 1).mT) for tokens in (weighted, side))
                buffer.add_grams(row, {axis: first @ second.mT})
    numbers[0].add_(((x @ x.mT) * (d @ d.mT)).sum() if total is None else total)


def square_single_tokens(x: Tensor, d: Tensor, buffer: Buffer) -> None:
    """Add the squares of outer products d_b x_b^T of vectors x (B, m) and d (B, n): products of squares."""
    layout = buffer.layout
    squares_x, squares_d = x.square(), d.square()
    lengths_x, lengths_d = squares_x.sum(1), squares_d.sum(1)
    if layout.has_total_only:
        buffer.numbers[EACH, 0].add_(lengths_x @ lengths_d)
        return
    by_column = lengths_d @ squares_x if layout.requested.columns else None
    add_sums(buffer.numbers[EACH], lengths_x @ squares_d, layout.rows, by_column, layout.columns)
    if buffer.weights is not None:
        weights = buffer.weights.to(d.device, d.dtype)
        buffer.numbers[EACH, layout.weighted].add_(((squares_d @ weights) * squares_x).sum())
    if buffer.entries is not None:
        buffer.entries[EACH].add_(squares_d.mT @ squares_x)
    for axis in layout.grams:
        side, other = (d, squares_x) if axis.dim % 2 == 0 else (x, squares_d)
        if axis.within is not None:
            other = other[:, axis.within[1] : axis.within[2]]
        rows = replace(axis, dim=0, within=None).rows((side * other.sum(1, keepdim=True).sqrt()).mT)
        buffer.add_grams(EACH, {axis: rows @ rows.mT})


def square_rows(ids: Tensor, d: Tensor, buffer: Buffer) -> None:
    """Add the squares of gradients of a table whose rows are read; tokens that read the same row are summed first."""
    layout = buffer.layout
    row, distinct = distinct_rows(ids, d, layout.shape[0])
    squares = distinct.square()
    by_row = buffer.numbers.new_zeros(layout.shape[0]).index_add_(0, row, squares.sum(1).to(buffer.numbers.dtype))
    add_sums(buffer.numbers[EACH], by_row, layout.rows, squares.sum(0), layout.columns)
    if buffer.weights is not None:
        weights = buffer.weights.to(squares.device, squares.dtype)
        buffer.numbers[EACH, layout.weighted].add_((squares * weights[row]).sum())
    if buffer.entries is not None:
        buffer.entries[EACH].index_add_(0, row, squares.to(buffer.entries.dtype))
    for axis in layout.grams:
        side = replace(axis, dim=0).rows(distinct.mT)
        buffer.add_grams(EACH, {axis: side @ side.mT})


def distinct_rows(ids: Tensor, d: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of d (B, T, m) over tokens of an example that read the same row of a table of `count` rows.

    Returns:
        Rows of the table, shape (B T,), and the sum for each, shape (B T, m): zeros where there are fewer. The shapes
        do not depend on what is in ids, so that no device has to be waited for.
    """
    keys, order = (ids + count * torch.arange(len(ids), device=ids.device)[:, None]).flatten().sort()
    new = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=new[1:])
    place = new.cumsum(0) - 1
    row = torch.zeros_like(keys).scatter_(0, place, keys % count)
    return row, d.new_zeros(len(keys), d.shape[2]).index_add_(0, place, d.flatten(0, 1)[order])


def group_norm_back(
    x: Tensor, d: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of a normalisation over groups of channels, in which each channel of an example has a weight.

    Args:
        x: What was normalised, shape (B, channels, ...).
        d: Gradients of the outputs, of the same shape.
        weight: Shape (channels,), or None.
        mean: Of each group, shape (B, groups).
        scale: What each centred group was multiplied by, of that shape.

    Returns:
        The gradient of x, and those of gain and bias example by example, shape (B, channels).
    """
    size, channels = x.shape[:2]
    weights = x.new_ones(size * channels) if weight is None else weight.repeat(size)
    tensors = [part.reshape(1, part.shape[:2].numel(), *part.shape[2:]) for part in (d, x, mean, scale)]
    sizes = (1, size * channels, x[0, 0].numel(), mean.numel())
    back, gains, biases = torch.ops.aten.native_group_norm_backward(*tensors, weights, *sizes, [True, True, True])
    return back.view(x.shape), gains.view(size, channels), biases.view(size, channels)


def _gram(axis: Axis, stack: Tensor) -> Tensor:
    rows = axis.rows(stack, batch_dims=1)
    side = rows[0] if len(rows) == 1 else rows.transpose(0, 1).flatten(1)
    return side @ side.mT


def widened(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype in which sums are kept."""
    kind = accumulator(*tensors)
    return [tensor if tensor.dtype is kind else tensor.to(kind) for tensor in tensors]

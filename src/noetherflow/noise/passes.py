"""Single passes over tensors: by a compiled loop where there is one for them, by functions of tensors elsewhere."""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# What the loops are compiled for.
_LOOPED = (torch.float32, torch.float64, torch.int64)


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type in which sums are kept: float32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in that type."""
    return tensor.to(accumulator(tensor))


def scanner(
    matrix: Tensor, rows: Tensor, columns: Tensor | None, entries: Tensor | None = None, total: Tensor | None = None
) -> Callable[[], None]:
    """A pass over what a matrix holds whenever it is called: its squares are added to sums, itself to a total.

    Args:
        matrix: Shape (n, m), contiguous.
        rows: Sums of squares, shape (n,), float64.
        columns: The same, shape (m,), or None.
        entries: Each square, shape (n, m), or None.
        total: Shape (n, m), or None.

    Returns:
        The pass.
    """
    found = _arrays(matrix, rows, columns, entries, total)
    if found:
        scan = _loops().scan
        return lambda: scan(*found)

    def once() -> None:
        squares = wide(matrix).square()
        rows.add_(squares.sum(1))
        if columns is not None:
            columns.add_(squares.sum(0))
        if entries is not None:
            entries.add_(squares)
        if total is not None:
            total.add_(matrix)

    return once


def lengths(matrix: Tensor) -> Tensor:
    """The squared length of each row of a matrix, in the accumulator's type."""
    found = matrix.new_empty(len(matrix), dtype=accumulator(matrix))
    arrays = _arrays(matrix, found)
    if not arrays:
        return torch.linalg.vector_norm(matrix, dim=1, dtype=found.dtype).square()
    _loops().lengths(*arrays)
    return found


def weighted_squares(matrix: Tensor, weights: Tensor) -> Tensor:
    """The sum of the squares of all rows, each times a weight, in float64: shape (n, m) to shape (m,)."""
    found = matrix.new_zeros(matrix.shape[1], dtype=torch.float64)
    arrays = _arrays(matrix, weights, found)
    if not arrays:
        return (weights @ wide(matrix).square()).double()
    _loops().weigh(*arrays)
    return found


def pile(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows of a stack (B, m), in the accumulator's type, and that of their squares, in float64."""
    total = stack.new_zeros(stack.shape[1], dtype=accumulator(stack))
    squares = total.new_zeros(len(total), dtype=torch.float64)
    arrays = _arrays(stack, total, squares)
    if not arrays:
        return stack.sum(0, dtype=total.dtype), wide(stack).square().sum(0).double()
    _loops().pile(*arrays)
    return total, squares


def vector_squares(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of vectors (B, m), and the squares of all and of that sum, each followed by their own sum: (2, m + 1)."""
    total = stack.new_zeros(stack.shape[1], dtype=accumulator(stack))
    squares = total.new_zeros(2, len(total) + 1, dtype=torch.float64)
    arrays = _arrays(stack, total, squares)
    if arrays:
        _loops().vectors(*arrays)
        return total, squares
    total, squares[0, :-1] = pile(stack)
    squares[1, :-1] = total.double().square()
    squares[:, -1] = squares[:, :-1].sum(1)
    return total, squares


def add_tokens(part: Tensor, first: int, ids: Tensor, outputs: Tensor) -> None:
    """Add what every token (T,) of an example puts out (T, m) to the row that it reads of a table.

    Args:
        part: Some rows of the table; what other rows get is left out.
        first: Which row of the table is the first of these.
        ids: The row of each token.
        outputs: Their gradients.
    """
    arrays = _arrays(part, ids, outputs)
    if arrays:
        table, *rest = arrays
        _loops().read_rows(table, first, *rest)
        return
    inside = (ids >= first) & (ids < first + len(part))
    part.index_add_(0, torch.where(inside, ids - first, 0), torch.where(inside[:, None], outputs, 0.0))


def table_sums(ids: Tensor, outputs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a table of which each token reads a row; tokens of one example that read the same are summed first.

    Args:
        ids: Shape (B, T).
        outputs: Gradients, shape (B, T, m).
        count: Of rows of the table.

    Returns:
        Squares by row, shape (count,), and by column, shape (m,), in float64; the sum of gradients, shape (count, m).
    """
    total = outputs.new_zeros(count, outputs.shape[2], dtype=accumulator(outputs))
    rows, columns = (total.new_zeros(length, dtype=torch.float64) for length in total.shape)
    arrays = _arrays(ids, outputs, rows, columns, total)
    if arrays:
        _loops().tabulate(*arrays)
        return rows, columns, total
    row, sums = distinct_rows(ids, outputs, count)
    squares = wide(sums).square()
    rows.index_add_(0, row, squares.sum(1, dtype=torch.float64))
    return rows, squares.sum(0, dtype=torch.float64), total.index_add_(0, row, wide(sums))


def distinct_rows(ids: Tensor, outputs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows of a table that each example reads, shape (k,), and the sums of its outputs for each, shape (k, m)."""
    keys = ids + count * torch.arange(len(ids), device=ids.device)[:, None]
    distinct, place = torch.unique(keys, return_inverse=True)
    # Autograd's own kernel for embeddings, several times faster than `index_add_`.
    sums = torch.ops.aten.embedding_dense_backward(outputs, place, len(distinct), -1, False)
    return distinct % count, sums


def channel_sums(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of g x and of g over all but the first two dimensions, shape (B, channels)."""
    shape = x.shape[:2]
    x, g = (one.reshape(shape.numel(), -1) for one in (x, g))
    products, sums = x.new_empty(len(x)), x.new_empty(len(x))
    arrays = _arrays(x, g, products, sums)
    if not arrays:
        products, sums = (x * g).sum(1), g.sum(1)
    else:
        _loops().channels(*arrays)
    return products.view(shape), sums.view(shape)


def affine_sums(x: Tensor, g: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What gain and bias after a normalisation get from every example.

    Args:
        x: What was normalised, shape (B, T, ...).
        g: The gradient of what came out.
        mean: Of each token, shape (B, T, 1, ...).
        scale: What each was multiplied by.

    Returns:
        The sums over tokens of g times the normalised x, and of g: shape (B, ...).
    """
    shape = x.shape[:2]
    arrays = _arrays(*(one.reshape(*shape, -1) for one in (x, g)), *(one.reshape(shape) for one in (mean, scale)))
    if not arrays:
        return (g * ((x - mean) * scale)).sum(1), g.sum(1)
    gains, biases = (x.new_zeros(len(x), *x.shape[2:]) for _ in range(2))
    _loops().normalised(*arrays, gains.view(len(x), -1).numpy(), biases.view(len(x), -1).numpy())
    return gains, biases


def _arrays(*tensors: Tensor | None) -> list[Any]:
    """The memory of tensors, as the loops want it; nothing if they cannot work on these."""
    given = [one for one in tensors if one is not None]
    kinds = {one.dtype for one in given if one.dtype not in (torch.float64, torch.int64)}
    if len(kinds) > 1 or not all(
        one.device.type == "cpu" and one.dtype in _LOOPED and one.is_contiguous() for one in given
    ):
        return []
    return [None if one is None else one.detach().numpy() for one in tensors]


@cache
def _loops() -> ModuleType:
    """The loops, whose compiler is not loaded before it is needed."""
    from noetherflow.noise import loops

    return loops

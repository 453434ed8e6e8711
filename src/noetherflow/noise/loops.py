"""Plain loops that numba compiles: one pass over memory where functions of tensors take several.

Arrays are of float32 or float64, their last dimension contiguous; sums that are returned are of float64.
"""

from typing import Any

import numpy as np
from numba import njit

# Additions may be reordered; NaN and infinity have to stay what they are.
_compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

# Rows whose columns are summed in the precision of the numbers.
_BLOCK = 256


@_compiled
def scan(matrix: Any, rows: Any, columns: Any, entries: Any, total: Any) -> None:
    """Add the squares of a matrix (n, m) to entries, and their sums to rows (n,) and columns (m,); itself to a total.

    All but rows may be None.
    """
    n, m = matrix.shape
    zero = matrix.dtype.type(0)
    sums = np.empty(m, matrix.dtype)
    for first in range(0, n, _BLOCK):
        sums[:] = zero
        for i in range(first, min(first + _BLOCK, n)):
            length = zero
            for j in range(m):
                value = matrix[i, j]
                square = value * value
                length += square
                if columns is not None:
                    sums[j] += square
                if entries is not None:
                    entries[i, j] += square
                if total is not None:
                    total[i, j] += value
            rows[i] += length
        if columns is not None:
            for j in range(m):
                columns[j] += sums[j]


@_compiled
def lengths(matrix: Any, found: Any) -> None:
    """Write the sum of squares of each row of a matrix (n, m) to found (n,)."""
    n, m = matrix.shape
    for i in range(n):
        length = matrix.dtype.type(0)
        for j in range(m):
            length += matrix[i, j] * matrix[i, j]
        found[i] = length


@_compiled
def weigh(matrix: Any, weights: Any, columns: Any) -> None:
    """Add the squares of every row of a matrix (n, m), times its weight, to columns (m,)."""
    n, m = matrix.shape
    own = np.empty(m, matrix.dtype)
    for first in range(0, n, _BLOCK):
        own[:] = matrix.dtype.type(0)
        for i in range(first, min(first + _BLOCK, n)):
            weight = weights[i]
            for j in range(m):
                own[j] += weight * (matrix[i, j] * matrix[i, j])
        for j in range(m):
            columns[j] += own[j]


@_compiled
def pile(stack: Any, total: Any, squares: Any) -> None:
    """Add the rows of a stack (n, m) to a total (m,), and their squares to squares (m,)."""
    n, m = stack.shape
    sums, own = np.empty(m, stack.dtype), np.empty(m, stack.dtype)
    for first in range(0, n, _BLOCK):
        sums[:] = own[:] = stack.dtype.type(0)
        for i in range(first, min(first + _BLOCK, n)):
            for j in range(m):
                sums[j] += stack[i, j]
                own[j] += stack[i, j] * stack[i, j]
        for j in range(m):
            total[j] += sums[j]
            squares[j] += own[j]


@_compiled
def vectors(stack: Any, total: Any, squares: Any) -> None:
    """The same into the first of two rows (2, m + 1), the squares of the total into the second; sums come last."""
    m = len(total)
    pile(stack, total, squares[0, :m])
    for j in range(m):
        squares[1, j] = np.float64(total[j]) ** 2
    for k in range(2):
        squares[k, m] = squares[k, :m].sum()


@_compiled
def read_rows(table: Any, first: int, ids: Any, outputs: Any) -> None:
    """Add outputs (T, m) to the rows of a table that ids (T,) name; the table (n, m) starts with a certain row."""
    n, m = table.shape
    for t in range(len(ids)):
        row = ids[t] - first
        if 0 <= row < n:
            for j in range(m):
                table[row, j] += outputs[t, j]


@_compiled
def tabulate(ids: Any, outputs: Any, rows: Any, columns: Any, total: Any) -> None:
    """Add outputs (B, T, m) to the rows of a total (n, m) that ids (B, T) name, and the squares of each example's sums.

    Squares are summed by row (n,) and by column (m,).
    """
    (size, tokens), (n, m) = ids.shape, total.shape
    places, owners = np.full(n, -1), np.empty(tokens, np.int64)
    sums, squares = np.empty((tokens, m), total.dtype), np.empty(m, total.dtype)
    for b in range(size):
        count = 0
        for t in range(tokens):
            row = ids[b, t]
            place = places[row]
            if place < 0:
                places[row] = place = count
                owners[count] = row
                sums[count] = outputs[b, t]
                count += 1
            else:
                for j in range(m):
                    sums[place, j] += outputs[b, t, j]
        squares[:] = total.dtype.type(0)
        for k in range(count):
            row, length = owners[k], total.dtype.type(0)
            places[row] = -1
            for j in range(m):
                value = sums[k, j]
                length += value * value
                squares[j] += value * value
                total[row, j] += value
            rows[row] += length
        for j in range(m):
            columns[j] += squares[j]


@_compiled
def channels(x: Any, g: Any, products: Any, sums: Any) -> None:
    """Write the sum of x g, and that of g, of each row of matrices (n, m), to vectors (n,)."""
    n, m = x.shape
    for i in range(n):
        product, total = x.dtype.type(0), x.dtype.type(0)
        for j in range(m):
            product += x[i, j] * g[i, j]
            total += g[i, j]
        products[i], sums[i] = product, total


@_compiled
def normalised(x: Any, g: Any, mean: Any, scale: Any, gains: Any, biases: Any) -> None:
    """Add what gain and bias (B, m) get from tokens x (B, T, m) of some mean and scale (B, T), of gradients g."""
    size, tokens, m = x.shape
    for b in range(size):
        for t in range(tokens):
            centre, factor = mean[b, t], scale[b, t]
            for j in range(m):
                gains[b, j] += g[b, t, j] * ((x[b, t, j] - centre) * factor)
                biases[b, j] += g[b, t, j]

"""Plain loops that numba compiles: one pass over memory where functions of tensors take several.

Arrays are of float32 or float64, their last dimension contiguous; sums that are returned are of float64. What calls one
another is in one file: numba keeps what it compiled until that file changes.
"""

from typing import Any

import numpy as np
from numba import njit

# Additions may be reordered; NaN and infinity have to stay what they are.
compiled_loop = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

# Rows whose columns are summed in the precision of the numbers.
BLOCK = 256


@compiled_loop
def scan_vectors(stack: Any, numbers: Any, whole: Any, rows: int, columns: int, entries: Any, total: Any) -> None:
    """Add the squares of vectors (B, m) to entries, their sums to numbers, themselves to a total; and its squares, too.

    The latter go to whole, and to the second row of entries. The sum of all goes to the first number; those of single
    entries and, again, that of all to numbers that begin somewhere, or nowhere if that is negative.
    """
    n, m = stack.shape
    zero = stack.dtype.type(0)
    sums, own = np.empty(m, stack.dtype), np.empty(m, stack.dtype)
    squares = np.zeros((2, m))
    for first in range(0, n, BLOCK):
        sums[:] = own[:] = zero
        for i in range(first, min(first + BLOCK, n)):
            for j in range(m):
                sums[j] += stack[i, j]
                own[j] += stack[i, j] * stack[i, j]
        for j in range(m):
            total[j] += sums[j]
            squares[0, j] += own[j]
    for j in range(m):
        squares[1, j] = np.float64(total[j]) ** 2
    for row in range(2):
        mine = whole if row else numbers
        length = squares[row].sum()
        mine[0] += length
        if columns >= 0:
            mine[columns] += length
        for j in range(m):
            if rows >= 0:
                mine[rows + j] += squares[row, j]
            if entries is not None:
                entries[row, j] += squares[row, j]


@compiled_loop
def scan_outer(x: Any, g: Any, numbers: Any, rows: int, columns: int) -> None:
    """Add the squares of products g x^T of vectors g (B, n) and x (B, m), which are not formed, to numbers, as ever."""
    (size, m), n = x.shape, g.shape[1]
    zero = x.dtype.type(0)
    lengths, weights = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    by_row, by_column = np.empty(n, x.dtype), np.empty(m, x.dtype)
    for first in range(0, size, BLOCK):
        count = min(BLOCK, size - first)
        by_row[:] = zero
        by_column[:] = zero
        for i in range(count):
            length = zero
            for j in range(m):
                length += x[first + i, j] * x[first + i, j]
            lengths[i] = length
        for i in range(count):
            length, weight = zero, lengths[i]
            for j in range(n):
                square = g[first + i, j] * g[first + i, j]
                length += square
                by_row[j] += weight * square
            weights[i] = length
            numbers[0] += np.float64(length) * weight
        if rows >= 0:
            for j in range(n):
                numbers[rows + j] += by_row[j]
        if columns >= 0:
            for i in range(count):
                weight = weights[i]
                for j in range(m):
                    by_column[j] += weight * (x[first + i, j] * x[first + i, j])
            for j in range(m):
                numbers[columns + j] += by_column[j]


@compiled_loop
def scan_tables(ids: Any, outputs: Any, numbers: Any, rows: int, columns: int, total: Any) -> None:
    """The same for tables, to whose rows that ids (B, T) name outputs (B, T, m) are added; their sum to a total."""
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
            numbers[0] += length
            if rows >= 0:
                numbers[rows + row] += length
        if columns >= 0:
            for j in range(m):
                numbers[columns + j] += squares[j]


@compiled_loop
def channels(x: Any, g: Any, products: Any, sums: Any) -> None:
    """Write the sum of x g, and that of g, of each row of matrices (n, m), to vectors (n,)."""
    n, m = x.shape
    for i in range(n):
        product, total = x.dtype.type(0), x.dtype.type(0)
        for j in range(m):
            product += x[i, j] * g[i, j]
            total += g[i, j]
        products[i], sums[i] = product, total


@compiled_loop
def group_norm_back(x: Any, g: Any, weight: Any, mean: Any, scale: Any, back: Any, gains: Any, biases: Any) -> None:
    """From the gradient g of what comes out of a normalisation over groups of channels to all others, in one pass.

    Args:
        x: What was normalised, shape (B, channels, S).
        g: The same shape.
        weight: Shape (channels,).
        mean: Of each group, shape (B, groups).
        scale: What each was multiplied by.
        back: The gradient of x.
        gains: What the weight gets from every example, shape (B, channels).
        biases: The same of the bias.
    """
    (size, channels, places), groups = x.shape, mean.shape[1]
    count = channels // groups
    for b in range(size):
        for group in range(groups):
            centre, factor = mean[b, group], scale[b, group]
            tilt = shift = x.dtype.type(0)
            for c in range(group * count, (group + 1) * count):
                product = total = x.dtype.type(0)
                for s in range(places):
                    product += x[b, c, s] * g[b, c, s]
                    total += g[b, c, s]
                gains[b, c], biases[b, c] = (product - centre * total) * factor, total
                tilt -= weight[c] * gains[b, c]
                shift -= weight[c] * total
            # A gradient has no component along what the normalisation takes away: the mean, and the scale.
            tilt *= factor * factor / x.dtype.type(count * places)
            shift = shift * factor / x.dtype.type(count * places) - tilt * centre
            for c in range(group * count, (group + 1) * count):
                slope = factor * weight[c]
                for s in range(places):
                    back[b, c, s] = slope * g[b, c, s] + (tilt * x[b, c, s] + shift)


@compiled_loop
def normalised(x: Any, g: Any, mean: Any, scale: Any, gains: Any, biases: Any) -> None:
    """Add what gain and bias (B, m) get from tokens x (B, T, m) of some mean and scale (B, T), of gradients g."""
    size, tokens, m = x.shape
    for b in range(size):
        for t in range(tokens):
            centre, factor = mean[b, t], scale[b, t]
            for j in range(m):
                gains[b, j] += g[b, t, j] * ((x[b, t, j] - centre) * factor)
                biases[b, j] += g[b, t, j]

"""Plain loops that numba compiles: a pass over a block of gradients while the cache holds it, and over activations.

Arrays are of float32 or float64, their last dimension contiguous. Functions that call each other are in this file:
numba keeps what it compiled until the file changes.
"""

from typing import Any

import numpy as np
from numba import njit

# Additions may be reordered; NaN and infinity have to stay what they are.
compiled = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

# Rows whose columns are summed in the dtype of the numbers.
BLOCK = 256


@compiled
def accumulate(stack: Any, numbers: Any, rows: int, columns: int, entries: Any, total: Any) -> None:
    """Add the squares of matrices (B, n, m) to entries (n, m), their sums to numbers, the matrices to a total (n, m).

    The sum of all squares goes to numbers[0], sums by row to numbers[rows:], by column to numbers[columns:], nowhere if
    the index is negative. Entries and total may be None.
    """
    size, n, m = stack.shape
    zero = stack.dtype.type(0)
    sums = np.empty(m, stack.dtype)
    for b in range(size):
        matrix = stack[b]
        for first in range(0, n, BLOCK):
            sums[:] = zero
            for i in range(first, min(first + BLOCK, n)):
                length = zero
                for j in range(m):
                    value = matrix[i, j]
                    square = value * value
                    length += square
                    if columns >= 0:
                        sums[j] += square
                    if entries is not None:
                        entries[i, j] += square
                    if total is not None:
                        total[i, j] += value
                numbers[0] += length
                if rows >= 0:
                    numbers[rows + i] += length
            if columns >= 0:
                for j in range(m):
                    numbers[columns + j] += sums[j]


@compiled
def channel_sums(x: Any, d: Any, products: Any, sums: Any) -> None:
    """Write the sum of x d, and that of d, of each row of matrices (n, m), to vectors (n,)."""
    n, m = x.shape
    for i in range(n):
        product, total = x.dtype.type(0), x.dtype.type(0)
        for j in range(m):
            product += x[i, j] * d[i, j]
            total += d[i, j]
        products[i], sums[i] = product, total


@compiled
def group_norm_back(x: Any, d: Any, weight: Any, mean: Any, scale: Any, back: Any, gains: Any, biases: Any) -> None:
    """The backward pass of a normalisation over groups of channels, in one pass.

    Args:
        x: What was normalised, shape (B, channels, S).
        d: Gradients of the outputs, of the same shape.
        weight: Shape (channels,).
        mean: Of each group, shape (B, groups).
        scale: What each centred group was multiplied by.
        back: Where the gradient of x is written.
        gains: Where the gradients of the weight are written, shape (B, channels).
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
                    product += x[b, c, s] * d[b, c, s]
                    total += d[b, c, s]
                gains[b, c], biases[b, c] = (product - centre * total) * factor, total
                tilt -= weight[c] * gains[b, c]
                shift -= weight[c] * total
            # A gradient has no component along what the normalisation takes away: the mean, and the scale.
            tilt *= factor * factor / x.dtype.type(count * places)
            shift = shift * factor / x.dtype.type(count * places) - tilt * centre
            for c in range(group * count, (group + 1) * count):
                slope = factor * weight[c]
                for s in range(places):
                    back[b, c, s] = slope * d[b, c, s] + (tilt * x[b, c, s] + shift)


@compiled
def affine_sums(x: Any, d: Any, mean: Any, scale: Any, gains: Any, biases: Any) -> None:
    """Add gradients of gain and bias (B, m) for tokens x (B, T, m), their mean and scale (B, T), and gradients d."""
    size, tokens, m = x.shape
    for b in range(size):
        for t in range(tokens):
            centre, factor = mean[b, t], scale[b, t]
            for j in range(m):
                gains[b, j] += d[b, t, j] * ((x[b, t, j] - centre) * factor)
                biases[b, j] += d[b, t, j]

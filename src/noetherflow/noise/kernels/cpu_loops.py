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
# Columns of four rows that the first level of the cache holds.
COLUMNS = 1280
# Tokens of so many columns that the second one holds.
TOKENS = 256
# Places of four rows and four columns that the first level holds.
PLACES = 1152
# Vectors have that many numbers at most: rows are padded to a multiple.
LANES = 16


@compiled
def accumulate(stack: Any, numbers: Any, rows: int, columns: int, entries: Any, total: Any, weights: Any) -> None:
    """Add the squares of matrices (B, n, m) to entries (n, m), their sums to numbers, the matrices to a total (n, m).

    The sum of all squares goes to numbers[0], that of squares times weights (n, m) to numbers[1], sums by row to
    numbers[rows:], by column to numbers[columns:], nowhere if the index is negative. Entries, total and weights may be
    None.
    """
    size, n, m = stack.shape
    zero = stack.dtype.type(0)
    sums = np.empty(m, stack.dtype)
    for b in range(size):
        matrix = stack[b]
        for first in range(0, n, BLOCK):
            sums[:] = zero
            for i in range(first, min(first + BLOCK, n)):
                length = weighted = zero
                for j in range(m):
                    value = matrix[i, j]
                    square = value * value
                    length += square
                    if weights is not None:
                        weighted += weights[i, j] * square
                    if columns >= 0:
                        sums[j] += square
                    if entries is not None:
                        entries[i, j] += square
                    if total is not None:
                        total[i, j] += value
                numbers[0] += length
                if weights is not None:
                    numbers[1] += weighted
                if rows >= 0:
                    numbers[rows + i] += length
            if columns >= 0:
                for j in range(m):
                    numbers[columns + j] += sums[j]


@compiled
def multiply(left: Any, right: Any, out: Any) -> None:
    """Write left right (B, n, m), for left (B, n, T) and right (B, T, m), n and T multiples of 4.

    The second level of the cache holds some tokens of right, the first one four rows of out.
    """
    tokens, m = right.shape[1:]
    tiles = -(-m // COLUMNS)
    width = -(-m // (tiles * LANES)) * LANES  # of tiles that are equally wide
    for b in range(len(out)):
        for first in range(0, tokens, TOKENS):
            last = min(first + TOKENS, tokens)
            for start in range(0, m, width):
                _multiply_tile(left[b], right[b], out[b], first, last, start, min(start + width, m))


@compiled
def _multiply_tile(left: Any, right: Any, out: Any, first: int, last: int, start: int, stop: int) -> None:
    """What tokens from the first to the last add to some columns: 16 numbers of left are held in registers."""
    for i in range(0, len(out), 4):
        o0, o1, o2, o3 = out[i, start:stop], out[i + 1, start:stop], out[i + 2, start:stop], out[i + 3, start:stop]
        for t in range(first, last, 4):
            a0, a1, a2, a3 = left[i, t], left[i, t + 1], left[i, t + 2], left[i, t + 3]
            b0, b1, b2, b3 = left[i + 1, t], left[i + 1, t + 1], left[i + 1, t + 2], left[i + 1, t + 3]
            c0, c1, c2, c3 = left[i + 2, t], left[i + 2, t + 1], left[i + 2, t + 2], left[i + 2, t + 3]
            d0, d1, d2, d3 = left[i + 3, t], left[i + 3, t + 1], left[i + 3, t + 2], left[i + 3, t + 3]
            x0, x1 = right[t, start:stop], right[t + 1, start:stop]
            x2, x3 = right[t + 2, start:stop], right[t + 3, start:stop]
            if t == 0:
                for j in range(stop - start):
                    o0[j] = a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
                    o1[j] = b0 * x0[j] + b1 * x1[j] + b2 * x2[j] + b3 * x3[j]
                    o2[j] = c0 * x0[j] + c1 * x1[j] + c2 * x2[j] + c3 * x3[j]
                    o3[j] = d0 * x0[j] + d1 * x1[j] + d2 * x2[j] + d3 * x3[j]
            else:
                for j in range(stop - start):
                    o0[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
                    o1[j] += b0 * x0[j] + b1 * x1[j] + b2 * x2[j] + b3 * x3[j]
                    o2[j] += c0 * x0[j] + c1 * x1[j] + c2 * x2[j] + c3 * x3[j]
                    o3[j] += d0 * x0[j] + d1 * x1[j] + d2 * x2[j] + d3 * x3[j]


@compiled
def patch_products(
    d: Any,
    images: Any,
    padded: Any,
    spots: Any,
    places: Any,
    moves: Any,
    numbers: Any,
    entries: Any,
    total: Any,
    weights: Any,
    run: int,
) -> None:
    """Form the gradients of a convolution's weight example by example from patches, and accumulate each.

    Args:
        d: Gradients of the outputs, shape (B, n, places).
        images: Shape (B, channels, pixels).
        padded: Zeros, shape (pixels of a padded image, channels).
        spots: Where each pixel is in the padded image.
        places: Where each patch begins in the padded image as a vector.
        moves: How far from there each run of numbers of the patch is.
        numbers: The total, weighted sum, sums by row and sums by column, of padded matrices.
        entries: Padded matrix, or None.
        total: Padded matrix, with at least n rows and as many columns as a patch has numbers.
        weights: Padded matrix, or None.
        run: Length of a run.
    """
    size, n, count = d.shape
    rows, m = total.shape
    tokens = count + -count % 4
    left, right = np.zeros((1, rows, tokens), d.dtype), np.zeros((1, tokens, m), d.dtype)
    image, block = padded.reshape(padded.size), np.empty((1, rows, m), d.dtype)
    for b in range(size):
        left[0, :n, :count] = d[b]
        for c in range(images.shape[1]):
            for j in range(len(spots)):
                padded[spots[j], c] = images[b, c, j]
        for t in range(count):
            for k in range(len(moves)):
                # Slices, so that the inner loop need not look whether an index is negative.
                start = places[t] + moves[k]
                source, target = image[start : start + run], right[0, t, k * run : (k + 1) * run]
                for j in range(run):
                    target[j] = source[j]
        multiply(left, right, block)
        accumulate(block, numbers, 2, 2 + rows, entries, total, weights)


@compiled
def plane_products(
    d: Any,
    images: Any,
    spots: Any,
    rows: Any,
    columns: Any,
    numbers: Any,
    entries: Any,
    total: Any,
    weights: Any,
    tokens: int,
) -> None:
    """Form the gradients of a convolution's weight example by example as inner products, and accumulate each.

    Args:
        d: Gradients of the outputs, shape (B, n, places).
        images: Shape (B, channels, pixels).
        spots: Where each pixel is in the plane of its channel.
        rows: Where each row of places begins in a plane.
        columns: Where in the planes of all channels the numbers begin that meet each column of a padded matrix; the
            last one after all planes, where zeros are.
        numbers: The total, weighted sum, sums by row and sums by column, of padded matrices.
        entries: Padded matrix, or None.
        total: Padded matrix, with at least n rows and as many columns as a patch has numbers.
        weights: Padded matrix, or None.
        tokens: Length of inner products: of the part of a plane where places are, rounded up to LANES.
    """
    size, n, count = d.shape
    channels = images.shape[1]
    extent, length = columns[-1] // channels, count // len(rows)
    left, planes = np.zeros((len(total), tokens), d.dtype), np.zeros(columns[-1] + tokens, d.dtype)
    block = np.empty((1, *total.shape), d.dtype)
    tiles = -(-tokens // PLACES)
    width = -(-tokens // (tiles * LANES)) * LANES
    for b in range(size):
        for c in range(channels):
            plane, image = planes[c * extent : (c + 1) * extent], images[b, c]
            for j in range(len(spots)):
                plane[spots[j]] = image[j]
        for i in range(n):
            for r in range(len(rows)):
                source, target = d[b, i, r * length : (r + 1) * length], left[i, rows[r] : rows[r] + length]
                for j in range(length):
                    target[j] = source[j]
        block[:] = 0
        for first in range(0, tokens, width):
            _inner_products(left, planes, columns, block[0], first, min(first + width, tokens))
        accumulate(block, numbers, 2, 2 + len(total), entries, total, weights)


@compiled
def _inner_products(left: Any, planes: Any, columns: Any, out: Any, first: int, last: int) -> None:
    """Add what places from the first to the last add to inner products of left and planes: 16 are held in registers."""
    zero = left.dtype.type(0)
    for i in range(0, len(left), 4):
        w, x, y, z = left[i, first:last], left[i + 1, first:last], left[i + 2, first:last], left[i + 3, first:last]
        for k in range(0, out.shape[1], 4):
            p, q = planes[columns[k] + first :], planes[columns[k + 1] + first :]
            u, v = planes[columns[k + 2] + first :], planes[columns[k + 3] + first :]
            wp = wq = wu = wv = xp = xq = xu = xv = yp = yq = yu = yv = zp = zq = zu = zv = zero
            for t in range(last - first):
                wp += w[t] * p[t]
                wq += w[t] * q[t]
                wu += w[t] * u[t]
                wv += w[t] * v[t]
                xp += x[t] * p[t]
                xq += x[t] * q[t]
                xu += x[t] * u[t]
                xv += x[t] * v[t]
                yp += y[t] * p[t]
                yq += y[t] * q[t]
                yu += y[t] * u[t]
                yv += y[t] * v[t]
                zp += z[t] * p[t]
                zq += z[t] * q[t]
                zu += z[t] * u[t]
                zv += z[t] * v[t]
            sums = ((wp, wq, wu, wv), (xp, xq, xu, xv), (yp, yq, yu, yv), (zp, zq, zu, zv))
            for r in range(4):
                for s in range(4):
                    out[i + r, k + s] += sums[r][s]


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
def affine_sums(x: Any, d: Any, mean: Any, scale: Any, gains: Any, biases: Any) -> None:
    """Add gradients of gain and bias (B, m) for tokens x (B, T, m), their mean and scale (B, T), and gradients d."""
    size, tokens, m = x.shape
    for b in range(size):
        for t in range(tokens):
            centre, factor = mean[b, t], scale[b, t]
            for j in range(m):
                gains[b, j] += d[b, t, j] * ((x[b, t, j] - centre) * factor)
                biases[b, j] += d[b, t, j]

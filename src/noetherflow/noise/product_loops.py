"""Loops that multiply matrices and go over the product while the cache holds it, and that pass by itself.

Like those of `loops.py`; they call what PyTorch multiplies with, at addresses that `native.py` finds.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from noetherflow.noise.loops import BLOCK, compiled_loop

# Numbers that the cache reads at a time, if they are of float32.
_LINE = 16
# Terms of the entries of a product that are added up at a time, and as many more as give so many numbers.
_DEPTH = 256
_DEEP = 2**15
# Rows of so many numbers, or a multiple of that, have to be moved apart: too few places in the cache serve them.
_ALIKE = 256
# What BLAS calls a matrix as it is, and one that is to be transposed.
_AS_IS, _TURNED = ord("N"), ord("T")


# Which arguments of a product are arrays.
_ARRAYS = (6, 8, 11)


def _routine(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a BLAS product of matrices; arguments in its own order, addresses of arrays as numbers."""

    # Whole numbers have 64 bits, of which a BLAS that works with 32 reads the lower half.
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        where, given = values
        number, passed = ir.IntType(64), []
        for index, one in enumerate(cgutils.unpack_tuple(builder, given)):  # type: ignore[no-untyped-call]
            if index not in _ARRAYS:
                # Fortran takes everything by reference.
                place = cgutils.alloca_once_value(builder, one)  # type: ignore[no-untyped-call]
                one = builder.ptrtoint(place, number)
            passed.append(one)
        passed += [number(1)] * 2  # the lengths of the two letters, which some compilers of Fortran pass on
        kind = ir.FunctionType(ir.VoidType(), [number] * len(passed))
        builder.call(builder.inttoptr(where, kind.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(address, arguments), code


_multiply: Any = intrinsic(_routine)


def _kernel(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a product of matrices that takes its arguments as they are, addresses and truth values as whole numbers."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        where, given = values
        passed = cgutils.unpack_tuple(builder, given)  # type: ignore[no-untyped-call]
        assert all(one.type == ir.IntType(64) for one in passed)
        kind = ir.FunctionType(ir.VoidType(), [one.type for one in passed])
        builder.call(builder.inttoptr(where, kind.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(address, arguments), code


_multiply_few: Any = intrinsic(_kernel)


def _square(typing: Any, matrix: Any, first: Any, start: Any, out: Any, places: Any) -> Any:
    """Write the columns of a square of a matrix, from some row and column on, as `turn` does."""

    # Transposed in registers: left to itself the compiler moves one number at a time.
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (matrix, out, places), (row, column) = (
            [context.make_array(signature.args[i])(context, builder, values[i]) for i in (0, 3, 4)], values[1:3]
        )  # fmt: skip
        number, kind = ir.IntType(64), context.get_data_type(signature.args[0].dtype)
        size, line = context.get_abi_sizeof(kind), ir.VectorType(kind, _LINE)

        def at(data: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(builder.ptrtoint(data, number), offset), line.as_pointer())

        across = builder.extract_value(matrix.strides, 0)
        lines = []
        for i in range(_LINE):
            offset = builder.mul(builder.add(row, number(i)), across)
            place = at(matrix.data, builder.add(offset, builder.mul(column, number(size))))
            lines.append(builder.load(place, align=size))
        # Swap the two halves off the diagonal of the square, of its quarters, and so on.
        half = _LINE // 2
        while half:
            upper = [j if not j & half else j - half + _LINE for j in range(_LINE)]
            lower = [j + half if not j & half else j + _LINE for j in range(_LINE)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), _LINE), one) for one in (upper, lower)]
            for i in range(_LINE):
                if not i & half:
                    pair = lines[i], lines[i + half]
                    lines[i], lines[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            half //= 2
        for j in range(_LINE):
            place = builder.load(builder.gep(places.data, [builder.add(column, number(j))]))
            builder.store(lines[j], at(out.data, builder.mul(builder.add(place, row), number(size))), align=size)
        return context.get_dummy_value()

    return types.void(matrix, first, start, out, places), code


_turn_square: Any = intrinsic(_square)


@compiled_loop
def padding(length: int) -> int:
    """How many numbers to leave free after every row of so many."""
    return _LINE if length > _ALIKE and length % _ALIKE == 0 else 0


@compiled_loop
def _depth(terms: int, m: int) -> int:
    """How many terms of the entries of a product (n, m) are added up at a time."""
    return min(terms, max(_DEPTH, _DEEP // m))


@compiled_loop
def scan(matrix: Any, numbers: Any, rows: int, columns: int, entries: Any, total: Any, fresh: bool) -> None:
    """Add the squares of a matrix (n, m) to entries, and their sums to numbers; itself to a total.

    The sum of all goes to the first number, those by row and by column to numbers that begin somewhere, or nowhere if
    that is negative; entries and total may be None. A fresh total holds anything, and is written.
    """
    n, m = matrix.shape
    zero = matrix.dtype.type(0)
    sums = np.empty(m, matrix.dtype)
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
                    total[i, j] = value if fresh else total[i, j] + value
            numbers[0] += length
            if rows >= 0:
                numbers[rows + i] += length
        if columns >= 0:
            for j in range(m):
                numbers[columns + j] += sums[j]


@compiled_loop
def scan_stack(stack: Any, numbers: Any, rows: int, columns: int, entries: Any, total: Any) -> None:
    """The same for every matrix of a stack (B, n, m)."""
    for i in range(len(stack)):
        scan(stack[i], numbers, rows, columns, entries, total, i == 0)


@compiled_loop
def turn(matrix: Any, out: Any, places: Any) -> None:
    """Write the columns of a matrix (n, m) to memory, each from its own place on."""
    n, m = matrix.shape
    whole, full = n - n % _LINE, m - m % _LINE
    for start in range(0, full, _LINE):
        for first in range(0, whole, _LINE):
            _turn_square(matrix, first, start, out, places)
    for i in range(n):
        for j in range(full if i < whole else 0, m):
            out[places[j] + i] = matrix[i, j]


@compiled_loop
def read_rows(table: Any, first: int, ids: Any, outputs: Any) -> None:
    """Add outputs (T, m) to the rows of a table that ids (T,) name; the table (n, m) starts with a certain row."""
    n, m = table.shape
    for t in range(len(ids)):
        row = ids[t] - first
        if 0 <= row < n:
            for j in range(m):
                table[row, j] += outputs[t, j]


@compiled_loop
def _turned_product(kernel: int, left: Any, right: Any, turned: Any, places: Any, spaced: Any, out: Any) -> None:
    """Write left^T right to out (k, m), for left (T, k) and the first m columns of right (T, ...).

    Args:
        kernel: The address of a product.
        left: The left matrix.
        right: The right one.
        turned: Memory for some rows of the left one, turned.
        places: Where in it each column of these goes, shape (k,).
        spaced: Memory for as many of the right one, moved apart; of no row if they need not be.
        out: Where to.
    """
    tokens, (k, m) = len(left), out.shape
    step, apart = len(turned) // k, len(spaced) > 0
    wide = spaced.shape[1] if apart else right.shape[1]
    for first in range(0, tokens, step):
        count = min(step, tokens - first)
        turn(left[first : first + count], turned, places)
        for t in range(count if apart else 0):
            for j in range(m):
                spaced[t, j] = right[first + t, j]
        rows = spaced if apart else right[first:]
        matrices = (turned.ctypes.data, rows.ctypes.data, out.ctypes.data)
        _multiply_few(kernel, (k, m, count, step, wide, m, int(first > 0), *matrices, 0))


@compiled_loop
def sum_products(kernel: int, left: Any, right: Any, first: int, out: Any) -> None:
    """Write left^T right to out (k, m), for some columns of left (T, n) and the first ones of right (T, ...).

    Args:
        kernel: The address of a product.
        left: The left matrix.
        right: The right one, its rows apart where they have to be.
        first: The first of these columns.
        out: Where to.
    """
    k, m = out.shape
    depth, spaced = _depth(len(left), m), np.empty((0, m), out.dtype)
    turned, places = np.empty(k * depth, out.dtype), depth * np.arange(k)
    _turned_product(kernel, left[:, first : first + k], right, turned, places, spaced, out)


@compiled_loop
def outer_products(
    product: int, kernel: int, left: Any, right: Any, first: int, ids: Any, outputs: Any, heads: Any, grams: Any,
    numbers: Any, rows: int, columns: int, entries: Any, total: Any,
) -> None:  # fmt: skip
    """Form the products left^T right of matrices (B, T, n) and (B, T, m) one after the other, and scan each.

    Args:
        product: The address of BLAS' product.
        kernel: That of a faster one for such matrices, or 0.
        left: With all columns, of which as many as the total has rows are used.
        right: The other matrices.
        first: The first of these columns, and so the first row of the products that is formed.
        ids: Rows of the products to which outputs are added (B, T'), or of no token.
        outputs: Shape (B, T', m).
        heads: Of each Gram matrix that is wanted: the dimension, first row and number of rows, and where it begins.
        grams: Where these are added up.
        numbers: Where to add squares, as in `scan`.
        rows: Where sums by row begin, or a negative number.
        columns: The same by column.
        entries: Squares of single entries, or None.
        total: The sum of products; holds anything.
    """
    tokens, n = left.shape[1:]
    strip = np.empty_like(total)
    k, m = strip.shape
    one, zero = strip.dtype.type(1), strip.dtype.type(0)
    into = strip.ctypes.data
    depth, apart = _depth(tokens, m), padding(m)
    turned, places = np.empty(k * depth if kernel else 0, strip.dtype), depth * np.arange(k)
    spaced = np.empty((depth if kernel and apart else 0, m + apart), strip.dtype)
    for b in range(len(left)):
        if kernel:
            _turned_product(kernel, left[b, :, first : first + k], right[b], turned, places, spaced, strip)
        else:
            # BLAS takes columns for rows.
            mine = left[b].ctypes.data + first * left.itemsize
            matrices = (right[b].ctypes.data, m, mine, n, zero, into, m)
            _multiply(product, (_AS_IS, _TURNED, m, k, tokens, one, *matrices))
        if ids.shape[1]:
            read_rows(strip, first, ids[b], outputs[b])
        for h in range(len(heads)):
            dim, start, size, place = heads[h]
            out = grams.ctypes.data + place * grams.itemsize
            if dim == 0:
                head = into + start * m * strip.itemsize
                _multiply(product, (_TURNED, _AS_IS, size, size, m, one, head, m, head, m, one, out, size))
            else:
                head = into + start * strip.itemsize
                _multiply(product, (_AS_IS, _TURNED, size, size, k, one, head, m, head, m, one, out, size))
        scan(strip, numbers, rows, columns, entries, total, b == 0)


@compiled_loop
def patch_products(
    product: int, kernel: int, left: Any, images: Any, length: int, spots: Any, places: Any, moves: Any,
    numbers: Any, rows: int, columns: int, entries: Any, total: Any,
) -> None:  # fmt: skip
    """The same for products of matrices (B, n, P) and the patches of images, which are copied one after the other.

    Args:
        product: The address of BLAS' product.
        kernel: That of a faster one for such matrices, or 0.
        left: The left matrices.
        images: Shape (B, channels, S).
        length: How long a padded image is, whose channels come last.
        spots: Where in it each of the S places begins.
        places: Where each patch begins, shape (P,).
        moves: How far from there each run of numbers of the patch is.
        numbers: Where to add squares, as in `scan`.
        rows: Where sums by row begin, or a negative number.
        columns: The same by column.
        entries: Squares of single entries, or None.
        total: The sum of products (n, m), whose channels come first; holds anything.
    """
    (n, m), count, channels = total.shape, len(places), images.shape[1]
    run, depth, wide = m // len(moves), _depth(count, m), m + padding(m)
    image, patches = np.zeros(length, total.dtype), np.empty((count, wide), total.dtype)
    strip, whole, found = np.empty_like(total), np.empty_like(total), np.zeros_like(numbers)
    squares: Any = None if entries is None else np.zeros_like(entries)
    one, zero = total.dtype.type(1), total.dtype.type(0)
    for b in range(len(left)):
        turn(images[b], image, spots)
        for i in range(count):
            for j in range(len(moves)):
                start = places[i] + moves[j]
                # Slices, so that the inner loop need not look whether an index is negative.
                source, target = image[start : start + run], patches[i, j * run : (j + 1) * run]
                for k in range(run):
                    target[k] = source[k]
        if kernel:
            for first in range(0, count, depth):
                sizes = (n, m, min(depth, count - first), count, wide, m)
                starts = (left[b, :, first:].ctypes.data, patches[first:].ctypes.data, strip.ctypes.data)
                _multiply_few(kernel, (*sizes, int(first > 0), *starts, 0))
        else:
            matrices = (patches.ctypes.data, wide, left[b].ctypes.data, count, zero, strip.ctypes.data, m)
            _multiply(product, (_AS_IS, _AS_IS, m, n, count, one, *matrices))
        scan(strip, found, rows, columns, squares, whole, b == 0)
    # Channels came last, as they do in memory where patches are copied: back to their place.
    channel = m // channels * np.arange(channels)
    if columns >= 0:
        by_column = found[columns : columns + m].copy()
        turn(by_column.reshape(-1, channels), found[columns:], channel)
    for j in range(len(found)):
        numbers[j] += found[j]
    for i in range(n):
        turn(whole[i].reshape(-1, channels), total[i], channel)
        if entries is not None:
            turn(squares[i].reshape(-1, channels), strip[i], channel)
            for j in range(m):
                entries[i, j] += strip[i, j]


@compiled_loop
def inner_products(product: int, kernel: int, x: Any, out: Any, rows: int) -> None:
    """Write the inner products of the rows of matrices (B, n, m), shape (B, n, n): some rows with those before them.

    Args:
        product: The address of BLAS' product.
        kernel: That of a faster one for such matrices, or 0.
        x: The matrices.
        out: Where to.
        rows: How many at a time: the fewer, the less is formed twice.
    """
    n, m = x.shape[1:]
    one, zero = x.dtype.type(1), x.dtype.type(0)
    depth, wide = _depth(m, n), n + padding(n)
    turned, places = np.empty(depth * wide if kernel else 0, x.dtype), wide * np.arange(depth)
    for b in range(len(x)):
        for start in range(0, m if kernel else 0, depth):
            some = x[b, :, start : start + depth]
            turn(some, turned, places)
            for first in range(0, n, rows):
                last = min(first + rows, n)
                sizes = (last - first, last, some.shape[1], m, wide, n)
                starts = (some[first:].ctypes.data, turned.ctypes.data, out[b, first:].ctypes.data)
                _multiply_few(kernel, (*sizes, int(start > 0), *starts, 0))
        for first in range(0, n, rows):
            last = min(first + rows, n)
            if not kernel:
                matrices = (x[b].ctypes.data, m, x[b, first:].ctypes.data, m, zero, out[b, first:].ctypes.data, n)
                _multiply(product, (_TURNED, _AS_IS, last, last - first, m, one, *matrices))
            for i in range(first, last):
                for j in range(first):
                    out[b, j, i] = out[b, i, j]

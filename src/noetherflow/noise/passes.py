"""Single passes over tensors: by a compiled loop where there is one for them, by functions of tensors elsewhere."""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherflow._extras import has
from noetherflow.noise.asked import ABSENT
from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.native import Task, cut, in_parallel, kernel_of, product_of, team_size

# What the loops are compiled for.
_LOOPED = (torch.float32, torch.float64, torch.int64)
# Rows of which all inner products are formed at once, although each is there twice.
_FEW = 64
# Numbers that have to be read before it pays to wake another thread.
_LOAD = 2**19


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type in which sums are kept: float32 or better."""
    kind = tensor.dtype
    return kind if kind is torch.float32 or kind is torch.float64 else torch.promote_types(kind, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in that type."""
    kind = accumulator(tensor)
    return tensor if tensor.dtype is kind else tensor.to(kind)


def scanner(
    matrix: Tensor, sums: Sums, row: int, first: int = 0, total: Tensor | None = None
) -> Callable[[bool], None]:
    """A pass over what a matrix holds whenever it is called: its squares are added to sums, itself to a total.

    Args:
        matrix: Some rows of a gradient, shape (n, m), contiguous.
        sums: Where to add squares.
        row: To which of the two rows.
        first: Which row of the gradient is the first of these.
        total: Shape (n, m), or None.

    Returns:
        The pass; it is told whether the total is fresh: holds anything, and is to be written.
    """
    page, (n, m) = sums.page, matrix.shape
    rows = page.rows_from(first)
    entries = None if sums.entries is None else sums.entries[row].view(-1, m)[first : first + n]
    arrays = arrays_of(matrix, entries, total, into=sums)
    if arrays:
        array, entries, total = arrays
        scan, numbers, columns = compiled_products().scan, sums.arrays[row], page.columns
        if parts_of(n, matrix.numel()) == 1:
            return lambda fresh: scan(array, numbers, rows, columns, entries, total, fresh)

        def some(part: slice, numbers: Any, fresh: bool) -> Task:
            mine = (None if one is None else one[part] for one in (entries, total))
            return partial(scan, array[part], numbers, page.rows_from(first + part.start), columns, *mine, fresh)

        return lambda fresh: _shared(n, matrix.numel(), partial(some, fresh=fresh), numbers)

    def once(fresh: bool) -> None:
        squares = wide(matrix).square()
        _add(sums.numbers[row], squares.sum(1), rows, squares.sum(0) if page.columns != ABSENT else None, page.columns)
        if entries is not None:
            entries.add_(squares)
        if total is not None:
            _ = total.copy_(matrix) if fresh else total.add_(matrix)

    return once


def scan_stack(stack: Tensor, sums: Sums) -> Tensor:
    """Add the squares of matrices (B, n, m) to sums over examples; their total, in the accumulator's type."""
    total = stack.new_empty(stack.shape[1:], dtype=accumulator(stack))
    page = sums.page
    entries = None if sums.entries is None else sums.entries[EACH].view(total.shape)
    arrays = arrays_of(stack, entries, total, into=sums)
    if arrays:
        compiled_products().scan_stack(arrays[0], sums.arrays[EACH], page.rows, page.columns, *arrays[1:])
        return total
    squares = wide(stack).square().sum(0)
    _add(sums.numbers[EACH], squares.sum(1), page.rows, squares.sum(0), page.columns)
    if entries is not None:
        entries.add_(squares)
    return stack.sum(0, dtype=total.dtype)


def scan_vectors(stack: Tensor, sums: Sums) -> Tensor:
    """Add the squares of vectors (B, m) to sums, and of their total to those of the whole; that total."""
    total = stack.new_zeros(stack.shape[1], dtype=accumulator(stack))
    page = sums.page
    entries = None if sums.entries is None else sums.entries.view(2, -1)
    arrays = arrays_of(stack, entries, total, into=sums)
    if arrays:
        compiled().scan_vectors(arrays[0], *sums.arrays, page.rows, page.columns, *arrays[1:])
        return total
    total = stack.sum(0, dtype=total.dtype)
    for row, squares in ((EACH, wide(stack).square().sum(0).double()), (WHOLE, total.double().square())):
        _add(sums.numbers[row], squares, page.rows, squares.sum(), page.columns)
        if entries is not None:
            entries[row].add_(squares)
    return total


def scan_outer(x: Tensor, g: Tensor, sums: Sums) -> None:
    """Add the squares of outer products of vectors g (B, n) and x (B, m) to sums over examples, but for entries."""
    page = sums.page
    arrays = arrays_of(x, g, into=sums)
    if arrays:
        scan = compiled().scan_outer
        _shared(
            len(x),
            x.numel() + g.numel(),
            lambda part, numbers: partial(scan, *(one[part] for one in arrays), numbers, page.rows, page.columns),
            sums.arrays[EACH],
        )
        return
    squares = [wide(one).square() for one in (x, g)]
    lengths = [one.sum(1) for one in squares]
    _add(sums.numbers[EACH], lengths[0] @ squares[1], page.rows, lengths[1] @ squares[0], page.columns)


def gram(x: Tensor) -> Tensor:
    """The inner products of the rows of matrices (B, n, m), shape (B, n, n)."""
    arrays = arrays_of(x) if x.shape[1] > _FEW else []
    product = product_of(x.dtype) if arrays else 0
    if not product:
        return x @ x.mT
    n, m = x.shape[1:]
    found = x.new_empty(len(x), n, n)
    rows = max(_FEW, n // 8)  # every part has a kernel of its own
    compiled_products().inner_products(product, kernel_of(x.dtype, n, m, n), *arrays, found.numpy(), rows)
    return found


def add_tokens(part: Tensor, first: int, ids: Tensor, outputs: Tensor) -> None:
    """Add what every token (T,) of an example puts out (T, m) to the row that it reads of a table.

    Args:
        part: Some rows of the table; what other rows get is left out.
        first: Which row of the table is the first of these.
        ids: The row of each token.
        outputs: Their gradients.
    """
    arrays = arrays_of(part, ids, outputs)
    if arrays:
        table, *rest = arrays
        compiled_products().read_rows(table, first, *rest)
        return
    inside = (ids >= first) & (ids < first + len(part))
    part.index_add_(0, torch.where(inside, ids - first, 0), torch.where(inside[:, None], outputs, 0.0))


def scan_tables(ids: Tensor, outputs: Tensor, sums: Sums) -> Tensor:
    """Add the squares of gradients of a table, of which each token reads a row, to sums over examples, but for entries.

    Tokens of one example that read the same row are summed first.

    Args:
        ids: Shape (B, T).
        outputs: Gradients, shape (B, T, m).
        sums: Where to.

    Returns:
        The sum of all gradients.
    """
    page = sums.page
    count = page.shape[0]
    total = outputs.new_zeros(page.shape, dtype=accumulator(outputs))
    arrays = arrays_of(ids, outputs, total, into=sums)
    if arrays:
        compiled().scan_tables(*arrays[:2], sums.arrays[EACH], page.rows, page.columns, arrays[2])
        return total
    row, found = distinct_rows(ids, outputs, count)
    squares = wide(found).square()
    rows = sums.numbers.new_zeros(count).index_add_(0, row, squares.sum(1, dtype=torch.float64))
    _add(sums.numbers[EACH], rows, page.rows, squares.sum(0, dtype=torch.float64), page.columns)
    return total.index_add_(0, row, wide(found))


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
    arrays = arrays_of(x, g, products, sums)
    if not arrays:
        products, sums = (x * g).sum(1), g.sum(1)
    else:
        _shared(len(x), x.numel(), lambda part, _: partial(compiled().channels, *(one[part] for one in arrays)))
    return products.view(shape), sums.view(shape)


def group_norm_back(
    x: Tensor, g: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of a normalisation over groups of channels.

    Args:
        x: What was normalised, shape (B, channels, ...).
        g: The gradient of what came out.
        weight: Shape (channels,), or None.
        mean: Of each group, shape (B, groups).
        scale: What each was multiplied by.

    Returns:
        The gradient of x, and what weight and bias get from every example, shape (B, channels).
    """
    size, channels, groups = *x.shape[:2], mean.shape[1]
    x, g = x.contiguous(), g.contiguous()
    back, gains, biases = torch.empty_like(x), x.new_empty(size, channels), x.new_empty(size, channels)
    full = x.new_ones(channels) if weight is None else weight.contiguous()
    arrays = arrays_of(x.flatten(2), g.flatten(2), full, mean, scale, back.flatten(2), gains, biases)
    if arrays:

        def some(part: slice, _: Any) -> Task:
            x, g, weight, *rest = arrays
            return partial(compiled().group_norm_back, x[part], g[part], weight, *(one[part] for one in rest))

        _shared(size, x.numel(), some)
        return back, gains, biases
    sizes = (size, channels, x[0, 0].numel(), groups)
    back = torch.ops.aten.native_group_norm_backward(g, x, mean, scale, weight, *sizes, [True, False, False])[0]
    products, sums = channel_sums(x, g)
    m, r = (one.repeat_interleave(channels // groups, 1) for one in (mean, scale))
    return back, (products - m * sums) * r, sums


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
    arrays = arrays_of(*(one.reshape(*shape, -1) for one in (x, g)), *(one.reshape(shape) for one in (mean, scale)))
    if not arrays:
        return (g * ((x - mean) * scale)).sum(1), g.sum(1)
    gains, biases = (x.new_zeros(len(x), *x.shape[2:]) for _ in range(2))
    arrays += [one.view(len(x), -1).numpy() for one in (gains, biases)]
    _shared(len(x), x.numel(), lambda part, _: partial(compiled().normalised, *(one[part] for one in arrays)))
    return gains, biases


def parts_of(length: int, load: int) -> int:
    """Into how many parts, for as many threads, a loop over so many indices is to be cut.

    Args:
        length: Number of indices.
        load: Number of numbers that are read.

    Returns:
        One if it is too little to wake a thread.
    """
    return max(1, min(team_size(), length, load // _LOAD))


def _shared(length: int, load: int, work: Callable[[slice, Any], Task], numbers: Any = None) -> None:
    """Run a loop over so many indices, on several threads if there is enough to do.

    Args:
        length: Number of indices.
        load: Number of numbers that are read.
        work: From some indices, and where to add up, to the loop over these.
        numbers: Where all of it is to be added; every thread but the first has zeros of its own.
    """
    slices = cut(length, parts_of(length, load))
    own = [numbers, *(None if numbers is None else np.zeros_like(numbers) for _ in slices[1:])]
    in_parallel([work(part, one) for part, one in zip(slices, own, strict=True)])
    if numbers is not None:
        numbers += sum(own[1:])


def _add(numbers: Tensor, by_row: Tensor, rows: int, by_column: Tensor | None, columns: int) -> None:
    """Add sums by row and by column to a vector in which they begin somewhere, or nowhere."""
    numbers[0] += by_row.sum(dtype=torch.float64)
    for part, start in ((by_row, rows), (by_column, columns)):
        if part is not None and start != ABSENT:
            numbers[start : start + part.numel()] += part


def arrays_of(*tensors: Tensor | None, into: Sums | None = None) -> list[Any]:
    """The memory of tensors, as the loops want it; nothing if they cannot work on these, or write to these sums."""
    if not compiles() or (into is not None and into.arrays is None):
        return []
    for one in tensors:
        if one is not None and not (one.dtype in _LOOPED and one.is_cpu and one.is_contiguous()):
            return []
    return [None if one is None else (one.detach() if one.requires_grad else one).numpy() for one in tensors]


@cache
def compiles() -> bool:
    """Whether numba, which compiles the loops, is installed; without it functions of tensors do all the work."""
    return has("numba")


@cache
def compiled() -> ModuleType:
    """The loops, whose compiler is not loaded before it is needed."""
    from noetherflow.noise import loops

    return loops


@cache
def compiled_products() -> ModuleType:
    """The same of those that multiply."""
    from noetherflow.noise import product_loops

    return product_loops

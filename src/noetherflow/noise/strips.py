"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner, transposed
from noetherflow.noise.products import Strip, compiled_strip, compiled_sum
from noetherflow.noise.squares import GramSums, gradient_grams
from noetherflow.noise.uses import Outer, Product, Rows, multiply

# Numbers of a gradient that are formed at a time.
_STRIP = 2**18


def in_strips(
    use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows] = (), *, wanted: bool = True
) -> Tensor | None:
    """The arithmetic of autograd's own product, and one pass more over what the cache holds.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares.
        like: A tensor of the dtype and device of the gradients.
        tables: Its other uses: as a table whose rows are read.
        wanted: Whether the sum of the gradients is.

    Returns:
        That sum, or None.
    """
    if not isinstance(use, Outer) or sums.page.asked.grams:
        return _at_once(use, sums, like, tables, wanted=wanted)
    n, m = sums.page.shape
    if n > m and n * m <= _STRIP and not tables:
        # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
        turned = sums.turned()
        total = _at_once(Outer((), use.outputs, use.inputs), turned, like, (), wanted=wanted)
        if sums.entries is not None and turned.entries is not None:
            sums.entries.add_(turned.entries.mT)
        return None if total is None else transposed(total)
    rows = _rows(n, m)
    # What nobody wants stays in the cache: every strip is written over the last one.
    total = like.new_empty(n if wanted else rows, m, dtype=accumulator(like))
    _form(use, sums, like, total, rows, tables)
    return total if wanted else None


def sum_in_strips(x: Tensor, g: Tensor, sums: Sums, *, wanted: bool) -> Tensor | None:
    """The sum of outer products of vectors g (N, n) and x (N, m), whose squares are added up while the cache holds them.

    Args:
        x: Vectors.
        g: The others.
        sums: Where to add squares of the whole.
        wanted: Whether the sum is.

    Returns:
        The sum, or None.
    """
    n, m = sums.page.shape
    rows = _rows(n, m)
    kept = wanted or bool(sums.page.grams)
    total = x.new_empty(n if kept else rows, m, dtype=accumulator(x))
    form = compiled_sum(x, g, total) or (lambda part, into: multiply(g[:, part].mT, x, into))
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        into = total[part] if kept else total[: part.stop - start]
        form(part, into)
        scanner(into, sums, WHOLE, start)(False)
    if not kept:
        return None
    sums.add_grams(WHOLE, gradient_grams(sums.page.asked, total))
    return total


def _rows(n: int, m: int) -> int:
    """How many rows of a gradient are formed at a time."""
    return -(-n // max(1, -(-n * m // _STRIP)))


def _at_once(use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows], *, wanted: bool) -> Tensor | None:
    """All rows in one strip: Gram matrices need them, and patches of images are made once per example."""
    shape, asked = sums.page.shape, sums.page.asked
    total = like.new_empty(shape[0], shape[1:].numel(), dtype=accumulator(like))
    flat = sums if isinstance(use, Outer) else sums.flat(total)
    grams = GramSums(asked.grams, use.folded(total, shape)) if asked.grams else None
    _form(use, flat, like, total, shape[0], tables, grams)
    if flat is not sums:
        sums.take(flat, lambda matrix: use.folded(matrix, shape))
    if not wanted and grams is None:
        return None
    gradient = use.folded(total, shape).contiguous()
    if grams is not None:
        sums.add_grams(EACH, grams.found())
        sums.add_grams(WHOLE, gradient_grams(asked, gradient))
    return gradient


def _form(
    use: Product,
    sums: Sums,
    like: Tensor,
    total: Tensor,
    rows: int,
    tables: Sequence[Rows],
    grams: GramSums | None = None,
) -> None:
    """Add up the squares of a gradient and the gradient itself, some rows after the other.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares, of the gradient as a matrix.
        like: A tensor of the dtype and device of the gradients.
        total: Where to write the sum over examples: shape (n, m), or (rows, m) for one strip after the other.
        rows: How many are formed at a time.
        tables: Further uses.
        grams: Gram matrices of all rows.
    """
    n, kept = sums.page.shape[0], total.shape[0] == sums.page.shape[0]
    form = compiled_strip(use, sums, total, rows, tables, grams) or _strip_of_tensors(
        use, sums, like, rows, tables, grams
    )
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        into = total[part] if kept else total[: part.stop - start]
        form(part, into)
        scanner(into, sums, WHOLE, start)(False)


def _strip_of_tensors(
    use: Product, sums: Sums, like: Tensor, rows: int, tables: Sequence[Rows], grams: GramSums | None
) -> Strip:
    buffer = like.new_empty(rows, sums.page.shape[1:].numel())

    def form(part: slice, total: Tensor) -> None:
        strip = buffer[: len(total)]
        scan = scanner(strip, sums, EACH, part.start, total)
        for index, (left, right) in enumerate(use.factors(part)):
            multiply(left, right, strip)
            for table in tables:
                add_tokens(strip, part.start, table.ids[index], table.outputs[index].to(strip.dtype))
            if grams is not None:
                grams.add(use.folded(strip, grams.shape))
            scan(index == 0)

    return form

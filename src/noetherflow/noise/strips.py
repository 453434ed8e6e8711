"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner, transposed
from noetherflow.noise.products import scan_products
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
        total = _at_once(Outer((), use.outputs, use.inputs), turned, like, (), wanted=True)
        if sums.entries is not None and turned.entries is not None:
            sums.entries.add_(turned.entries.mT)
        return transposed(total) if wanted and total is not None else None
    rows = -(-n // -(-n * m // _STRIP))
    # What nobody wants stays in the cache: every strip is written over the last one.
    gradient = like.new_empty(n if wanted else rows, m, dtype=accumulator(like))
    if not scan_products(use, sums, gradient, rows, tables):
        _form(use, sums, like.new_empty(rows, m), gradient, tables)
    return gradient if wanted else None


def _at_once(use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows], *, wanted: bool) -> Tensor | None:
    """All rows in one strip: Gram matrices need them, and patches of images are made once per example."""
    shape, asked = sums.page.shape, sums.page.asked
    buffer = like.new_empty(shape[0], shape[1:].numel())
    total = like.new_empty(buffer.shape, dtype=accumulator(like))
    flat = sums if isinstance(use, Outer) else sums.flat(total)
    grams = GramSums(asked.grams, use.folded(buffer, shape)) if asked.grams else None
    if not scan_products(use, flat, total, len(total), tables, grams):
        _form(use, flat, buffer, total, tables, grams)
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
    use: Product, sums: Sums, buffer: Tensor, total: Tensor, tables: Sequence[Rows], grams: GramSums | None = None
) -> None:
    """Add up the squares of a gradient and the gradient itself, some rows after the other.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares, of the gradient as a matrix.
        buffer: Memory for these rows of one example's gradient.
        total: Where to add up gradients, holding anything: shape (n, m), or that of the buffer for one strip after the
            other.
        tables: Further uses.
        grams: Looks at the buffer if all rows are in it.
    """
    n = sums.page.shape[0]
    for start in range(0, n, len(buffer)):
        part = slice(start, min(start + len(buffer), n))
        strip = buffer[: part.stop - start]
        into = total[part] if len(total) == n else total[: len(strip)]
        scan = scanner(strip, sums, EACH, start, into)
        for index, (left, right) in enumerate(use.factors(part)):
            multiply(left, right, strip)
            for table in tables:
                add_tokens(strip, start, table.ids[index], table.outputs[index].to(strip.dtype))
            if grams is not None:
                grams.add()
            scan(index == 0)
        scanner(into, sums, WHOLE, start)(False)

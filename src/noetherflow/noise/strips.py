"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner, turn
from noetherflow.noise.squares import GramSums, gradient_grams
from noetherflow.noise.uses import Outer, Product, Rows, multiply

# Numbers of a gradient that are formed at a time.
_STRIP = 2**18


def in_strips(use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows] = ()) -> Tensor:
    """The arithmetic of autograd's own product, and one pass more over what the cache holds.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares.
        like: A tensor of the dtype and device of the gradients.
        tables: Its other uses: as a table whose rows are read.

    Returns:
        The sum of the gradients.
    """
    if not isinstance(use, Outer) or sums.page.asked.grams:
        return _at_once(use, sums, like, tables)
    n, m = sums.page.shape
    gradient = like.new_empty(n, m, dtype=accumulator(like))
    if n <= m or tables:
        for _ in _strips(use, sums, _strip(n, m, like), gradient, tables):
            pass
        return gradient
    # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
    turned, buffer = sums.turned(), _strip(m, n, like)
    total = gradient.new_empty(buffer.shape)
    for part, whole in _strips(Outer((), use.outputs, use.inputs), turned, buffer, total):
        turn(whole, gradient[:, part])
    if sums.entries is not None and turned.entries is not None:
        sums.entries.add_(turned.entries.mT)
    return gradient


def _at_once(use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows]) -> Tensor:
    """All rows in one strip: Gram matrices need them, and patches of images are made once per example."""
    shape, asked = sums.page.shape, sums.page.asked
    buffer = like.new_empty(shape[0], shape[1:].numel())
    total = like.new_empty(buffer.shape, dtype=accumulator(like))
    flat = sums if isinstance(use, Outer) else sums.flat(total)
    grams = GramSums(asked.grams, use.folded(buffer, shape)) if asked.grams else None
    for _ in _strips(use, flat, buffer, total, tables, grams):
        pass
    gradient = use.folded(total, shape).contiguous()
    if flat is not sums:
        sums.take(flat, lambda matrix: use.folded(matrix, shape))
    if grams is not None:
        sums.add_grams(EACH, grams.found())
        sums.add_grams(WHOLE, gradient_grams(asked, gradient))
    return gradient


def _strip(n: int, m: int, like: Tensor) -> Tensor:
    """Memory for some rows of a gradient: as many strips of one height as are needed."""
    return like.new_empty(-(-n // -(-n * m // _STRIP)), m)


def _strips(
    use: Product,
    sums: Sums,
    buffer: Tensor,
    total: Tensor,
    tables: Sequence[Rows] = (),
    grams: GramSums | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Add up the squares of a gradient and the gradient itself, some rows after the other.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares, of the gradient as a matrix.
        buffer: Holds these rows of one example's gradient.
        total: Where to add up gradients, holding anything: of the height of the buffer, or of the whole gradient.
        tables: Further uses.
        grams: Looks at the buffer if all rows are in it.

    Yields:
        Which rows they are, and the sum of their gradients.
    """
    n = sums.page.shape[0]
    for start in range(0, n, len(buffer)):
        part = slice(start, min(start + len(buffer), n))
        strip = buffer[: part.stop - start]
        whole = total[part] if len(total) == n else total[: len(strip)]
        scan = scanner(strip, sums, EACH, start, whole)
        for index, (left, right) in enumerate(use.factors(part)):
            multiply(left, right, strip)
            for table in tables:
                add_tokens(strip, start, table.ids[index], table.outputs[index].to(strip.dtype))
            if grams is not None:
                grams.add()
            scan(index == 0)
        scanner(whole, sums, WHOLE, start)(False)
        yield part, whole

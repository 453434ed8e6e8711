"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Callable, Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner
from noetherflow.noise.products import Strip, compiled_strip, compiled_sum
from noetherflow.noise.squares import GramSums, gradient_grams, square
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
        That sum; None if it is not wanted and was not kept.
    """
    if not isinstance(use, Outer) or sums.page.asked.grams:
        return _at_once(use, sums, like, tables)
    return _one_after_the_other(lambda rows, total: _former(use, sums, like, total, rows, tables), sums, like, wanted)


def sum_in_strips(x: Tensor, g: Tensor, sums: Sums, *, wanted: bool) -> Tensor | None:
    """The sum of outer products of vectors g (N, n) and x (N, m), and its squares.

    Args:
        x: Vectors.
        g: The others.
        sums: Where to add squares of the whole.
        wanted: Whether the sum is.

    Returns:
        The sum; None if it is not wanted and was not kept.
    """

    def former(_: int, total: Tensor) -> Strip:
        return compiled_sum(x, g, total) or (lambda part, into: multiply(g[:, part].mT, x, into))

    asked = sums.page.asked
    total = _one_after_the_other(former, sums, x, wanted or bool(asked.grams))
    if total is not None:
        sums.add_grams(WHOLE, gradient_grams(asked, total))
    return total


def _one_after_the_other(
    former: Callable[[int, Tensor], Strip], sums: Sums, like: Tensor, wanted: bool
) -> Tensor | None:
    """Form a gradient some rows at a time, and add up its squares while the cache holds them."""
    n, m = sums.page.shape
    rows = -(-n // max(1, -(-n * m // _STRIP)))
    # What nobody wants stays in the cache: every strip is written over the last one.
    total = like.new_empty(n if wanted else rows, m, dtype=accumulator(like))
    form = former(rows, total)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        into = total[part] if wanted else total[: part.stop - start]
        form(part, into)
        scanner(into, sums, WHOLE, start)(False)
    return total if wanted else None


def _at_once(use: Product, sums: Sums, like: Tensor, tables: Sequence[Rows]) -> Tensor:
    """All rows in one strip: Gram matrices need them, and patches of images are made once per example."""
    shape, asked = sums.page.shape, sums.page.asked
    total = like.new_empty(shape[0], shape[1:].numel(), dtype=accumulator(like))
    flat = sums if isinstance(use, Outer) else sums.flat(total)
    grams = GramSums(asked.grams, use.folded(total, shape)) if asked.grams else None
    _former(use, flat, like, total, shape[0], tables, grams)(slice(0, shape[0]), total)
    if flat is not sums:
        sums.take(flat, lambda matrix: use.folded(matrix, shape))
    if grams is not None:
        sums.add_grams(EACH, grams.found())
    gradient = use.folded(total, shape).contiguous()
    square(gradient, sums, WHOLE)
    return gradient


def _former(
    use: Product,
    sums: Sums,
    like: Tensor,
    total: Tensor,
    rows: int,
    tables: Sequence[Rows],
    grams: GramSums | None = None,
) -> Strip:
    """How to form some rows of every example's gradient.

    Args:
        use: A use of the whole parameter.
        sums: Where to add up squares, of the gradient as a matrix.
        like: A tensor of the dtype and device of the gradients.
        total: A matrix of as many columns, and of the type of the sum of gradients.
        rows: How many are formed at a time, at most.
        tables: Further uses.
        grams: Where to add Gram matrices of all rows.

    Returns:
        The function.
    """
    compiled = compiled_strip(use, sums, total, rows, tables, grams)
    return compiled or _strip_of_tensors(use, sums, like, rows, tables, grams)


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

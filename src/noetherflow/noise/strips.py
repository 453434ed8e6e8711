"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Callable, Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner
from noetherflow.noise.products import Strip, compiled_strip, compiled_sum
from noetherflow.noise.squares import GramSums, gradient_grams
from noetherflow.noise.uses import Convolution, Product, Rows, multiply

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
    shape, asked = sums.page.shape, sums.page.asked
    grams = GramSums(asked.grams, like.new_empty(()).expand(shape)) if asked.grams else None
    # Gram matrices need all rows, and patches of images are made once per example.
    at_once = grams is not None or isinstance(use, Convolution)

    def former(rows: int, total: Tensor) -> Strip:
        compiled = compiled_strip(use, sums, total, rows, tables, grams)
        return compiled or _strip_of_tensors(use, sums, like, rows, tables, grams)

    total = _one_after_the_other(former, sums, like, wanted=wanted, at_once=at_once)
    if grams is not None:
        sums.add_grams(EACH, grams.found())
    return total


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

    return _one_after_the_other(former, sums, x, wanted=wanted, at_once=False)


def _one_after_the_other(
    former: Callable[[int, Tensor], Strip], sums: Sums, like: Tensor, *, wanted: bool, at_once: bool
) -> Tensor | None:
    """Form a gradient some rows at a time, and add up its squares while the cache holds them.

    Args:
        former: From how many rows at most are formed at a time, and a matrix of as many columns, to what forms them.
        sums: Where to add up squares.
        like: A tensor of the dtype and device of the gradient.
        wanted: Whether it is.
        at_once: Whether all rows are formed at a time.

    Returns:
        The gradient; None if it was not kept.
    """
    shape = sums.page.shape
    n, m = shape[0], shape[1:].numel()
    rows = n if at_once else -(-n // max(1, -(-n * m // _STRIP)))
    kept = wanted or at_once or bool(sums.page.grams)
    # What nobody wants stays in the cache: every strip is written over the last one.
    total = like.new_empty(n if kept else rows, m, dtype=accumulator(like))
    form = former(rows, total)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        into = total[part] if kept else total[: part.stop - start]
        form(part, into)
        scanner(into, sums, WHOLE, start)(False)
    if not kept:
        return None
    gradient = total.view(shape)
    sums.add_grams(WHOLE, gradient_grams(sums.page.asked, gradient))
    return gradient


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
                grams.add(strip.view(grams.shape))
            scan(index == 0)

    return form

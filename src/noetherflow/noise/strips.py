"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Sequence

from torch import Tensor

from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, add_tokens, scanner
from noetherflow.noise.squares import GramSums, gradient_grams
from noetherflow.noise.uses import Outer, Product, Rows, multiply

# Numbers of a gradient that are formed at a time.
_STRIP = 3 * 2**16


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
    shape, asked = sums.page.shape, sums.page.asked
    if isinstance(use, Outer) and shape[0] > shape[1] and not asked.grams and not tables:
        # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
        turned = sums.turned()
        gradient = in_strips(Outer((), use.outputs, use.inputs), turned, like)
        if sums.entries is not None and turned.entries is not None:
            sums.entries.add_(turned.entries.mT)
        return gradient.mT.contiguous()
    n, m = shape[0], shape[1:].numel()
    # Patches of images are made once per example; Gram matrices need all rows at once.
    step = -(-n // -(-n * m // _STRIP)) if isinstance(use, Outer) and not asked.grams else n
    buffer, gradient = like.new_empty(step, m), like.new_zeros(n, m, dtype=accumulator(like))
    grams = GramSums(asked.grams, use.folded(buffer, shape))
    flat = sums if isinstance(use, Outer) else sums.flat(gradient)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        strip, total = buffer[: part.stop - start], gradient[part]
        scan = scanner(strip, flat, EACH, start, total)
        for index, (left, right) in enumerate(use.factors(part)):
            multiply(left, right, strip)
            for table in tables:
                add_tokens(strip, start, table.ids[index], table.outputs[index].to(strip.dtype))
            grams.add()
            scan()
        scanner(total, flat, WHOLE, start)()
    folded = use.folded(gradient, shape).contiguous()
    if flat is not sums:
        sums.take(flat, lambda matrix: use.folded(matrix, shape))
    sums.add_grams(EACH, grams.found())
    sums.add_grams(WHOLE, gradient_grams(asked, folded))
    return folded

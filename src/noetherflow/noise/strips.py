"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.passes import accumulator, add_tokens
from noetherflow.noise.squares import GramSums, Sums, Tally, gradient_grams
from noetherflow.noise.uses import Outer, Product, Rows, multiply

# Numbers of a gradient that are formed at a time.
_STRIP = 3 * 2**16


def in_strips(use: Product, shape: torch.Size, asked: Asked, like: Tensor, tables: Sequence[Rows] = ()) -> Sums:
    """The arithmetic of autograd's own product, and one pass more over what the cache holds.

    Args:
        use: A use of the whole parameter.
        shape: Of the parameter.
        asked: What to add up.
        like: A tensor of the dtype and device of the gradients.
        tables: Its other uses: as a table whose rows are read.

    Returns:
        The sums.
    """
    if isinstance(use, Outer) and shape[0] > shape[1] and not asked.grams and not tables:
        # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
        other = Asked(asked.columns, asked.rows, asked.entries)
        found = in_strips(Outer((), use.outputs, use.inputs), shape[::-1], other, like)
        assert found.gradient is not None
        return Sums(_turned(found.each), _turned(found.whole), found.gradient.mT.contiguous())
    n, m = shape[0], shape[1:].numel()
    # Patches of images are made once per example; Gram matrices need all rows at once.
    step = -(-n // -(-n * m // _STRIP)) if isinstance(use, Outer) and not asked.grams else n
    buffer, gradient = like.new_empty(step, m), like.new_zeros(n, m, dtype=accumulator(like))
    grams = GramSums(asked.grams, use.folded(buffer, shape))
    each, whole = Tally(asked, gradient), Tally(asked, gradient)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        strip, total = buffer[: part.stop - start], gradient[part]
        scan = each.scanner(strip, part, total)
        for index, (left, right) in enumerate(use.factors(part)):
            multiply(left, right, strip)
            for table in tables:
                add_tokens(strip, start, table.ids[index], table.outputs[index].to(strip.dtype))
            grams.add()
            scan()
        whole.scanner(total, part)()
    folded = use.folded(gradient, shape).contiguous()

    def fold(matrix: Tensor) -> Tensor:
        return use.folded(matrix, shape)

    return Sums(
        each.squares(shape, grams.found(), fold), whole.squares(shape, gradient_grams(asked, folded), fold), folded
    )


def _turned(squares: Squares) -> Squares:
    back = [None if one is None else one.mT for one in (squares.columns, squares.rows, squares.entries)]
    return Squares(squares.total, back[0], back[1], back[2], {})

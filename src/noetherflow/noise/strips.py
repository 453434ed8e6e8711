"""Gradients that are products of two matrices, formed example by example and some rows at a time, for the cache."""

import torch
from torch import Tensor

from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.squares import GramSums, Sums, Tally, accumulator, gradient_grams
from noetherflow.noise.uses import Outer, Product

# Numbers of a gradient that are formed at a time.
_STRIP = 2**17


def in_strips(use: Product, shape: torch.Size, asked: Asked, like: Tensor) -> Sums:
    """The arithmetic of autograd's own product, and two passes more over what the cache holds.

    Args:
        use: The only use of a parameter.
        shape: Of the parameter.
        asked: What to add up.
        like: A tensor of the dtype and device of the gradients.

    Returns:
        The sums.
    """
    if isinstance(use, Outer) and shape[0] > shape[1] and not asked.grams:
        # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
        other = Asked(asked.columns, asked.rows, asked.entries)
        found = in_strips(Outer((), use.outputs, use.inputs), shape[::-1], other, like)
        assert found.gradient is not None
        return Sums(_turned(found.each), _turned(found.whole), found.gradient.mT.contiguous())
    n, m = shape[0], shape[1:].numel()
    # Patches of images are made once per example; Gram matrices need all rows at once.
    step = -(-n // -(-n * m // _STRIP)) if isinstance(use, Outer) and not asked.grams else n
    kind = accumulator(like)
    buffer, gradient = like.new_empty(step, m), like.new_zeros(n, m, dtype=kind)
    grams = GramSums(asked.grams, use.folded(buffer, shape))
    each, whole = Tally(asked), Tally(asked)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        strip, total = buffer[: part.stop - start], gradient[part]
        squares = like.new_zeros(strip.shape, dtype=kind) if asked.entries else None
        lengths = like.new_empty(use.size, len(strip) if asked.rows else 1, dtype=kind)
        blocks = [] if asked.entries else each.blocks(strip)
        for (left, right), length in zip(use.factors(part), lengths.unbind(), strict=True):
            torch.mm(left, right, out=strip)
            for sums, block in blocks:
                sums.addcmul_(block, block)
            if squares is not None:
                squares.addcmul_(strip, strip)
            elif asked.rows:
                torch.linalg.vector_norm(strip, dim=1, dtype=kind, out=length)
            elif not asked.columns:
                torch.linalg.vector_norm(strip, dtype=kind, out=length[0])
            grams.add()
            total += strip
        if squares is not None:
            each.add_squares(squares)
        elif asked.rows or not asked.columns:
            each.add_lengths(lengths.square().sum(0))
        whole.add(total)
    folded = use.folded(gradient, shape).contiguous()

    def fold(matrix: Tensor) -> Tensor:
        return use.folded(matrix, shape)

    return Sums(
        each.squares(shape, grams.found(), fold), whole.squares(shape, gradient_grams(asked, folded), fold), folded
    )


def _turned(squares: Squares) -> Squares:
    back = [None if one is None else one.mT for one in (squares.columns, squares.rows, squares.entries)]
    return Squares(squares.total, back[0], back[1], back[2], {})

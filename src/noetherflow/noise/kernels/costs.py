"""Which formula for outer products costs least; the answer decides nothing but speed.

Unit: a multiplication inside a large matrix product.
"""

from dataclasses import dataclass
from typing import final

from noetherflow.noise.statistics import Requested

# Multiplications of small matrices take that many times as long.
_SMALL_PRODUCTS = 3
# Reading or writing a number of a long vector.
_PASS = 10


@final
@dataclass(frozen=True)
class Costs:
    """What a set of kernels pays for gradients that are formed.

    Args:
        squaring: For every number: reading it, squaring it, adding both up.
        call: For every block.
    """

    squaring: int
    call: int

    def prefer_tokens(self, tokens: int, n: int, m: int, requested: Requested) -> bool:
        """Whether inner products between the tokens of an example cost less than its gradient (n, m)."""
        if requested.entries or requested.weighted or any(axis.within for axis in requested.grams):
            return False
        sides = sum(sides_of(requested))
        products = tokens**2 * (m + n) * max(1, sides)
        passes = tokens * (m + n) * (1 + sides)
        formed = 0
        for axis in requested.grams:
            length, width = (n, m) if axis.dim % 2 == 0 else (m, n)
            size = ((length if axis.stop is None else axis.stop) - (axis.start or 0)) // axis.repeat
            products += size**2 * axis.repeat * tokens
            formed += size**2 * axis.repeat * width
        return _SMALL_PRODUCTS * products + _PASS * passes < formed + self.squaring * m * n + self.call


def prefer_tokens_for_sum(tokens: int, n: int, m: int, requested: Requested) -> bool:
    """Whether the squares of the sum over all tokens of a batch cost less than that sum."""
    if requested.entries or requested.weighted or requested.grams:
        return False
    sides = sum(sides_of(requested))
    products = tokens**2 * (m + n) * (2 * sides or 1)
    return products + _PASS * tokens * (m + n) * (1 + sides) < m * n * (tokens + 2 * _PASS)


def sides_of(requested: Requested) -> tuple[bool, bool]:
    """Whether more than the total is requested of rows, and of columns."""
    dims = {axis.dim % 2 for axis in requested.grams}
    return requested.rows or 0 in dims, requested.columns or 1 in dims

"""From the uses of one parameter to the squares of its per-example gradients, without keeping any of these."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from noetherflow.noise.asked import ABSENT, Asked, Page
from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.passes import accumulator, distinct_rows, gram, scan_outer, scan_tables, scanner, wide
from noetherflow.noise.squares import GramSums, square, square_stack, square_vectors
from noetherflow.noise.strips import in_strips, sum_in_strips
from noetherflow.noise.uses import Convolution, Outer, Product, Rows, Use, Whole
from noetherflow.symmetry import Axis

# Costs in multiplications of a matrix product, measured on current processors; they decide nothing but speed.
_PASS = 10  # reading or writing one number
_CALL = 500_000  # the calls that one example takes by itself
# Examples whose gradients are formed together, if one is smaller than this.
_SMALL = 2**14
_TOGETHER = 2**18


def collect(uses: Sequence[Use], sums: Sums, like: Tensor, *, wanted: bool = True) -> Tensor | None:
    """Add up what is asked for, in the way that costs least.

    Args:
        uses: All uses of the parameter; gradients of different uses are summed before they are squared.
        sums: Where to add squares.
        like: A tensor of the dtype and device of the gradients.
        wanted: Whether the sum of all gradients is wanted, beyond its squares.

    Returns:
        That sum; None if it is not wanted and was not formed.
    """
    shape, asked = sums.page.shape, sums.page.asked
    if len(uses) > 1:
        # First one that fills the whole parameter, if there is any: it need not find zeros.
        uses = sorted(uses, key=lambda use: (isinstance(use, Rows), bool(use.views)))
    if all(isinstance(use, Whole) for use in uses) or len(shape) < 2:
        return _whole(uses, sums, like)
    if len(uses) == 1 and not uses[0].views:
        use = uses[0]
        if isinstance(use, Outer):
            if use.inputs.shape[1] == 1:
                return _token_free(use.inputs[:, 0], use.outputs[:, 0], sums, wanted=wanted)
            if _is_cheaper_by_tokens(use, asked):
                return _by_tokens(use, sums, wanted=wanted)
            if shape.numel() <= _SMALL:
                return _stacked(use, sums)
        if isinstance(use, Rows) and not any(axis.dim % 2 == 0 or axis.within for axis in asked.grams):
            return _table(use, sums)
    first, tables = uses[0], [use for use in uses[1:] if isinstance(use, Rows)]
    grouped = isinstance(first, Convolution) and first.groups > 1
    plain = len(tables) == len(uses) - 1 and not any(use.views for use in uses)
    if isinstance(first, Product) and plain and not grouped:
        return in_strips(first, sums, like, tables, wanted=wanted)
    return _one_by_one(uses, sums, like)


def stacked(uses: Sequence[Use], shape: torch.Size, like: Tensor) -> Tensor:
    """Every example's gradient, shape (B, *shape), for tensors that are made of parameters and go back to them."""
    found = torch.zeros(uses[0].size, *shape, dtype=like.dtype, device=like.device)
    for use in uses:
        for index, one in enumerate(found):
            use.add_to(use.of(one), index)
    return found


def _whole(uses: Sequence[Use], sums: Sums, like: Tensor) -> Tensor:
    """Every example's gradient is there already: biases, gains, and whatever else is small."""
    shape = sums.page.shape
    stack: Tensor | None = None
    for use in uses:
        one = use.gradients if isinstance(use, Whole) and not use.views else stacked([use], shape, like)
        stack = one if stack is None else stack + one
    assert stack is not None
    if len(shape) < 2:
        return square_vectors(stack, sums)
    return _squared(square_stack(stack, sums), sums)


def _squared(gradient: Tensor, sums: Sums) -> Tensor:
    """The sum of all gradients, after its squares were added where they belong."""
    square(gradient, sums, WHOLE)
    return gradient


def _token_free(x: Tensor, g: Tensor, sums: Sums, *, wanted: bool) -> Tensor | None:
    """The gradient of an example is one outer product: every square is a product of squares."""
    scan_outer(x, g, sums)
    if sums.entries is not None:
        sums.entries[EACH].addmm_(wide(g).square().mT, wide(x).square())
    asked = sums.page.asked
    if asked.grams:
        sums.add_grams(EACH, {axis: _outer_gram(axis, wide(x), wide(g)) for axis in asked.grams})
    return _summed(x, g, sums, wanted=wanted)


def _summed(x: Tensor, g: Tensor, sums: Sums, *, wanted: bool) -> Tensor | None:
    """Of tokens x (N, m) and output gradients g (N, n): the sum of all gradients, and its squares."""
    # If only these are wanted, all tokens may as well be those of one example.
    if not wanted and _is_sum_cheaper_by_tokens(len(x), sums.page):
        _square_by_tokens(wide(x)[None], wide(g)[None], sums, WHOLE)
        return None
    return sum_in_strips(x, g, sums, wanted=wanted)


def _outer_gram(axis: Axis, x: Tensor, g: Tensor) -> Tensor:
    """The Gram matrix along one side of outer products: the squared lengths of the other side are weights."""
    side, other = (g, x) if axis.dim % 2 == 0 else (x, g)
    if axis.within is not None:
        other = other[:, axis.within[1] : axis.within[2]]
    weighted = side * torch.linalg.vector_norm(other, dim=1, keepdim=True)
    rows = replace(axis, dim=0, within=None).rows(weighted.mT)
    return (rows @ rows.mT).double()


def _is_cheaper_by_tokens(use: Outer, asked: Asked) -> bool:
    """Whether products between the tokens of an example cost less than forming its gradient."""
    if asked.entries or any(axis.within for axis in asked.grams):
        return False
    _, tokens, m = use.inputs.shape
    n = use.outputs.shape[2]
    on_rows, on_columns = _sides(asked)
    sides = on_rows + on_columns
    products = tokens**2 * (m + n) * max(1, sides)
    passes = tokens * (m + n) * (1 + sides)
    formed = m * n * (2 + (asked.rows and asked.columns))
    for axis in asked.grams:
        (length, width) = (n, m) if axis.dim % 2 == 0 else (m, n)
        size = ((length if axis.stop is None else axis.stop) - (axis.start or 0)) // axis.repeat
        products += size**2 * axis.repeat * tokens
        formed += size**2 * axis.repeat * width // _PASS
    return 3 * products + _PASS * passes < _PASS * formed + _CALL * (m * n > _SMALL)


def _sides(asked: Asked) -> tuple[bool, bool]:
    """Whether more than the total is wanted of rows, and of columns."""
    dims = {axis.dim % 2 for axis in asked.grams}
    return asked.rows or 0 in dims, asked.columns or 1 in dims


def _is_sum_cheaper_by_tokens(tokens: int, page: Page) -> bool:
    """Whether the squares of the sum over all tokens of a batch cost less than that sum."""
    # Products of all tokens are as large as the sum; those of one example, above, are small and take longer for that.
    asked, (n, m) = page.asked, page.shape
    if asked.entries or asked.grams:
        return False
    sides = sum(_sides(asked))
    products = tokens**2 * (m + n) * (2 * sides or 1)  # inner products of tokens, and products of these with tokens
    return products + _PASS * tokens * (m + n) * (1 + sides) < m * n * (tokens + 2 * _PASS)


def _by_tokens(use: Outer, sums: Sums, *, wanted: bool) -> Tensor | None:
    """From the inner products of inputs and those of output gradients, token by token."""
    _square_by_tokens(wide(use.inputs), wide(use.outputs), sums, EACH)
    return _summed(use.inputs.flatten(0, 1), use.outputs.flatten(0, 1), sums, wanted=wanted)


def _square_by_tokens(x: Tensor, g: Tensor, sums: Sums, row: int) -> None:
    """Add the squares of g^T x, for x (B, T, m) and g (B, T, n), without these, to one of the two rows of sums."""
    # Of one example G G^T = g^T (x x^T g): the Gram matrices of all examples are one product.
    page, numbers = sums.page, sums.numbers[row]
    on_rows, on_columns = _sides(page.asked)
    total: Tensor | None = None
    for side, start, wanted, one, other in (
        (0, page.rows, on_rows, g, x), (1, page.columns, on_columns, x, g)
    ):  # fmt: skip
        if wanted:
            spread = gram(other) @ one
            found = (spread * one).sum((0, 1)).double()
            total = found.sum()
            if start != ABSENT:
                numbers[start : start + len(found)] += found
            sums.add_grams(row, _grams_by_tokens(side, page.asked, spread, one))
    numbers[0] += (gram(x) * gram(g)).sum() if total is None else total


def _grams_by_tokens(dim: int, asked: Asked, spread: Tensor, side: Tensor) -> dict[Axis, Tensor]:
    found = {}
    for axis in asked.grams:
        if axis.dim % 2 == dim:
            first, second = (replace(axis, dim=0).rows(one.flatten(0, 1).mT) for one in (spread, side))
            found[axis] = (first @ second.mT).double()
    return found


def _table(use: Rows, sums: Sums) -> Tensor:
    """Tokens of one example that read the same row are summed first."""
    total, asked = scan_tables(use.ids.contiguous(), use.outputs.contiguous(), sums), sums.page.asked
    if asked.entries or asked.grams:
        row, found = distinct_rows(use.ids, use.outputs, len(total))
        one = wide(found)
        if sums.entries is not None:
            sums.entries[EACH].index_add_(0, row, one.square().to(sums.entries.dtype))
        for axis in asked.grams:
            side = replace(axis, dim=0).rows(one.mT)
            sums.add_grams(EACH, {axis: (side @ side.mT).double()})
    return _squared(total, sums)


def _stacked(use: Outer, sums: Sums) -> Tensor:
    """Small gradients, many at a time."""
    step = max(1, _TOGETHER // sums.page.shape.numel())
    parts = zip(use.inputs.split(step), use.outputs.split(step), strict=True)
    gradients = [square_stack(g.mT @ x, sums) for x, g in parts]
    return _squared(torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0], sums)


def _one_by_one(uses: Sequence[Use], sums: Sums, like: Tensor) -> Tensor:
    """One example after the other in one buffer: the arithmetic of autograd's own product, and a few passes more."""
    shape = sums.page.shape
    buffer = like.new_empty(shape)
    first = uses[0] if not uses[0].views and not isinstance(uses[0], Rows) else None
    rest = [(use, use.of(buffer)) for use in uses[first is not None :]]
    matrix = buffer.view(shape[0], -1)
    gradient = torch.empty_like(matrix, dtype=accumulator(buffer))
    grams = GramSums(sums.page.asked.grams, buffer)
    scan = scanner(matrix, sums, EACH, total=gradient)
    for index in range(uses[0].size):
        if first:
            first.write_to(buffer, index)
        else:
            buffer.zero_()
        for use, part in rest:
            use.add_to(part, index)
        grams.add(buffer)
        scan(index == 0)
    sums.add_grams(EACH, grams.found())
    return _squared(gradient.view(shape), sums)

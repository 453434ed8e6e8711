"""From the uses of one parameter to the squares of its per-example gradients, without keeping any of these."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.passes import accumulator, distinct_rows, lengths, table_sums, weighted_squares, wide
from noetherflow.noise.squares import (
    GramSums,
    Sums,
    Tally,
    gradient_grams,
    squares_of,
    squares_of_stack,
    squares_of_vectors,
)
from noetherflow.noise.strips import in_strips
from noetherflow.noise.uses import Convolution, Outer, Product, Rows, Use, Whole
from noetherflow.symmetry import Axis

# Costs in multiplications of a matrix product, measured on current processors; they decide nothing but speed.
_PASS = 10  # reading or writing one number
_CALL = 500_000  # the calls that one example takes by itself
# Examples whose gradients are formed together, if one is smaller than this.
_SMALL = 2**14
_TOGETHER = 2**18
# Numbers that the cache next to a core holds.
_CACHED = 2**18


def completed(sums: Mapping[str, Sums], params: Params, asked: Mapping[str, Asked]) -> dict[str, Sums]:
    """The same, with zeros for parameters that no gradient reached."""
    found = dict(sums)
    for name, one in params.items():
        if name not in found:
            gradient = torch.zeros_like(one)
            nothing = squares_of(gradient, asked[name])
            found[name] = Sums(nothing, nothing, gradient)
    return found


def collect(uses: Sequence[Use], shape: torch.Size, asked: Asked, like: Tensor) -> Sums:
    """Add up what is asked for, in the way that costs least.

    Args:
        uses: All uses of the parameter; gradients of different uses are summed before they are squared.
        shape: Of the parameter.
        asked: What to add up beyond the sum of all squares.
        like: A tensor of the dtype and device of the gradients.

    Returns:
        The sums.
    """
    # First one that fills the whole parameter, if there is any: it need not find zeros.
    uses = sorted(uses, key=lambda use: (isinstance(use, Rows), bool(use.views)))
    if all(isinstance(use, Whole) for use in uses) or len(shape) < 2:
        return _whole(uses, shape, asked, like)
    if len(uses) == 1 and not uses[0].views:
        use = uses[0]
        if isinstance(use, Outer):
            if use.inputs.shape[1] == 1:
                return _token_free(use.inputs[:, 0], use.outputs[:, 0], asked)
            if _is_cheaper_by_tokens(use, asked):
                return _by_tokens(use, asked)
            if shape.numel() <= _SMALL:
                return _stacked(use, shape, asked)
        if isinstance(use, Rows) and not any(axis.dim % 2 == 0 or axis.within for axis in asked.grams):
            return _table(use, shape, asked)
    first, tables = uses[0], [use for use in uses[1:] if isinstance(use, Rows)]
    grouped = isinstance(first, Convolution) and first.groups > 1
    plain = len(tables) == len(uses) - 1 and not any(use.views for use in uses)
    if isinstance(first, Product) and plain and not grouped:
        return in_strips(first, shape, asked, like, tables)
    return _one_by_one(uses, shape, asked, like)


def stacked(uses: Sequence[Use], shape: torch.Size, like: Tensor) -> Tensor:
    """Every example's gradient, shape (B, *shape), for tensors that are made of parameters and go back to them."""
    found = torch.zeros(uses[0].size, *shape, dtype=like.dtype, device=like.device)
    for use in uses:
        for index, one in enumerate(found):
            use.add_to(use.of(one), index)
    return found


def _whole(uses: Sequence[Use], shape: torch.Size, asked: Asked, like: Tensor) -> Sums:
    """Every example's gradient is there already: biases, gains, and whatever else is small."""
    stack: Tensor | None = None
    for use in uses:
        one = use.gradients if isinstance(use, Whole) and not use.views else stacked([use], shape, like)
        stack = one if stack is None else stack + one
    assert stack is not None
    if len(shape) == 1 and not asked.grams:
        return squares_of_vectors(stack.reshape(len(stack), *shape), asked)
    stack = stack.reshape(len(stack), *shape)
    return _sums(*squares_of_stack(stack, asked), asked)


def _token_free(x: Tensor, g: Tensor, asked: Asked) -> Sums:
    """The gradient of an example is one outer product: every square is a product of squares."""
    x_sizes, g_sizes = lengths(x), lengths(g)
    squares = Squares(
        torch.dot(x_sizes, g_sizes).double(),
        weighted_squares(g, x_sizes)[:, None] if asked.rows else None,
        weighted_squares(x, g_sizes)[None] if asked.columns else None,
        wide(g).square().mT @ wide(x).square() if asked.entries else None,
        {axis: _outer_gram(axis, wide(x), wide(g)) for axis in asked.grams},
    )
    gradient = x.new_empty(g.shape[1], x.shape[1])
    whole = Tally(asked, gradient)
    step = max(1, _CACHED // x.shape[1])
    for start in range(0, len(gradient), step):
        part = slice(start, start + step)
        torch.mm(g.mT[part], x, out=gradient[part])
        whole.scanner(gradient[part], part)()
    return Sums(
        squares, whole.squares(gradient.shape, gradient_grams(asked, gradient), lambda matrix: matrix), gradient
    )


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


def _by_tokens(use: Outer, asked: Asked) -> Sums:
    """From the inner products of inputs and those of output gradients, token by token."""
    # With x and g of one example, G G^T = g^T (x x^T g): the Gram matrices of all examples are one product.
    x, g = wide(use.inputs), wide(use.outputs)
    on_rows, on_columns = _sides(asked)
    rows = columns = total = None
    grams = {}
    if on_rows or not on_columns:
        inner = x @ x.mT
        if on_rows:
            spread = inner @ g
            rows = (spread * g).sum((0, 1)).double()[:, None]
            total = rows.sum()
            grams.update(_grams_by_tokens(0, asked, spread, g))
        else:
            total = (inner * (g @ g.mT)).sum().double()
    if on_columns:
        spread = g @ g.mT @ x
        columns = (spread * x).sum((0, 1)).double()[None]
        total = columns.sum() if total is None else total
        grams.update(_grams_by_tokens(1, asked, spread, x))
    assert total is not None
    gradient = use.outputs.flatten(0, 1).mT @ use.inputs.flatten(0, 1)
    each = Squares(total, rows if asked.rows else None, columns if asked.columns else None, None, grams)
    return _sums(each, gradient, asked)


def _grams_by_tokens(dim: int, asked: Asked, spread: Tensor, side: Tensor) -> dict[Axis, Tensor]:
    found = {}
    for axis in asked.grams:
        if axis.dim % 2 == dim:
            first, second = (replace(axis, dim=0).rows(one.flatten(0, 1).mT) for one in (spread, side))
            found[axis] = (first @ second.mT).double()
    return found


def _table(use: Rows, shape: torch.Size, asked: Asked) -> Sums:
    """Tokens of one example that read the same row are summed first."""
    rows, columns, total = table_sums(use.ids.contiguous(), use.outputs.contiguous(), shape[0])
    entries, grams = None, {}
    if asked.entries or asked.grams:
        row, sums = distinct_rows(use.ids, use.outputs, shape[0])
        one = wide(sums)
        if asked.entries:
            entries = rows.new_zeros(shape).index_add_(0, row, one.double().square())
        for axis in asked.grams:
            side = replace(axis, dim=0).rows(one.mT)
            grams[axis] = (side @ side.mT).double()
    each = Squares(
        rows.sum(),
        rows[:, None] if asked.rows else None,
        columns[None] if asked.columns else None,
        entries,
        grams,
    )
    return _sums(each, total, asked)


def _stacked(use: Outer, shape: torch.Size, asked: Asked) -> Sums:
    """Small gradients, many at a time."""
    step = max(1, _TOGETHER // shape.numel())
    parts = [
        squares_of_stack(g.mT @ x, asked) for x, g in zip(use.inputs.split(step), use.outputs.split(step), strict=True)
    ]
    squares, gradient = parts[0]
    for more, total in parts[1:]:
        squares, gradient = squares.combine(more, 1.0), gradient + total
    return _sums(squares, gradient, asked)


def _one_by_one(uses: Sequence[Use], shape: torch.Size, asked: Asked, like: Tensor) -> Sums:
    """One example after the other in one buffer: the arithmetic of autograd's own product, and a few passes more."""
    buffer = like.new_empty(shape)
    first = uses[0] if not uses[0].views and not isinstance(uses[0], Rows) else None
    rest = [(use, use.of(buffer)) for use in uses[first is not None :]]
    matrix = buffer.view(shape[0], -1)
    gradient = torch.zeros_like(matrix, dtype=accumulator(buffer))
    grams, each = GramSums(asked.grams, buffer), Tally(asked, gradient)
    scan = each.scanner(matrix, total=gradient)
    for index in range(uses[0].size):
        if first:
            first.write_to(buffer, index)
        else:
            buffer.zero_()
        for use, part in rest:
            use.add_to(part, index)
        grams.add()
        scan()
    squares = each.squares(shape, grams.found(), lambda one: one.reshape(-1, *shape[1:]))
    return _sums(squares, gradient.view(shape), asked)


def _sums(each: Squares, gradient: Tensor, asked: Asked) -> Sums:
    return Sums(each, squares_of(gradient, asked), gradient)

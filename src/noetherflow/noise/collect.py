"""From the uses of one parameter to the squares of its per-example gradients, without keeping any of these."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.uses import Outer, Rows, Use, Whole
from noetherflow.symmetry import Axis

# Costs in multiplications of a matrix product, measured on current processors; they decide nothing but speed.
_PASS = 10  # reading or writing one number
_CALL = 500_000  # the calls that one example takes by itself
# Examples whose gradients are formed together, if one is smaller than this.
_SMALL = 2**14
_TOGETHER = 2**18
# Numbers of a gradient that are formed at a time.
_STRIP = 2**17
# Numbers that the cache next to a core holds.
_BLOCK = 2**16


Totals = tuple[Tensor, Tensor | None, Tensor | None]


class Collected(NamedTuple):
    """Of one parameter and one batch: the squares of each example's gradient, summed, and the sum of the gradients."""

    squares: Squares
    gradient: Tensor


class Sums(NamedTuple):
    """The squares of each example's gradient, summed, those of the sum of gradients, and that sum if it was kept."""

    each: Squares
    whole: Squares
    gradient: Tensor | None


def completed(sums: Mapping[str, Sums], params: Params, asked: Mapping[str, Asked]) -> dict[str, Sums]:
    """The same, with zeros for parameters that no gradient reached."""
    found = dict(sums)
    for name, one in params.items():
        if name not in found:
            gradient = torch.zeros_like(one)
            nothing = squares_of(gradient, asked[name])
            found[name] = Sums(nothing, nothing, gradient)
    return found


def collect(uses: Sequence[Use], shape: torch.Size, asked: Asked, like: Tensor) -> Collected:
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
    if all(isinstance(use, Whole) for use in uses):
        return _whole(uses, shape, asked)
    if len(uses) == 1 and not uses[0].views:
        use = uses[0]
        if isinstance(use, Outer):
            if use.inputs.shape[1] == 1:
                return _token_free(use.inputs[:, 0], use.outputs[:, 0], asked)
            if _is_cheaper_by_tokens(use, asked):
                return _by_tokens(use, asked)
            if shape.numel() <= _SMALL:
                return _stacked(use, shape, asked)
            if not asked.grams:
                return _in_strips(use, shape, asked, like)
        if isinstance(use, Rows) and not any(axis.dim % 2 == 0 or axis.within for axis in asked.grams):
            return _table(use, shape, asked)
    return _one_by_one(uses, shape, asked, like)


def squares_of(gradient: Tensor, asked: Asked) -> Squares:
    """The squares of a single gradient."""
    wide = _wide(gradient)
    rows = columns = entries = None
    if asked.entries:
        entries = wide.square()
        total, rows, columns = _from_entries(entries, asked)
    elif asked.columns:
        total, rows, columns = _in_blocks(wide, asked)
    elif asked.rows:
        rows = torch.linalg.vector_norm(wide.reshape(len(wide), -1), dim=1).double().square()
        total, rows = rows.sum(), rows.reshape(_rows_shape(wide.shape))
    else:
        total = torch.linalg.vector_norm(wide).double().square()
    grams = {}
    for axis in asked.grams:
        one = axis.rows(wide)
        grams[axis] = (one @ one.mT).double()
    return Squares(total, rows, columns, entries, grams)


def stacked(uses: Sequence[Use], shape: torch.Size, like: Tensor) -> Tensor:
    """Every example's gradient, shape (B, *shape), for tensors that are made of parameters and go back to them."""
    found = torch.zeros(uses[0].size, *shape, dtype=like.dtype, device=like.device)
    for use in uses:
        for index, one in enumerate(found):
            use.add_to(use.of(one), index)
    return found


def _whole(uses: Sequence[Use], shape: torch.Size, asked: Asked) -> Collected:
    """Every example's gradient is there already: biases, gains, and whatever else is small."""
    stack: Tensor | None = None
    for use in uses:
        assert isinstance(use, Whole)
        one = use.gradients
        if use.views:
            one = stacked([use], shape, one)
        stack = one if stack is None else stack + one
    assert stack is not None
    stack = stack.reshape(len(stack), *shape)
    return Collected(squares_of_stack(stack, asked), stack.sum(0))


def squares_of_stack(stack: Tensor, asked: Asked) -> Squares:
    """The squares of gradients stacked along a leading axis, summed over it."""
    wide = _wide(stack)
    # Examples that are small are like rows of one matrix.
    flat = wide.reshape(len(wide), -1)
    _, _, sums = _in_blocks(flat, Asked(columns=True))
    assert sums is not None
    entries = sums.reshape(wide.shape[1:])
    total, rows, columns = _from_entries(entries, asked)
    grams = {}
    for axis in asked.grams:
        one = axis.rows(wide, batch_dims=1).movedim(0, 1).flatten(1)
        grams[axis] = (one @ one.mT).double()
    return Squares(
        total,
        rows,
        columns,
        entries if asked.entries else None,
        grams,
    )


def _token_free(x: Tensor, g: Tensor, asked: Asked) -> Collected:
    """The gradient of an example is one outer product: every square is a product of squares."""
    wide_x, wide_g = _wide(x), _wide(g)
    x2 = wide_x.square() if asked.columns or asked.entries else None
    g2 = wide_g.square() if asked.rows or asked.entries else None
    x_sizes, g_sizes = (
        torch.linalg.vector_norm(one, dim=1).square() if squares is None else squares.sum(1)
        for one, squares in ((wide_x, x2), (wide_g, g2))
    )
    squares = Squares(
        torch.dot(x_sizes, g_sizes).double(),
        (x_sizes @ g2).double()[:, None] if asked.rows and g2 is not None else None,
        (g_sizes @ x2).double()[None] if asked.columns and x2 is not None else None,
        g2.mT @ x2 if g2 is not None and x2 is not None and asked.entries else None,
        {axis: _outer_gram(axis, wide_x, wide_g) for axis in asked.grams},
    )
    return Collected(squares, g.mT @ x)


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
    if asked.entries or asked.grams:
        return False
    _, tokens, m = use.inputs.shape
    n = use.outputs.shape[2]
    products = tokens**2 * (m + n) * (1 + (asked.rows and asked.columns))
    passes = tokens * (m + n) * (1 + asked.rows + asked.columns)
    formed = m * n * (2 + (asked.rows and asked.columns))
    return 3 * products + _PASS * passes < _PASS * formed + _CALL * (m * n > _SMALL)


def _by_tokens(use: Outer, asked: Asked) -> Collected:
    """From the inner products of inputs and those of output gradients, token by token."""
    x, g = _wide(use.inputs), _wide(use.outputs)
    rows = columns = total = None
    if asked.rows or not asked.columns:
        inner = x @ x.mT
        if asked.rows:
            rows = ((inner @ g) * g).sum((0, 1)).double()[:, None]
            total = rows.sum()
        else:
            total = (inner * (g @ g.mT)).sum().double()
    if asked.columns:
        columns = ((g @ g.mT @ x) * x).sum((0, 1)).double()[None]
        total = columns.sum() if total is None else total
    assert total is not None
    gradient = use.outputs.flatten(0, 1).mT @ use.inputs.flatten(0, 1)
    return Collected(Squares(total, rows, columns, None, {}), gradient)


def _table(use: Rows, shape: torch.Size, asked: Asked) -> Collected:
    """Tokens of one example that read the same row are summed first."""
    size = len(use.ids)
    keys = use.ids + shape[0] * torch.arange(size, device=use.ids.device)[:, None]
    distinct, place = torch.unique(keys, return_inverse=True)
    outputs = use.outputs.flatten(0, 1)
    sums = outputs.new_zeros(len(distinct), shape[1]).index_add_(0, place.flatten(), outputs)
    wide, row = _wide(sums), distinct % shape[0]
    squares = wide.square()
    rows = squares.sum(1, dtype=torch.float64)
    grams = {}
    for axis in asked.grams:
        one = replace(axis, dim=0).rows(wide.mT)
        grams[axis] = (one @ one.mT).double()
    return Collected(
        Squares(
            rows.sum(),
            rows.new_zeros(shape[0]).index_add_(0, row, rows)[:, None] if asked.rows else None,
            squares.sum(0, keepdim=True, dtype=torch.float64) if asked.columns else None,
            rows.new_zeros(shape).index_add_(0, row, squares.double()) if asked.entries else None,
            grams,
        ),
        outputs.new_zeros(shape).index_add_(0, row, sums),
    )


def _stacked(use: Outer, shape: torch.Size, asked: Asked) -> Collected:
    """Small gradients, many at a time."""
    step = max(1, _TOGETHER // shape.numel())
    squares = gradient = None
    for x, g in zip(use.inputs.split(step), use.outputs.split(step), strict=True):
        stack = g.mT @ x
        one, total = squares_of_stack(stack, asked), stack.sum(0, dtype=_accumulator(stack))
        squares = one if squares is None else squares.combine(one, 1.0)
        gradient = total if gradient is None else gradient.add_(total)
    assert squares is not None
    assert gradient is not None
    return Collected(squares, gradient)


def _in_strips(use: Outer, shape: torch.Size, asked: Asked, like: Tensor) -> Collected:
    """Some rows of all examples' gradients after others, so that they and their sum stay in the cache."""
    # A tall gradient is formed turned, as a wide one: products of few tokens are faster so.
    if shape[0] > shape[1]:
        turned = Asked(asked.columns, asked.rows, asked.entries)
        found, gradient = _in_strips(Outer((), use.outputs, use.inputs), shape[::-1], turned, like)
        back = [None if one is None else one.mT for one in (found.columns, found.rows, found.entries)]
        return Collected(Squares(found.total, back[0], back[1], back[2], {}), gradient.mT.contiguous())
    (n, m), wide = shape, _accumulator(like)
    step = min(n, max(1, _STRIP // m))
    buffer = like.new_empty(step, m)
    gradient = like.new_zeros(n, m, dtype=wide)
    # Sums over columns come from all entries, and then those over rows do too.
    entries = like.new_zeros(n if asked.entries else step, m, dtype=wide) if asked.entries or asked.columns else None
    norms = like.new_empty(use.size, step, dtype=wide)
    inputs = use.inputs.unbind()
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        strip, total = buffer[: part.stop - start], gradient[part]
        outputs = use.outputs[:, :, part].mT.unbind()
        if entries is None:
            for x, g, lengths in zip(inputs, outputs, norms[:, : len(strip)].unbind(), strict=True):
                torch.mm(g, x, out=strip)
                torch.linalg.vector_norm(strip, dim=1, dtype=wide, out=lengths)
                total += strip
            rows.append(norms[:, : len(strip)].double().square().sum(0))
        else:
            squares = entries[part] if asked.entries else entries[: len(strip)].zero_()
            for x, g in zip(inputs, outputs, strict=True):
                torch.mm(g, x, out=strip)
                squares.addcmul_(strip, strip)
                total += strip
            rows.append(squares.sum(1).double())
            columns.append(squares.sum(0).double())
    sums = torch.cat(rows)
    found = Squares(
        sums.sum(),
        sums[:, None] if asked.rows else None,
        torch.stack(columns).sum(0)[None] if asked.columns else None,
        entries if asked.entries else None,
        {},
    )
    return Collected(found, gradient)


def _one_by_one(uses: Sequence[Use], shape: torch.Size, asked: Asked, like: Tensor) -> Collected:
    """One example after the other in one buffer: the arithmetic of autograd's own product, and a few passes more."""
    size = uses[0].size
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    first = uses[0] if not uses[0].views and not isinstance(uses[0], Rows) else None
    rest = [(use, use.of(buffer)) for use in uses[first is not None :]]
    flat = buffer.view(shape[0] if shape else 1, -1)
    gradient = torch.zeros_like(buffer, dtype=_accumulator(buffer))
    wide = gradient.dtype
    # Sums over columns come from all entries: adding these up costs less than summing across the grain every time.
    entries = torch.zeros_like(gradient) if asked.entries or asked.columns else None
    norms = torch.empty(size, len(flat) if asked.rows else 1, dtype=wide, device=like.device)
    views = {axis: axis.rows(buffer) for axis in asked.grams}
    grams = {axis: gradient.new_zeros(len(one), len(one)) for axis, one in views.items()}
    for index in range(size):
        if first:
            first.write_to(buffer, index)
        else:
            buffer.zero_()
        for use, part in rest:
            use.add_to(part, index)
        if entries is not None:
            entries.addcmul_(buffer, buffer)
        elif asked.rows:
            torch.linalg.vector_norm(flat, dim=1, dtype=wide, out=norms[index])
        else:
            torch.linalg.vector_norm(buffer, dtype=wide, out=norms[index, 0])
        for axis, gram in grams.items():
            rows = _wide(_fresh(views[axis], axis, buffer))
            gram.addmm_(rows, rows.mT)
        gradient += buffer
    if entries is None:
        sums = norms.double().square().sum(0)
        found: Totals = (sums.sum(), sums.reshape(_rows_shape(shape)) if asked.rows else None, None)
    else:
        found = _from_entries(entries, asked)
    squares = Squares(
        *found,
        entries if asked.entries else None,
        {axis: gram.double() for axis, gram in grams.items()},
    )
    return Collected(squares, gradient)


def _fresh(view: Tensor, axis: Axis, buffer: Tensor) -> Tensor:
    """The rows of the buffer as it is now: some unfoldings are views of it, others copies."""
    return view if view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() else axis.rows(buffer)


def _from_entries(entries: Tensor, asked: Asked) -> Totals:
    """Total, rows and columns."""
    shape = entries.shape
    rows = entries.reshape(shape[0] if shape else 1, -1).sum(1).double()
    columns = entries.sum(0, keepdim=True).double() if shape else entries.double()
    return rows.sum(), rows.reshape(_rows_shape(shape)) if asked.rows else None, columns if asked.columns else None


def _in_blocks(gradient: Tensor, asked: Asked) -> Totals:
    """The same without keeping the entries: squares are added up in a few rows, which the cache holds."""
    flat = gradient.reshape(len(gradient), -1)
    step = min(len(flat), max(1, _BLOCK // flat.shape[1]))
    sums = flat.new_zeros(step, flat.shape[1])
    norms = []
    for block in flat.split(step):
        sums[: len(block)].addcmul_(block, block)
        if asked.rows:
            norms.append(torch.linalg.vector_norm(block, dim=1))
    columns = sums.sum(0).double()
    rows = torch.cat(norms).double().square() if asked.rows else None
    return (
        columns.sum(),
        None if rows is None else rows.reshape(_rows_shape(gradient.shape)),
        columns.reshape(1, *gradient.shape[1:]),
    )


def _rows_shape(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0], *(1,) * (len(shape) - 1)) if shape else ()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_accumulator(tensor))

"""Compiled loops and functions of tensors do the same, and neither hides what is not finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.noise import batches, passes
from noetherflow.noise.asked import Asked, Squares
from noetherflow.noise.batches import BatchNoise, along_axes
from noetherflow.noise.ledger import Ledger
from noetherflow.noise.squares import squares_of_stack, squares_of_vectors


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def scanned(dtype: torch.dtype) -> tuple[Tensor, ...]:
    # More rows than the loop sums at a time.
    matrix, rows, columns = draw(600, 7, dtype=dtype), torch.ones(600).double(), torch.ones(7).double()
    entries, total = torch.ones(600, 7, dtype=dtype), torch.ones(600, 7, dtype=dtype)
    passes.scanner(matrix, rows, columns, entries, total)()
    alone = torch.zeros(600).double()
    passes.scanner(matrix, alone, None)()
    return rows, columns, entries, total, alone


def read(dtype: torch.dtype) -> tuple[Tensor, ...]:
    part, ids = torch.ones(4, 5, dtype=dtype), torch.tensor([3, 2, 9, 3, 0, 5, 6])
    passes.add_tokens(part, 2, ids, draw(7, 5, dtype=dtype))
    return (part,)


def normalised(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, g = draw(3, 4, 2, 5, dtype=dtype), draw(3, 4, 2, 5, dtype=dtype)
    return passes.affine_sums(x, g, draw(3, 4, 1, 1, dtype=dtype), draw(3, 4, 1, 1, dtype=dtype))


PASSES: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    "scanner": scanned,
    "lengths": lambda dtype: (passes.lengths(draw(6, 50, dtype=dtype)),),
    "weighted_squares": lambda dtype: (passes.weighted_squares(draw(600, 7, dtype=dtype), draw(600, dtype=dtype)),),
    "pile": lambda dtype: passes.pile(draw(600, 7, dtype=dtype)),
    "vector_squares": lambda dtype: passes.vector_squares(draw(600, 7, dtype=dtype)),
    "add_tokens": read,
    "table_sums": lambda dtype: passes.table_sums(
        torch.tensor([[1, 4, 1, 1], [0, 0, 2, 4]]), draw(2, 4, 6, dtype=dtype), 5
    ),
    "channel_sums": lambda dtype: passes.channel_sums(draw(3, 4, 5, 6, dtype=dtype), draw(3, 4, 5, 6, dtype=dtype)),
    "affine_sums": normalised,
}


@contextmanager
def without_loops() -> Iterator[list[int]]:
    """No tensor is one that the loops can work on; yields how often they were asked."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_arrays", lambda *tensors: asked.append(len(tensors)) or [])
        yield asked


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_loops_do_what_tensors_do(name: str, dtype: torch.dtype, bound: float) -> None:
    by_loops = PASSES[name](dtype)
    with without_loops() as asked:
        by_tensors = PASSES[name](dtype)
    assert asked
    for mine, theirs in zip(by_loops, by_tensors, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(mine, 1.001 * theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """The compiler may reorder additions, but not assume that there is nothing to see: a meter skips such steps."""
    matrix, rows, columns = torch.ones(300, 9), torch.zeros(300).double(), torch.zeros(9).double()
    matrix[280, 4] = bad
    passes.scanner(matrix, rows, columns)()
    assert not rows[280].isfinite()
    assert not columns[4].isfinite()
    assert rows.isfinite().sum() == 299
    assert columns.isfinite().sum() == 8


def test_other_tensors_are_left_to_their_own_functions() -> None:
    stack = draw(8, 6, dtype=torch.float64)
    for one in (stack.to(torch.bfloat16), stack.mT.contiguous().mT):
        assert not passes._arrays(one)
        total, squares = passes.pile(one)
        torch.testing.assert_close(total, one.sum(0).to(total.dtype), rtol=0.02, atol=0.02)
        torch.testing.assert_close(squares, one.double().square().sum(0), rtol=0.02, atol=0.0)
    assert passes._arrays(stack)


def test_vectors_are_like_any_stack() -> None:
    stack = draw(8, 6, dtype=torch.float64)
    asked = Asked(rows=True, columns=True)
    found, (wanted, total) = squares_of_vectors(stack, asked), squares_of_stack(stack, asked)
    torch.testing.assert_close(found.gradient, total)
    for field in ("total", "rows", "columns"):
        torch.testing.assert_close(getattr(found.each, field), getattr(wanted, field))
    torch.testing.assert_close(found.whole.rows, stack.sum(0).square())
    torch.testing.assert_close(found.whole.total, stack.sum(0).square().sum())


def ledger_of(seed: int) -> tuple[Ledger, dict[str, Squares]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(4, generator=generator, dtype=torch.float64)[:, None]
    columns = torch.rand(4, generator=generator, dtype=torch.float64)[None]
    gram = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    squares = {
        "out": Squares(columns.sum(), None, columns, None, {}),
        "in": Squares(rows.sum(), rows, None, None, {nf.Axis("in", 1): gram}),
    }
    return Ledger.of(squares), squares


def test_a_ledger_gives_back_what_it_holds() -> None:
    ledger, squares = ledger_of(0)
    found = ledger.combine(ledger, 2.0).scaled(0.5).squares()
    for name, one in squares.items():
        for field in ("total", "rows", "columns", "grams"):
            mine = getattr(found[name], field)
            theirs = getattr(one, field)
            if isinstance(theirs, dict):
                torch.testing.assert_close(mine, {axis: 1.5 * gram for axis, gram in theirs.items()})
            elif theirs is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, 1.5 * theirs)
    torch.testing.assert_close(ledger.trace, squares["in"].total + squares["out"].total)


def test_order_of_parameters_does_not_matter() -> None:
    ledger, squares = ledger_of(0)
    turned = Ledger.of(dict(reversed(squares.items())))
    assert turned.pages == ledger.pages
    torch.testing.assert_close(turned.numbers, ledger.numbers)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_what_batches_say_is_summed_up(count: int) -> None:
    """However many there are, as if all had been kept."""
    symmetries: Any = along_axes({
        "hidden": nf.DiagonalSymmetry([nf.Axis("in", 0)], [nf.Axis("out", 1)]),
        "matrix": nf.MatrixSymmetry([nf.Axis("in", 1)]),
    })  # fmt: skip
    params = {"in": torch.zeros(4, 3), "out": torch.zeros(2, 4)}
    noise = BatchNoise(symmetries, params)
    sizes, values = [], []
    for index in range(count):
        ledger, squares = ledger_of(index)
        sizes.append(3 + index % 5)
        noise.add(sizes[-1], ledger, sizes[-1] - 1)
        assert len(noise._recent) < batches._TOGETHER
        rows, columns = squares["in"].rows, squares["out"].columns
        assert rows is not None
        assert columns is not None
        plus, minus = (one.flatten() / (sizes[-1] - 1) for one in (rows, columns))
        values.append(torch.stack([plus, minus, plus - minus]))
        if index == count // 2:
            noise.spreads()  # looking changes nothing
    stack, weights = torch.stack(values), torch.tensor(sizes).double()[:, None, None]
    whole = sum(sizes)
    total = (weights * stack).sum(0)
    found = noise.spreads()["hidden"]
    torch.testing.assert_close(found.total, total)
    if count == 1:
        assert found.squares.isnan().all()
    else:
        variance = (weights * (stack - total / whole).square()).sum(0) / (count - 1)
        torch.testing.assert_close(found.squares, variance * (whole - 1) + total.square() / whole)
    assert noise.count == whole
    assert noise.spreads()["matrix"].total.shape == (3, 3)

"""Compiled loops and functions of tensors do the same, and neither hides what is not finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.noise import batches, passes
from noetherflow.noise.asked import Asked, Page
from noetherflow.noise.batches import BatchNoise
from noetherflow.noise.ledger import EACH, WHOLE, Contents, Ledger, Sums
from noetherflow.noise.squares import square
from noetherflow.symmetry import along_axes


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def blank(shape: tuple[int, ...], dtype: torch.dtype, *, entries: bool = True) -> Sums:
    """Where sums can be added up: not zeros, so that what is written over is seen."""
    sums = Sums.blank(Page.of(torch.Size(shape), Asked(True, True, entries)), torch.ones((), dtype=dtype))
    sums.numbers.fill_(1.0)
    if sums.entries is not None:
        sums.entries.fill_(1.0)
    return sums


def said(sums: Sums, *more: Tensor) -> tuple[Tensor, ...]:
    return (sums.numbers, *(() if sums.entries is None else (sums.entries,)), *more)


def scanned(dtype: torch.dtype) -> tuple[Tensor, ...]:
    # More rows than the loop sums at a time.
    matrix, total, first = draw(600, 7, dtype=dtype), torch.ones(600, 7, dtype=dtype), torch.ones(600, 7, dtype=dtype)
    sums, part, alone = blank((600, 7), dtype), blank((900, 7), dtype), blank((600, 7), dtype, entries=False)
    passes.scanner(matrix, sums, EACH, total=total)(False)
    passes.scanner(matrix, part, WHOLE, 300, first)(True)
    nothing = Sums.blank(Page.of(matrix.shape, Asked()), matrix)
    for one in (alone, nothing):
        passes.scanner(matrix, one, EACH)(False)
    return *said(sums, total), *said(part, first), *said(alone), *said(nothing)


def stacked(dtype: torch.dtype) -> tuple[Tensor, ...]:
    sums = blank((30, 7), dtype)
    return said(sums, passes.scan_stack(draw(5, 30, 7, dtype=dtype), sums))


def vectors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    sums = blank((7,), dtype)
    return said(sums, passes.scan_vectors(draw(600, 7, dtype=dtype), sums))


def outer(dtype: torch.dtype) -> tuple[Tensor, ...]:
    sums = blank((9, 7), dtype, entries=False)
    passes.scan_outer(draw(600, 7, dtype=dtype), draw(600, 9, dtype=dtype), sums)
    return said(sums)


def tables(dtype: torch.dtype) -> tuple[Tensor, ...]:
    sums, ids = blank((5, 6), dtype, entries=False), torch.tensor([[1, 4, 1, 1], [0, 0, 2, 4]])
    return said(sums, passes.scan_tables(ids, draw(2, 4, 6, dtype=dtype), sums))


def read(dtype: torch.dtype) -> tuple[Tensor, ...]:
    part, ids = torch.ones(4, 5, dtype=dtype), torch.tensor([3, 2, 9, 3, 0, 5, 6])
    passes.add_tokens(part, 2, ids, draw(7, 5, dtype=dtype))
    return (part,)


def normalised(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, g = draw(3, 4, 2, 5, dtype=dtype), draw(3, 4, 2, 5, dtype=dtype)
    return passes.affine_sums(x, g, draw(3, 4, 1, 1, dtype=dtype), draw(3, 4, 1, 1, dtype=dtype))


def grouped(dtype: torch.dtype, weight: Tensor | None) -> tuple[Tensor, ...]:
    x, g = draw(3, 6, 4, 5, dtype=dtype), draw(360, dtype=dtype).view(3, 6, 4, 5) + 1
    _, mean, scale = torch.native_group_norm(x, weight, None, 3, 6, 20, 2, 1e-5)
    return passes.group_norm_back(x, g, weight, mean, scale)


PASSES: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    "scanner": scanned,
    "scan_stack": stacked,
    "scan_vectors": vectors,
    "scan_outer": outer,
    "scan_tables": tables,
    "gram": lambda dtype: (passes.gram(draw(2, 150, 7, dtype=dtype)),),
    "gram of long vectors": lambda dtype: (passes.gram(draw(2, 70, 600, dtype=dtype) / 25),),
    "gram of many vectors": lambda dtype: (passes.gram(draw(1, 512, 300, dtype=dtype) / 20),),
    "add_tokens": read,
    "channel_sums": lambda dtype: passes.channel_sums(draw(3, 4, 5, 6, dtype=dtype), draw(3, 4, 5, 6, dtype=dtype)),
    "affine_sums": normalised,
    "group_norm_back": lambda dtype: grouped(dtype, draw(6, dtype=dtype)),
    "group_norm_back without a weight": lambda dtype: grouped(dtype, None),
}


@contextmanager
def without_loops() -> Iterator[list[int]]:
    """No tensor is one that the loops can work on; yields how often they were asked."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "arrays_of", lambda *tensors, **_: asked.append(len(tensors)) or [])
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
    matrix, sums = torch.ones(300, 9), Sums.blank(Page.of(torch.Size((300, 9)), Asked(True, True)), torch.ones(()))
    matrix[280, 4] = bad
    passes.scanner(matrix, sums, EACH)(False)
    rows, columns = sums.each.rows, sums.each.columns
    assert rows is not None
    assert columns is not None
    assert not sums.each.total.isfinite()
    assert not rows[280].isfinite()
    assert not columns[0, 4].isfinite()
    assert rows.isfinite().sum() == 299
    assert columns.isfinite().sum() == 8


def test_other_tensors_are_left_to_their_own_functions() -> None:
    stack = draw(8, 6, dtype=torch.float64)
    for one in (stack.to(torch.bfloat16), stack.mT.contiguous().mT):
        assert not passes.arrays_of(one)
        sums = Sums.blank(Page.of(torch.Size((6,)), Asked(rows=True)), stack)
        total = passes.scan_vectors(one, sums)
        torch.testing.assert_close(total, one.sum(0).to(total.dtype), rtol=0.02, atol=0.02)
        torch.testing.assert_close(sums.each.rows, one.double().square().sum(0), rtol=0.02, atol=0.0)
    assert passes.arrays_of(stack)


GRAM = nf.Axis("in", 1)


def ledger_of(seed: int) -> tuple[Ledger, dict[str, Tensor]]:
    """A ledger that holds some numbers, and these."""
    generator = torch.Generator().manual_seed(seed)
    params = {"out": torch.zeros(2, 4), "in": torch.zeros(4, 3)}
    contents = Contents.of({"out": Asked(columns=True), "in": Asked(rows=True, grams=(GRAM,))}, params)
    ledger = Ledger.blank(contents, torch.zeros(()))
    ledger.numbers[EACH] = torch.rand(contents.length, generator=generator, dtype=torch.float64)
    total, *columns = ledger.numbers[EACH, :5]
    other, *rest = ledger.numbers[EACH, 5:]
    held = {"out": total, "columns": torch.stack(columns), "in": other, "rows": torch.stack(rest[:4])}
    return ledger.row(EACH), held | {"gram": torch.stack(rest[4:]).view(3, 3)}


def test_a_ledger_gives_back_what_it_holds() -> None:
    ledger, held = ledger_of(0)
    found = ledger.scaled(1.0).combine(ledger, 2.0).scaled(0.5).squares()
    assert found["out"].rows is None
    assert found["in"].columns is None
    assert not found["out"].page.grams
    torch.testing.assert_close(found["out"].total, 1.5 * held["out"])
    torch.testing.assert_close(found["out"].columns, 1.5 * held["columns"][None])
    torch.testing.assert_close(found["in"].total, 1.5 * held["in"])
    torch.testing.assert_close(found["in"].rows, 1.5 * held["rows"][:, None])
    torch.testing.assert_close(found["in"].gram(GRAM), 1.5 * held["gram"])
    torch.testing.assert_close(ledger.trace, held["in"] + held["out"])


def test_diagonals_of_a_ledger() -> None:
    ledger, held = ledger_of(0)
    contents, places = ledger.contents.diagonals()
    found = Ledger(contents, ledger.numbers[places], {}).squares()
    assert torch.equal(found["in"].gram(GRAM), held["gram"].diagonal())
    assert torch.equal(found["in"].rows[:, 0], held["rows"])
    assert torch.equal(found["out"].columns[0], held["columns"])


def test_both_rows_of_a_ledger_are_settled() -> None:
    contents = Contents.of({"one": Asked(rows=True, entries=True)}, {"one": torch.zeros(2, 3)})
    ledger = Ledger.blank(contents, torch.zeros(()))
    sums = ledger.sums("one", torch.float64)
    square(draw(2, 3, dtype=torch.float64), sums, EACH)
    square(2 * draw(2, 3, dtype=torch.float64), sums, WHOLE)
    squares = draw(2, 3, dtype=torch.float64).square()
    found = ledger.settled(-1 / 8).squares()["one"]
    torch.testing.assert_close(found.total, squares.sum() / 2)
    torch.testing.assert_close(found.rows, squares.sum(1, keepdim=True) / 2)
    torch.testing.assert_close(found.entries, squares / 2)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_what_batches_say_is_summed_up(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, as if all had been kept."""
    monkeypatch.setattr(batches, "_TOGETHER", 16)
    symmetries: Any = along_axes({
        "hidden": nf.DiagonalSymmetry([nf.Axis("in", 0)], [nf.Axis("out", 1)]),
        "matrix": nf.MatrixSymmetry([nf.Axis("in", 1)]),
    })  # fmt: skip
    params = {"in": torch.zeros(4, 3), "out": torch.zeros(2, 4)}
    noise = BatchNoise(symmetries, params)
    sizes, values = [], []
    for index in range(count):
        ledger, held = ledger_of(index)
        sizes.append(3 + index % 5)
        noise.add(sizes[-1], ledger, sizes[-1] - 1)
        assert len(noise._sizes) < batches._TOGETHER
        plus, minus = (held[side] / (sizes[-1] - 1) for side in ("rows", "columns"))
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

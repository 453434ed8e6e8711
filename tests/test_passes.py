"""The buffer of statistics: its layout, its two rows, and what batches add to it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.noise import pooling
from noetherflow.noise.buffers import EACH, OF_SUM, Buffers, ModelLayout
from noetherflow.noise.kernels import square
from noetherflow.noise.pooling import BatchNoise
from noetherflow.noise.statistics import Requested
from noetherflow.symmetry import along_axes


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


GRAM = nf.Axis("in", 1)


def buffers_of(seed: int) -> tuple[Buffers, dict[str, Tensor]]:
    """Buffers that hold some numbers, and these."""
    generator = torch.Generator().manual_seed(seed)
    params = {"out": torch.zeros(2, 4), "in": torch.zeros(4, 3)}
    model_layout = ModelLayout.of({"out": Requested(columns=True), "in": Requested(rows=True, grams=(GRAM,))}, params)
    buffers = Buffers.blank(model_layout, torch.zeros(()))
    buffers.numbers[EACH] = torch.rand(model_layout.length, generator=generator, dtype=torch.float64)
    total, *columns = buffers.numbers[EACH, :5]
    other, *rest = buffers.numbers[EACH, 5:]
    held = {"out": total, "columns": torch.stack(columns), "in": other, "rows": torch.stack(rest[:4])}
    return buffers.row(EACH), held | {"gram": torch.stack(rest[4:]).view(3, 3)}


def test_buffers_give_back_what_they_hold() -> None:
    buffers, held = buffers_of(0)
    found = buffers.scaled(1.0).combine(buffers, 2.0).scaled(0.5).squares()
    assert found["out"].rows is None
    assert found["in"].columns is None
    assert not found["out"].layout.grams
    torch.testing.assert_close(found["out"].total, 1.5 * held["out"])
    torch.testing.assert_close(found["out"].columns, 1.5 * held["columns"][None])
    torch.testing.assert_close(found["in"].total, 1.5 * held["in"])
    torch.testing.assert_close(found["in"].rows, 1.5 * held["rows"][:, None])
    torch.testing.assert_close(found["in"].gram(GRAM), 1.5 * held["gram"])
    torch.testing.assert_close(buffers.trace, held["in"] + held["out"])


def test_diagonals_of_buffers() -> None:
    buffers, held = buffers_of(0)
    model_layout, indices = buffers.model_layout.diagonals()
    found = Buffers(model_layout, buffers.numbers[indices], {}).squares()
    assert torch.equal(found["in"].gram(GRAM), held["gram"].diagonal())
    assert torch.equal(found["in"].rows[:, 0], held["rows"])
    assert torch.equal(found["out"].columns[0], held["columns"])


def test_both_rows_of_buffers_are_merged() -> None:
    model_layout = ModelLayout.of({"one": Requested(rows=True, entries=True)}, {"one": torch.zeros(2, 3)})
    buffers = Buffers.blank(model_layout, torch.zeros(()))
    sums = buffers.buffer("one", torch.float64)
    square(draw(2, 3, dtype=torch.float64), sums, EACH)
    square(2 * draw(2, 3, dtype=torch.float64), sums, OF_SUM)
    squares = draw(2, 3, dtype=torch.float64).square()
    found = buffers.merge_rows(-1 / 8).squares()["one"]
    torch.testing.assert_close(found.total, squares.sum() / 2)
    torch.testing.assert_close(found.rows, squares.sum(1, keepdim=True) / 2)
    torch.testing.assert_close(found.entries, squares / 2)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_what_batches_say_is_summed_up(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, as if all had been kept."""
    monkeypatch.setattr(pooling, "_TOGETHER", 16)
    symmetries: Any = along_axes({
        "hidden": nf.DiagonalSymmetry([nf.Axis("in", 0)], [nf.Axis("out", 1)]),
        "matrix": nf.MatrixSymmetry([nf.Axis("in", 1)]),
    })  # fmt: skip
    params = {"in": torch.zeros(4, 3), "out": torch.zeros(2, 4)}
    noise = BatchNoise(symmetries, params)
    sizes, values = [], []
    for index in range(count):
        buffers, held = buffers_of(index)
        sizes.append(3 + index % 5)
        noise.add(sizes[-1], buffers, sizes[-1] - 1)
        assert len(noise._sizes) < pooling._TOGETHER
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

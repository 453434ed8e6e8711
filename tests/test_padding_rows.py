"""Padding rows of embeddings: training keeps them at zero, and so do the points at which symmetries are proved."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf
from noetherflow._model_function import ModelFunction
from noetherflow._perturbed import generic_points

TABLE = nf.MatrixSymmetry([nf.Axis("table.weight", 1)], [nf.Axis("tower.weight", 1)])
Batch = tuple[Tensor, Tensor]


class History(nn.Module):
    """The sum of the embeddings of some ids, of which 0 is padding, before a network."""

    def __init__(self, padding: int | None = 0, *, bags: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = nn.EmbeddingBag(9, 4, mode="sum", padding_idx=padding) if bags else nn.Embedding(9, 4, padding)
        self.table: Any = kind
        self.tower, self.out = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, ids: Tensor) -> Tensor:
        looked_up = self.table(ids)
        return self.out(self.tower(looked_up.sum(1) if looked_up.ndim == 3 else looked_up).relu())


def squared(model: Any, batch: Batch) -> Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).square()


def histories() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 9, (16, 5), generator=generator)
    assert (ids == 0).any(1).sum() > 3
    return ids, torch.randn(16, generator=generator)


@pytest.mark.parametrize("bags", [False, True], ids=["lookup", "bags"])
@pytest.mark.parametrize("padding", [None, 0, 3])
def test_a_symmetry_of_a_table_with_a_padding_row_is_proved(padding: int | None, bags: bool) -> None:
    model = History(padding, bags=bags)
    explanation = nf.explain(model, squared, histories())
    assert list(explanation.symmetries) == ["table -> tower", "tower -> out"]
    assert not explanation.rejected
    assert nf.verify_symmetry(model, squared, histories(), TABLE) < 1e-12
    # The twin: the table alone is no symmetry.
    alone = nf.MatrixSymmetry([nf.Axis("table.weight", 1)], [])
    assert nf.verify_symmetry(model, squared, histories(), alone) > 1e-3


def test_training_conserves_the_charge_of_a_table_with_a_padding_row() -> None:
    """The symmetry is one of training: gradient flow keeps W W^T - V^T V, padding row included."""
    model, batch = History().double(), (histories()[0], histories()[1].double())

    def charge() -> Tensor:
        return (model.table.weight.T @ model.table.weight - model.tower.weight.T @ model.tower.weight).detach()

    drifts = []
    for padding in (0.0, 1.0):
        with torch.no_grad():
            model.table.weight[0] = padding
        before = charge()
        squared(model, batch).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 1e-6 * parameter.grad
                parameter.grad = None
        drifts.append(float((charge() - before).abs().max()) / 1e-6)
    assert drifts[0] < 1e-4
    # The twin: a padding row that is not zero breaks the conservation law.
    assert drifts[1] > 1e-2


def test_a_padding_row_that_is_not_zero_is_named() -> None:
    model = History()
    with torch.no_grad():
        model.table.weight[0] = torch.tensor([0.3, -0.4, 0.9, 0.1])
    explanation = nf.explain(model, squared, histories())
    (finding,) = explanation.rejected
    assert finding.residual.loss < 1e-12 < 1e-3 < finding.residual.gradient
    reasons = {(note.parameter, note.axis): note.reason for note in explanation.axes}
    assert "the padding row table.weight[0] is not zero and gets no gradient" in reasons["table.weight", 1]
    text = " ".join(str(explanation).split())
    assert "Set such a row to zero" in text
    assert "please report" not in text
    with pytest.warns(UserWarning, match="padding row"):
        nf.find_symmetries(model, squared, histories())
    # The twin: a part of the loss without a gradient, and a padding row at zero, which is not blamed.
    clean = History()

    def detached(model: Any, batch: Batch) -> Tensor:
        return squared(model, batch) + model(batch[0]).detach().squeeze(1).square()

    others = nf.explain(clean, detached, histories())
    assert not any("padding row table" in note.reason for note in others.axes)


def test_rows_that_a_gradient_reaches_move() -> None:
    """A table that is the output layer too has a gradient in its padding row."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.free = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(9, 4, padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear((self.table(ids) + self.free(ids)).sum(1), self.table.weight)

    def loss(model: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[0][:, 0], reduction="none")

    function = ModelFunction(Tied(), loss, torch.float64)
    for point in generic_points(function, histories()):
        table, free = (point.function.params[f"{name}.weight"] for name in ("table", "free"))
        assert (table[0] != 0).all()
        assert (free[0] == 0).all()
        assert (free[1:] != 0).all()

"""Batches whose examples have no loss of their own: a division by the mean of a mask, bags that offsets cut."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf

HIDDEN = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)])
FORGOTTEN = nf.DiagonalSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)])
WAY_OUT = r"microbatches=True in analyze, equilibrate and forecast, or with MicrobatchMeter"
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


def batches(count: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)) for _ in range(count)]


def masked(model: Any, batch: Batch) -> Tensor:
    """Only positive targets count: the mean of the mask is 0 for an example alone."""
    out, mask = model(batch[0]).squeeze(1), batch[1] > 0
    return out.square() + F.huber_loss(out, batch[1], reduction="none") * mask / mask.float().mean()


def clamped(model: Any, batch: Batch) -> Tensor:
    out, mask = model(batch[0]).squeeze(1), batch[1] > 0
    return out.square() + F.huber_loss(out, batch[1], reduction="none") * mask


def contrastive(model: Any, batch: Batch) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(-(out - out.T).square(), torch.arange(len(out)), reduction="none")


def test_a_loss_that_only_a_batch_has_is_proved_with_the_batch() -> None:
    first = batches()[0]
    with pytest.warns(UserWarning, match=rf"the loss of example \d.*NaN or infinite.*\(clamp\).*{WAY_OUT}"):
        explanation = nf.explain(net(), masked, first)
    assert list(explanation.symmetries) == ["0 -> 2"]
    assert not explanation.rejected
    with pytest.warns(UserWarning, match="complete batch"):
        assert nf.verify_symmetry(net(), masked, first, HIDDEN) < 1e-12
    # The twins: a wrong symmetry is refused all the same, and a loss of single examples causes no warning.
    with pytest.warns(UserWarning, match="complete batch"):
        assert nf.verify_symmetry(net(), masked, first, FORGOTTEN) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(nf.find_symmetries(net(), clamped, first)) == ["0 -> 2"]


@pytest.mark.filterwarnings("ignore:the loss of example")
def test_the_way_out_of_a_coupled_loss_is_named_and_works() -> None:
    sgd = nf.SGD(0.1, 8)
    for loss in (masked, contrastive):
        with pytest.raises(nf.CoupledExamplesError, match=WAY_OUT):
            nf.analyze(net(), loss, batches(), sgd, progress=False)
        analysis = nf.analyze(net(), loss, batches(), sgd, microbatches=True, progress=False)
        assert analysis.reports[0].noise_plus > 0
    assert nf.analyze(net(), clamped, batches(), sgd, progress=False).reports[0].noise_plus > 0


def test_what_is_not_finite_is_not_blamed_on_a_rule() -> None:
    def root(model: Any, batch: Batch) -> Tensor:
        out = model(batch[0]).squeeze(1)
        return (out * 0).sqrt() + out.square()  # finite, with a gradient that is not

    def plain(model: Any, batch: Batch) -> Tensor:
        return model(batch[0]).squeeze(1).square()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loss of example")  # no example is to blame
        explanation = nf.explain(net(), root, batches()[0])
    text = " ".join(str(explanation).split())
    assert len(explanation.rejected) == 1
    assert "the gradient of a loss is NaN or infinite at the parameters of the model" in text
    assert "please report" not in text
    assert any("not finite and leave 0 -> 2 open" in note.reason for note in explanation.axes)
    with pytest.warns(UserWarning, match=r"left out: the gradient of a loss is NaN"):
        nf.find_symmetries(net(), root, batches()[0])
    # The twin.
    assert not nf.explain(net(), plain, batches()[0]).rejected


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.out = nn.EmbeddingBag(9, 3, mode="mean", padding_idx=0), nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.out(self.bag(batch["ids"], batch.get("offsets"))).squeeze(1)


def bags_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch) - batch["y"]).square()


def ragged(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Bags of ids: one behind the other with offsets, and as rows that are filled up with padding."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(1, 9, (1 + i % 4,), generator=generator) for i in range(8)]
    offsets = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)
    y = torch.randn(8, generator=generator)
    rows = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return {"ids": torch.cat(parts), "offsets": offsets, "y": y}, {"ids": rows, "y": y}


def test_bags_that_offsets_cut_are_proved_with_the_batch_and_measured_between_batches() -> None:
    flat, padded = (list(each) for each in zip(*(ragged(seed) for seed in range(5)), strict=True))
    torch.testing.assert_close(bags_loss(Bags(), flat[0]), bags_loss(Bags(), padded[0]))
    symmetry = nf.MatrixSymmetry([nf.Axis("bag.weight", 1)], [nf.Axis("out.weight", 1)])
    wrong = nf.MatrixSymmetry([nf.Axis("bag.weight", 1)], [])
    for batch in (flat[0], padded[0]):
        assert list(nf.find_symmetries(Bags(), bags_loss, batch)) == ["bag -> out"]
        assert nf.verify_symmetry(Bags(), bags_loss, batch, symmetry) < 1e-12
        assert nf.verify_symmetry(Bags(), bags_loss, batch, wrong) > 1e-3
    sgd = nf.SGD(0.1, 8)
    between = [
        nf.analyze(Bags(), bags_loss, data, sgd, microbatches=True, progress=False).reports[0].noise_plus
        for data in (flat, padded)
    ]
    assert between[0] == pytest.approx(between[1], rel=1e-6)
    # Of single examples, only rows have a noise; the refusal says how to make rows.
    assert nf.analyze(Bags(), bags_loss, padded, sgd, progress=False).reports[0].noise_plus > 0
    with pytest.raises(nf.LossError, match=rf"`offsets`.*shape \(B, T\).*padding_idx.*{WAY_OUT}"):
        nf.analyze(Bags(), bags_loss, flat, sgd, progress=False)

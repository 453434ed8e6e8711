"""Batches whose examples cannot be taken out of them: the nodes of all graphs are in one tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

HIDDEN = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)])
FORGOTTEN = nf.DiagonalSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def graphs(nodes: int = 10) -> dict[str, Tensor]:
    """8 graphs: a target each, the nodes of all graphs, and the graph to which each node belongs."""
    generator = torch.Generator().manual_seed(1)
    return {
        "target": torch.randint(3, (8,), generator=generator),
        "nodes": torch.randn(8 * nodes, 6, generator=generator),
        "graph": torch.arange(8 * nodes) // nodes,
    }


def pooled_loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
    hidden = module[1](module[0](batch["nodes"]))
    sums = hidden.new_zeros(len(batch["target"]), hidden.shape[1]).index_add(0, batch["graph"], hidden)
    return nn.functional.cross_entropy(module[2](sums), batch["target"], reduction="none")


def test_the_finder_and_the_certificate_use_the_complete_batch() -> None:
    assert list(nf.find_symmetries(model(), pooled_loss, graphs())) == ["0 -> 2"]
    assert nf.verify_symmetry(model(), pooled_loss, graphs(), HIDDEN) < 1e-12
    assert nf.verify_symmetry(model(), pooled_loss, graphs(), FORGOTTEN) > 1e-3


def test_noise_says_that_examples_cannot_be_taken_out_of_the_batch() -> None:
    with pytest.raises(nf.LossError, match=r"single example.*\(80, 6\).*MicrobatchMeter"):
        nf.estimate_noise(model(), pooled_loss, [graphs()], {"hidden": HIDDEN}, progress=False)


def test_an_error_of_a_batch_that_can_be_sliced_is_not_explained_away() -> None:
    def picky(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(batch[0]) == 1:
            raise IndexError("a single example is refused")
        return module(batch[0]).square().mean(1)

    batch = torch.randn(4, 6), torch.randn(4, 3)
    with pytest.raises(IndexError, match="a single example is refused"):
        nf.estimate_noise(model(), picky, [batch], {"hidden": HIDDEN}, progress=False)

"""NoiseCallback on several ranks, under strategies that it refuses, and under the package pytorch_lightning."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

import lightning_ranks
import noetherflow as nf
from lightning_runs import QUIET, Loop, Pair, Regression, adamw, loader, network, pairs
from noetherflow.integrations.lightning import NoiseCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def test_two_ranks_say_what_a_process_says_that_has_all_microbatches(tmp_path: Path) -> None:
    program = [sys.executable, lightning_ranks.__file__, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    both = Loop(k=1, every=1).run(Regression(network()), batches=lightning_ranks.of_all_ranks()).metrics(layers=False)
    assert logged(tmp_path / "examples")[-1] == pytest.approx(both, rel=1e-10)
    for k in lightning_ranks.ACCUMULATED:
        loop = Loop(k=lightning_ranks.RANKS * k, every=1, between="microbatches")
        expected = loop.run(Regression(network()), batches=lightning_ranks.batches()).metrics(layers=False)
        rows = logged(tmp_path / str(k))
        assert len(rows) == 8 // k
        assert rows[-1] == pytest.approx(expected, rel=1e-10)
        assert len(rows[-1]) == 8


def logged(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row.pop("step") for row in rows] == list(range(len(rows)))
    return rows


def pretended(strategy: object, devices: int) -> SimpleNamespace:
    return SimpleNamespace(strategy=strategy, world_size=devices)


def test_other_strategies_are_refused() -> None:
    module = Regression(network())
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(nf.SettingsError, match=f"the strategy is {type(strategy).__name__}: use Trainer"):
            NoiseCallback(between="microbatches").on_train_start(pretended(strategy, 2), module)  # type: ignore[arg-type]


class Other(pytorch_lightning.LightningModule):
    """A module of the package under its former name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


def test_the_package_under_its_former_name() -> None:
    callback = NoiseCallback()
    trainer = pytorch_lightning.Trainer(
        callbacks=[callback],  # type: ignore[list-item]
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Other(), loader(pairs()))
    expected = Loop(every=20).run(Regression(network()))
    assert callback.watch is not None
    assert callback.watch.metrics() == pytest.approx(expected.metrics(), rel=1e-12)

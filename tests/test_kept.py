"""Analyses that are kept: what enters the key of a run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import noetherflow as nf
from many_symmetries import small
from noetherflow import _batch, _fingerprint, _kept
from toy_symmetry import toy_of


class Weighted(nn.Module):
    """A loss with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3), persistent=False)

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return ((model(batch["x"]) - batch["y"]) * self.weight).square().sum(1)


class Run:
    """The arguments of `key_of`, for a test to change."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        for parameter in self.model.parameters():
            nn.init.constant_(parameter, 0.5)
        self.loss = Weighted()
        self.batches = [
            {"x": torch.randn(6, 4, generator=generator), "y": torch.ones(6, 3), "task": "a", "ids": numpy.arange(6)}
            for _ in range(3)
        ]
        self.sgd = nf.SGD(lr=0.1, batch_size=4)
        self.symmetries = {"s": nf.DiagonalSymmetry(nf.Axis("0.weight", 0), nf.Axis("3.weight", 1))}
        self.options: dict[str, Any] = {"holdout": 0.25}
        self.source = folder / "mine.py"
        self.source.write_text("x = 1\n")

    def key(self) -> str:
        arguments = (self.model, self.loss, self.batches, self.sgd, self.symmetries)
        return _kept.key_of(*arguments, options=self.options, sources=[self.source])


def changed_weight(run: Run) -> None:
    run.model[0].weight.data[0, 0] += 1e-6


def changed_buffer(run: Run) -> None:
    run.model[1].running_mean += 1.0


def changed_mode(run: Run) -> None:
    run.model[1].eval()


def changed_function(run: Run) -> None:
    run.model[2] = nn.Tanh()


def frozen(run: Run) -> None:
    run.model[0].weight.requires_grad_(False)


def changed_loss(run: Run) -> None:
    run.loss.weight[0] = 2.0


def changed_last_batch(run: Run) -> None:
    run.batches[-1]["x"][-1, -1] += 1e-6


def changed_labels(run: Run) -> None:
    run.batches[-1]["y"][0, 0] = 0.0


def changed_order(run: Run) -> None:
    run.batches.reverse()


def changed_text(run: Run) -> None:
    run.batches[1]["task"] = "b"


def changed_array(run: Run) -> None:
    run.batches[1]["ids"][3] = 7


def changed_dtype(run: Run) -> None:
    run.batches[0]["y"] = run.batches[0]["y"].to(torch.int32)


def fewer_batches(run: Run) -> None:
    run.batches.pop()


def changed_settings(run: Run) -> None:
    run.sgd = dataclasses.replace(run.sgd, weight_decay=1e-9)


def changed_groups(run: Run) -> None:
    parts = ((0, 0.1), (3, 0.0))
    groups = [{"params": list(run.model[part].parameters()), "weight_decay": decay} for part, decay in parts]
    run.sgd = nf.SGD.from_optimizer(torch.optim.SGD(groups, lr=0.1), batch_size=4)


def changed_symmetry(run: Run) -> None:
    run.symmetries["s"] = nf.DiagonalSymmetry(nf.Axis("0.weight", 0), nf.Axis("3.weight", 0))


def no_symmetries(run: Run) -> None:
    run.symmetries = None


def changed_options(run: Run) -> None:
    run.options = {"holdout": 0.5}


def changed_source(run: Run) -> None:
    run.source.write_text("x = 2\n")


CHANGES = (changed_weight, changed_buffer, changed_mode, changed_function, frozen, changed_loss, changed_last_batch)
CHANGES += (changed_labels, changed_order, changed_text, changed_array, changed_dtype, fewer_batches, changed_settings)
CHANGES += (changed_groups, changed_symmetry, no_symmetries, changed_options, changed_source)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_key_changes_with_everything_on_which_numbers_depend(change: Callable[[Run], None], tmp_path: Path) -> None:
    before, run = Run(tmp_path).key(), Run(tmp_path)
    assert run.key() == before
    change(run)
    assert run.key() != before


def test_a_key_knows_to_which_parameters_a_weight_decay_belongs(tmp_path: Path) -> None:
    keys = set()
    for first, second in (("weight", "bias"), ("bias", "weight"), ("weight", "bias")):
        run = Run(tmp_path)
        decays = ((first, 0.1), (second, 0.2))
        groups = [{"params": [getattr(run.model[0], name)], "weight_decay": decay} for name, decay in decays]
        run.sgd = nf.SGD.from_optimizer(torch.optim.SGD(groups, lr=0.1), batch_size=4)
        keys.add(run.key())
    assert len(keys) == 2


def test_a_symmetry_that_no_file_can_hold_has_another_key_every_time(tmp_path: Path) -> None:
    def init(self: Any, function: Callable[[], None]) -> None:
        self.function, self.tensor, self.strength = function, "0.weight", 1.0

    run = Run(tmp_path)
    run.symmetries = {"odd": type("Odd", (toy_of(),), {"__init__": init})(print)}
    assert run.key() != run.key()
    run.symmetries = {"toy": toy_of()("0.weight", 1.0)}
    assert run.key() == run.key()


def test_a_key_changes_with_the_code_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    before = run.key()
    read, package = Path.read_bytes, Path(nf.__file__).parent
    for file, stale in (
        ("_drift.py", True),
        ("noise/layerwise.py", True),
        ("report/page.py", False),
        ("_cli.py", False),
    ):
        _fingerprint.of_code.cache_clear()
        monkeypatch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b"#" * (path == package / file))
        assert (run.key() != before) == stale
    _fingerprint.of_code.cache_clear()


def test_a_kept_analysis_is_equal_and_only_for_its_key(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert _kept.load(path, "key") is None
    _kept.save(small(), path, "key")
    loaded = _kept.load(path, "key")
    assert loaded is not None
    assert loaded.to_json() == small().to_json()
    assert _kept.load(path, "other") is None
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert _kept.load(path, "key") is None
    small().save(path)
    assert _kept.load(path, "key") is None


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.8, 6)])
def test_the_last_batches_are_held_out(share: float, held: int) -> None:
    batches = list(range(8))
    assert _batch.hold_out(batches, 0.01, least=2) == (batches[:6], batches[6:])
    assert _batch.hold_out(iter(batches), share) == (batches[: 8 - held], batches[8 - held :])

"""Analyses that are kept: what enters the key of a run, and runs that use an analysis again."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import noetherflow as nf
from many_symmetries import small
from noetherflow import _batch, _cli, _fingerprint, _kept, _user_file

BUILD = """
import torch
from torch import nn
import noetherflow as nf
import kept_neighbour

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    data = [(torch.randn(16, 4).double(), torch.randn(16, 3).double()) for _ in range(4)]
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
    return net, loss, data, nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3)
"""


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
CHANGES += (changed_symmetry, no_symmetries, changed_options, changed_source)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_key_changes_with_everything_on_which_numbers_depend(change: Callable[[Run], None], tmp_path: Path) -> None:
    before, run = Run(tmp_path).key(), Run(tmp_path)
    assert run.key() == before
    change(run)
    assert run.key() != before


def test_a_key_changes_with_the_code_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    before = run.key()
    read, package = Path.read_bytes, Path(nf.__file__).parent
    for file, stale in (("_drift.py", True), ("noise/fast.py", True), ("report/page.py", False), ("_cli.py", False)):
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


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Its namesake of another test lies in another folder.
    monkeypatch.delitem(sys.modules, "kept_neighbour", raising=False)
    path = tmp_path / "kept_example.py"
    path.write_text(BUILD)
    (tmp_path / "kept_neighbour.py").write_text("value = 1\n")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every analysis that the command line computes."""
    listed: list[dict[str, Any]] = []

    def analyze(model: Any, loss: Any, loader: Any, sgd: Any, symmetries: Any, **options: Any) -> nf.Analysis:
        listed.append({"loader": loader, **options})
        return nf.analyze(model, loss, loader, sgd, symmetries, **options)

    monkeypatch.setattr(_cli, "run_analysis", analyze)
    return listed


def run(*arguments: object) -> Any:
    return CliRunner().invoke(_cli.app, [str(argument) for argument in arguments])


def test_a_second_run_uses_the_analysis_again_and_writes_all_outputs(file: Path, calls: list[Any]) -> None:
    out = file.parent / "out"
    first = run("analyze", file, "--out", out)
    assert first.exit_code == 0, first.output
    names = {path.name for path in out.iterdir()}
    assert names == {f"kept_example.{suffix}" for suffix in ("json", "html", "png", "svg", "analysis.safetensors")}
    assert "kept_example.analysis.safetensors" in first.output
    content = (out / "kept_example.json").read_text()
    for suffix in ("json", "html"):
        (out / f"kept_example.{suffix}").unlink()
    second = run("analyze", file, "--out", out, "--rebalance", "--save", out / "moved.safetensors")
    assert second.exit_code == 0, second.output
    assert "Kept from an earlier run" in second.output
    assert len(calls) == 1
    assert (out / "kept_example.json").read_text() == content
    assert (out / "moved.safetensors").is_file()
    assert (out / "kept_example.html").is_file()
    assert len(nf.Analysis.load(out / "kept_example.analysis.safetensors").reports) == 1


@pytest.mark.parametrize("change", ["force", "option", "file", "neighbour", "damage"])
def test_a_run_that_differs_computes_anew(file: Path, calls: list[Any], change: str) -> None:
    out = file.parent / "out"
    assert run("analyze", file, "--out", out).exit_code == 0
    flags: list[object] = {"force": ["--force"], "option": ["--tolerance", 1e-3]}.get(change, [])
    if change == "file":
        file.write_text(BUILD.replace("manual_seed(0)", "manual_seed(1)"))
    elif change == "neighbour":
        (file.parent / "kept_neighbour.py").write_text("value = 2\n")
    elif change == "damage":
        (out / "kept_example.analysis.safetensors").write_bytes(b"nothing")
    again = run("analyze", file, "--out", out, *flags)
    assert again.exit_code == 0, again.output
    assert "Kept from" not in again.output
    assert len(calls) == 2


def test_options_reach_the_analysis(file: Path, calls: list[Any]) -> None:
    flags = ("--dtype", "float32", "--max-passes", 7, "--tolerance", 1e-4, "--microbatches", "--holdout", 0.3)
    done = run("analyze", file, "--out", file.parent / "out", *flags)
    assert done.exit_code == 0, done.output
    (options,) = calls
    given = _user_file.load_build(file)[2]
    used, held = options.pop("loader"), options.pop("holdout")
    assert options == {"dtype": torch.float32, "max_passes": 7, "tolerance": 1e-4, "microbatches": True}
    for batches, expected in ((used, given[:2]), (held, given[2:])):
        assert len(batches) == len(expected)
        for batch, other in zip(batches, expected, strict=True):
            assert torch.equal(batch[0], other[0])


def test_held_out_batches_are_those_that_analyze_is_given(file: Path) -> None:
    out = file.parent / "out"
    done = run("analyze", file, "--out", out, "--holdout", 0.25)
    assert done.exit_code == 0, done.output
    model, loss, batches, sgd, _ = _user_file.load_build(file)
    expected = nf.analyze(model, loss, batches[:3], sgd, holdout=batches[3:])
    (symmetry,) = json.loads((out / "kept_example.json").read_text())["symmetries"]
    assert symmetry["holdout_before"] == pytest.approx(expected.reports[0].holdout_before, rel=1e-12)
    assert symmetry["holdout_after"] == pytest.approx(expected.reports[0].holdout_after, rel=1e-9)
    assert symmetry["imbalance_after"] < 1e-9 < symmetry["holdout_after"]
    assert "on data that was held out" in (out / "kept_example.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--holdout", 0), "--holdout must lie between 0 and 1, got 0"),
        (("--holdout", 1.0), "--holdout must lie between 0 and 1, got 1"),
        (("--holdout", "nan"), "--holdout must lie between 0 and 1, got nan"),
        (("--holdout", 0.9), "holding out 4 of 4 batches leaves 0 to use, expected 1 or more"),
        (("--tolerance", 0), "--tolerance must lie between 0 and 1, got 0"),
        (("--rebalance",), "add --save FILE.safetensors"),
        (("--save", "a.safetensors"), "add --rebalance"),
        (("--save", "a.pt", "--rebalance"), "must end in .safetensors"),
        (("--max-passes", 1), "--max-passes"),
        (("--dtype", "float16"), "--dtype"),
    ],
)
def test_options_out_of_range_get_a_sentence(flags: tuple[object, ...], words: str, file: Path) -> None:
    done = run("analyze", file, "--out", file.parent / "out", *flags)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert not (file.parent / "out").exists()


def test_an_iterator_is_gone_through_once(file: Path, calls: list[Any]) -> None:
    file.write_text(BUILD.replace("return net, loss, data,", "return net, loss, iter(data),"))
    out = file.parent / "out"
    for expected in (1, 1):
        done = run("analyze", file, "--out", out)
        assert done.exit_code == 0, done.output
        assert len(calls) == expected
    assert len(calls[0]["loader"]) == 4


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.8, 6)])
def test_the_last_batches_are_held_out(share: float, held: int) -> None:
    batches = list(range(8))
    assert _batch.hold_out(batches, 0.01, least=2) == (batches[:6], batches[6:])
    assert _batch.hold_out(iter(batches), share) == (batches[: 8 - held], batches[8 - held :])


def test_the_sources_of_a_run_are_those_of_the_user(file: Path) -> None:
    class Model(nn.Module):
        pass

    _user_file.load_build(file)
    names = {path.name for path in _user_file.sources(file, nn.Sequential(Model()))}
    assert {"kept_example.py", "kept_neighbour.py", "test_kept.py"} <= names
    assert not names & {"container.py", "_cli.py", "__init__.py"}

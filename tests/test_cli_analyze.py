"""`noetherflow analyze`: its options, and runs that use a measurement again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow import _cli, _user_file

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
    said = f"and from {symmetry['holdout_before']:.3g} to {symmetry['holdout_after']:.3g} on data that was held out"
    assert said in " ".join(done.output.split())


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


def test_the_sources_of_a_run_are_those_of_the_user(file: Path) -> None:
    class Model(nn.Module):
        pass

    _user_file.load_build(file)
    names = {path.name for path in _user_file.sources(file, nn.Sequential(Model()))}
    assert {"kept_example.py", "kept_neighbour.py", "test_cli_analyze.py"} <= names
    assert not names & {"container.py", "_cli.py", "__init__.py"}

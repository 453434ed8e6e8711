"""The command line, as a user meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import noetherflow as nf
from fake_experiments import Fake, install
from noetherflow._cli import app

BUILD = """
import torch
from torch import nn
import noetherflow as nf
{neighbour}

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    data = [(torch.randn(16, 4).double(), torch.randn(16, 3).double()) for _ in range(3)]
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
    hidden = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("2.weight", 1))
    return net, loss, data, nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3), {{"hidden": hidden}}
"""

DECLARES_FIVE = """
import torch, noetherflow as nf
def build():
    return torch.nn.Linear(1, 1), print, [], nf.SGD(0.1, 5), 5
"""


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(BUILD.format(neighbour=""))
    return path


def test_analyze_prints_a_table_and_writes_json_picture_and_weights(file: Path, tmp_path: Path) -> None:
    moved_to = tmp_path / "out" / "moved.safetensors"
    done = run("analyze", file, "--out", tmp_path / "out", "--rebalance", "--save", moved_to)
    assert done.exit_code == 0, done.output
    assert re.search(r"hidden +5 +\de-1\d", done.output)
    assert "Tr Sigma" in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "mine.analysis.safetensors",
        "mine.html",
        "mine.json",
        "mine.png",
        "mine.svg",
        "moved.safetensors",
    }
    written = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert written["symmetries"][0]["name"] == "hidden"
    moved = load_file(moved_to)
    namespace: dict[str, object] = {}
    exec(file.read_text(), namespace)
    net, loss, data, sgd, symmetries = namespace["build"]()
    before = loss(net, data[0]).detach()
    net.load_state_dict(moved)
    torch.testing.assert_close(loss(net, data[0]).detach(), before, rtol=1e-11, atol=1e-12)
    rates = nf.drift(nf.estimate_noise(net, loss, data, symmetries), sgd, net)
    assert rates["hidden"].abs().max() < 1e-12


def test_a_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("value = 1\n")
    (tmp_path / "mine_too.py").write_text(BUILD.format(neighbour="from neighbour_of_mine import value"))
    assert run("analyze", tmp_path / "mine_too.py", "--out", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file"),
        ("x = 1\n", "does not define build()"),
        ("build = 3\n", "does not define build()"),
        ("def build():\n    return 1\n", "got int"),
        ("def build():\n    return 1, 2\n", "length 2"),
        ("def build():\n    return 1, 2, 3, 4, 5\n", "must return a torch.nn.Module as model"),
        ("import torch\ndef build():\n    return torch.nn.Linear(1, 1), 2, 3, 4, 5\n", "as loss"),
        ("import torch\ndef build():\n    return torch.nn.Linear(1, 1), print, 3, 4, 5\n", "as loader"),
        (DECLARES_FIVE, "as symmetries"),
        ("import torch\ndef build():\n    return torch.nn.Linear(1, 1), print, [], 4, {}\n", "as settings"),
    ],
)
def test_a_file_of_the_wrong_kind_gets_a_sentence(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    if content is not None:
        path.write_text(content)
    done = run("analyze", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "UserFileError" in done.output
    assert words in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_symmetries_are_found_where_none_are_declared(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(BUILD.format(neighbour="").replace(', {"hidden": hidden}', ""))
    assert "hidden}" not in path.read_text()
    done = run("symmetries", path)
    assert done.exit_code == 0, done.output
    assert "0 -> 2" in done.output
    written = json.loads(run("symmetries", path, "--json").output)
    assert [one["name"] for one in written["symmetries"]] == ["0 -> 2"]
    assert written["symmetries"][0]["residual"] < 1e-12
    assert {one["reason"] for one in written["axes"] if not one["symmetries"]} == {"linear (0)", "sub"}
    done = run("analyze", path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "0 -> 2" in done.output


def test_approximate_symmetries_are_shown_on_request(tmp_path: Path) -> None:
    path = tmp_path / "normed.py"
    path.write_text(
        BUILD.format(neighbour="")
        .replace(', {"hidden": hidden}', "")
        .replace("nn.ReLU(), nn.Linear(5, 3)", "nn.LayerNorm(5, eps=1e-5, elementwise_affine=False)")
        .replace("torch.randn(16, 3)", "torch.randn(16, 5)")
    )
    exact, approximate = (
        json.loads(run("symmetries", path, "--json", *flag).output)["symmetries"] for flag in ((), ("--approximate",))
    )
    assert exact == []
    assert [one["kind"] for one in approximate] == ["ScalarSymmetry"]
    assert "eps" in approximate[0]["approximate_because_of"]


def test_weights_are_saved_as_safetensors_only(file: Path, tmp_path: Path) -> None:
    done = run("analyze", file, "--rebalance", "--save", tmp_path / "moved.pt", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert ".safetensors" in done.output
    assert not (tmp_path / "out").exists()


def test_a_false_symmetry_ends_with_its_residual_and_no_files(tmp_path: Path) -> None:
    path = tmp_path / "false.py"
    path.write_text(BUILD.format(neighbour="").replace(', nf.Axis("0.bias", 0)]', "]"))
    done = run("analyze", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "NotASymmetryError" in done.output
    assert "residual" in done.output
    assert not (tmp_path / "out").exists()


def test_reproduce_prints_verdicts_and_writes_results(tmp_path: Path) -> None:
    sizes = ["--set", "steps=2000", "--set", "replicas=16", "--set", "weight_decay=0.02", "--set", "kicks=2000"]
    done = run("reproduce", "f1", "--quick", "--seed", 1, *sizes, "--out", tmp_path)
    assert "claims hold" in done.output
    assert re.search(r"\d\.\d+ ± ", done.output)
    written = json.loads((tmp_path / "f1.json").read_text())
    assert (written["settings"]["steps"], written["settings"]["seed"]) == (2000, 1)
    assert done.exit_code == (0 if written["holds"] else 1)


def test_a_claim_that_fails_is_shown_and_ends_in_an_error_code(tmp_path: Path) -> None:
    # Far too few steps to come to rest from both sides.
    done = run("reproduce", "f1", "--quick", "--set", "steps=50", "--set", "kicks=500", "--out", tmp_path)
    assert done.exit_code == 1
    assert "FAILS" in done.output
    assert "do not hold" in done.output
    assert json.loads((tmp_path / "f1.json").read_text())["holds"] is False


def test_experiments_that_do_not_finish_end_in_an_error_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether the others hold or not."""
    install(monkeypatch, f1=Fake(error=ZeroDivisionError("by nothing")), f2=Fake())
    done = run("reproduce", "--quick", "--out", tmp_path)
    assert done.exit_code == 1
    assert "did not finish: f1" in done.output
    assert "by nothing" in done.output
    assert "do not hold" not in done.output
    install(monkeypatch, f1=Fake(), f2=Fake())
    done = run("reproduce", "--quick", "--out", tmp_path)
    assert done.exit_code == 0
    assert "kept from an earlier run" in done.output
    assert run("reproduce", "f2", "--quick", "--force", "--out", tmp_path).output.count("kept from") == 0


@pytest.mark.parametrize("arguments", [("f99",), ("f1", "--set", "speed=1"), ("f1", "--set", "steps=x")])
def test_reproduce_refuses_what_it_does_not_know(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run("reproduce", *arguments, "--out", tmp_path)
    assert done.exit_code == 2
    assert "SettingsError" in done.output


def test_both_ways_to_call_it() -> None:
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "noetherflow", "--help"], capture_output=True, text=True, check=True, env=environment
    )
    assert "analyze" in done.stdout
    assert "reproduce" in done.stdout

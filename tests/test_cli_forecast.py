"""`noetherflow forecast`: what `nf.forecast` says of what `build()` returns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow import _cli, _user_file

BUILD = """
import torch
from torch import nn
import noetherflow as nf

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    data = [(torch.randn(16, 4).double(), torch.randn(16, 3).double()) for _ in range(4)]
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
    return net, loss, data, nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forecast_example.py"
    path.write_text(BUILD)
    return path


def run(command: str, file: Path, *arguments: object) -> Any:
    """Run a command; the page goes beside the file."""
    given = (command, file, "--out", file.parent, *arguments)
    return CliRunner().invoke(_cli.app, [str(argument) for argument in given])


def expected(file: Path, **options: Any) -> nf.Forecast:
    model, loss, loader, settings, declared = _user_file.load_build(file)
    return nf.forecast(model, loss, loader, settings, declared, **options)


def test_the_command_prints_the_forecast_and_saves_it(file: Path) -> None:
    saved = file.parent / "forecast.safetensors"
    done = run("forecast", file, "--save", saved)
    assert done.exit_code == 0, done.output
    forecast = expected(file)
    assert str(forecast) in done.output
    assert forecast.trace.ratio.why in " ".join(done.output.split())
    assert "What becomes of the sharpness cannot be told: see above." in " ".join(done.output.split())
    assert f"Written: {file.parent / 'forecast_example.forecast.html'}, " in done.output
    assert f", {saved}" in done.output
    assert repr(nf.Forecast.load(saved).trace) == repr(forecast.trace)
    # A twin: the forecast of another model.
    file.write_text(BUILD.replace("manual_seed(0)", "manual_seed(1)"))
    assert str(expected(file)) not in done.output


def test_the_command_writes_a_page_and_json_beside_those_of_an_analysis(file: Path) -> None:
    assert run("analyze", file).exit_code == 0
    names = {path.name for path in file.parent.iterdir()}
    kept = {name: (file.parent / name).read_bytes() for name in names}
    assert run("forecast", file).exit_code == 0
    written = {path.name for path in file.parent.iterdir()} - names
    assert written == {"forecast_example.forecast.html", "forecast_example.forecast.json"}
    assert kept == {name: (file.parent / name).read_bytes() for name in names}
    forecast = expected(file)
    content = json.loads((file.parent / "forecast_example.forecast.json").read_text())
    assert content["trace"]["then"]["value"] == forecast.trace.then.value
    assert content["sentence"] == forecast.sentence
    page = (file.parent / "forecast_example.forecast.html").read_text()
    assert "<title>noetherflow: forecast_example</title>" in page
    assert f"{forecast.trace.then.value:.4g} ± " in page
    # A folder that cannot be one.
    done = CliRunner().invoke(_cli.app, ["forecast", str(file), "--out", str(file)])
    assert done.exit_code == 2
    assert "cannot be written" in " ".join(done.output.split())


def test_declared_symmetries_and_options_reach_the_forecast(file: Path) -> None:
    hidden = "nf.DiagonalSymmetry([nf.Axis('0.weight', 0), nf.Axis('0.bias', 0)], nf.Axis('2.weight', 1))"
    settings = "nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3)"
    file.write_text(BUILD.replace(settings, f"{settings}, {{'own name': {hidden}}}"))
    saved = file.parent / "forecast.safetensors"
    done = run("forecast", file, "--dtype", "float32", "--save", saved)
    assert done.exit_code == 0, done.output
    narrow = expected(file, dtype=torch.float32)
    assert str(narrow) in done.output
    # The digits of float32 and float64 that are printed are equal, those that are saved are not.
    assert repr(nf.Forecast.load(saved).trace) == repr(narrow.trace) != repr(expected(file).trace)
    file.write_text(BUILD.replace(settings, f"{settings}, {{'wrong': {hidden.replace('2.weight', '0.weight')}}}"))
    assert run("forecast", file).exit_code == 2


def test_the_number_of_random_vectors_reaches_the_forecast(file: Path) -> None:
    # The traces of a network with tanh are not exact.
    file.write_text(BUILD.replace("nn.ReLU()", "nn.Tanh()"))
    done = run("forecast", file, "--vectors", 5)
    assert done.exit_code == 0, done.output
    assert str(expected(file, vectors=5)) in done.output
    assert str(expected(file)) not in done.output
    refused = run("forecast", file, "--vectors", 3)
    assert refused.exit_code == 2
    assert "vectors must be an integer, 4 or more, got 3" in " ".join(refused.output.split())


def test_microbatches_reach_the_forecast(file: Path) -> None:
    done = run("forecast", file, "--microbatches")
    assert done.exit_code == 0, done.output
    assert str(expected(file, microbatches=True)) in done.output
    assert str(expected(file)) not in done.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "does not define build()"),
        (BUILD.replace("nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-3)", "3"), "must return a noetherflow.SGD"),
        (BUILD.replace(".square().sum(1)", ".square().mean()"), "LossError"),
    ],
)
def test_bad_files_get_a_sentence(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    saved = file.parent / "forecast.safetensors"
    done = run("forecast", file, "--save", saved)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert not saved.exists()

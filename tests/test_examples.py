"""The files in examples/ do what their first lines promise."""

import copy
import functools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import noetherflow as nf
from noetherflow._user_file import load_build

FOLDER = Path(__file__).parents[1] / "examples"
PROMISE = re.compile(r"Expected: (\d+) symmetr(?:y|ies), (?:all )?converged\.")
# In float64 and in float32: the largest relative change of a loss.
UNCHANGED = {torch.float64: 1e-9, torch.float32: 1e-5}
FAST = ["digits_mlp", "digits_cnn", "matrix_factorisation"]
SLOW = ["gpt2", "llama", "bert", "lora", "vit", "mixture"]
# Their weights are not installed here: tests/test_sentence_encoder.py builds them with small random weights.
PRETRAINED = ["sentence_encoder", "sentence_layer"]
EXAMPLES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@functools.cache
def built(name: str) -> tuple[Any, ...]:
    """As the command line builds it, with the folder of the file on the path."""
    return load_build(FOLDER / f"{name}.py")


@functools.cache
def analysis_of(name: str) -> nf.Analysis:
    model, loss, loader, sgd, _ = built(name)
    return nf.analyze(model, loss, loader, sgd, progress=False)


def losses(model: torch.nn.Module, loss: nf.Loss, loader: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([loss(model, batch) for batch in loader])


def largest_change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().mean())


def test_every_file_with_a_build_is_tested_and_listed() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if "def build()" in path.read_text("utf-8")}
    assert files == {*FAST, *SLOW, *PRETRAINED}
    readme = (FOLDER.parent / "README.md").read_text("utf-8")
    assert {name for name in files if f"(examples/{name}.py)" in readme} == files


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_statuses_are_those_of_the_first_lines(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    assert f"``noetherflow analyze examples/{name}.py``" in text
    assert ("pip install transformers" in text) == (name in {"gpt2", "llama", "bert", "lora", "mixture"})
    (expected,) = PROMISE.findall(text)
    reports = analysis_of(name).reports
    assert [report.status for report in reports] == ["converged"] * int(expected)
    # Without a status, from a measurement at the end point: rest. In float32 up to its rounding.
    dtype = next(built(name)[0].parameters()).dtype
    for report in reports:
        assert report.imbalance_before > 0.01
        assert report.imbalance_after < (1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_function_stays(name: str) -> None:
    """On all of the data. Its twin: parameters that are a thousandth larger."""
    model, loss, loader, _, _ = built(name)
    model, batches = copy.deepcopy(model), list(loader)
    before, params = losses(model, loss, batches), [p.detach().clone() for p in model.parameters()]
    moved = nf.rebalance_(model, analysis_of(name).equilibrium, loss, batches[0])
    assert largest_change(before, losses(model, loss, batches)) < UNCHANGED[before.dtype]
    assert max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), params, strict=True)) > 1e-2
    moved()
    assert torch.equal(before, losses(model, loss, batches))
    for parameter in model.parameters():
        parameter.data.mul_(1.001)
    assert largest_change(before, losses(model, loss, batches)) > 1e-5


def test_batch_normalisation_in_train_mode_has_the_symmetries_but_another_noise() -> None:
    model, loss, loader, sgd, _ = built("digits_cnn")
    analysis = analysis_of("digits_cnn")
    assert any("set microbatches=True" in note for note in analysis.equilibrium.notes)
    batches = DataLoader(loader.dataset, sgd.batch_size, drop_last=True)
    training = nf.analyze(copy.deepcopy(model).train(), loss, batches, sgd, microbatches=True, progress=False)
    assert [r.name for r in training.reports] == [r.name for r in analysis.reports]
    assert not training.equilibrium.notes
    assert training.equilibrium.status is nf.Status.CONVERGED
    assert abs(training.noise.trace / analysis.noise.trace - 1) > 0.2
    with pytest.raises(nf.CoupledExamplesError):
        nf.analyze(copy.deepcopy(model).train(), loss, batches, sgd, progress=False)


@pytest.mark.slow
def test_adapters_have_no_equilibrium_at_the_start_and_the_reason_is_given() -> None:
    built("lora")
    model, _, dataset = sys.modules["lora"].adapted(steps=0)
    _, loss, _, sgd, _ = built("lora")
    analysis = nf.analyze(model, loss, DataLoader(dataset, 64), sgd, progress=False)
    assert [report.status for report in analysis.reports] == ["degenerate"] * 4
    assert all("Train a few steps first" in report.message for report in analysis.reports)
    # Nothing moves: all coordinates are zero.
    before = copy.deepcopy(model.state_dict())
    assert nf.rebalance_(model, analysis.equilibrium, loss, dataset[:4]).change == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_the_mixture_says_that_it_is_computed_in_float32() -> None:
    assert any("computed in torch.float32" in note for note in analysis_of("mixture").equilibrium.notes)
    assert not any("torch.float32" in note for note in analysis_of("llama").equilibrium.notes)

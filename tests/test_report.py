"""The analysis, its table, its picture and its files; on small models and on the digits example."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import checks
import noetherflow as nf
from cases import case, cases
from noetherflow._analyze import rebalanced_copy
from noetherflow.report import figure

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits_mlp.py"


def text(analysis: nf.Analysis, monkeypatch: pytest.MonkeyPatch, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    return str(analysis)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_mlp", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_classifier_comes_to_rest(example: ModuleType) -> None:
    """The whole promise on real data: function unchanged, every drift gone, quieter than before."""
    model, loss, loader, sgd = example.build()
    everything = example.data().tensors
    symmetries = nf.find_symmetries(model, loss, next(iter(loader)))
    assert list(symmetries) == ["0 -> 2", "2 -> 4", "4 -> 6"]
    before = loss(model, everything).detach()
    accuracy = (model(everything[0]).argmax(1) == everything[1]).double().mean()
    assert accuracy > 0.9  # it has learnt something
    noise = nf.estimate_noise(model, loss, loader, symmetries)
    rates = nf.drift(noise, sgd, model)
    equilibrium = nf.solve_equilibrium(noise, sgd, model)
    assert equilibrium.status is nf.Status.CONVERGED
    assert equilibrium.iterations <= 15
    assert equilibrium.trace_after < equilibrium.trace_before
    nf.rebalance_(model, equilibrium, loss, everything)
    after = loss(model, everything).detach()
    assert (after - before).abs().max() <= 1e-12
    anew = nf.estimate_noise(model, loss, loader, symmetries)
    torch.testing.assert_close(anew.trace.item(), equilibrium.trace_after, rtol=1e-9, atol=0)
    for name, rate in nf.drift(anew, sgd, model).items():
        assert torch.linalg.norm(rate) < 1e-9 * torch.linalg.norm(rates[name])
        assert (rate.abs() < 1e-9 * rates[name].abs().clamp_min(1e-3 * rates[name].abs().max())).all()


@pytest.mark.parametrize("one", cases(), ids=str)
def test_reports_hold_what_the_verbs_give(one: object, monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = nf.SGD(0.1, 5, 0.02)
    analysis = nf.analyze(one.model, one.loss, one.loader(), sgd, one.symmetries)
    noise = checks.noise_of(one)
    rates = nf.drift(noise, sgd, one.model)
    for report in analysis.reports:
        symmetry = analysis.equilibrium.symmetries[report.name]
        total = symmetry.charge(one.params)
        total = total.trace() if total.ndim == 2 else total.sum()
        assert report.charge == pytest.approx(total.item())
        assert report.residual < 1e-11
        rows = rates[report.name].shape[0] if rates[report.name].ndim else 1
        rms = (rates[report.name].square().sum() / rows).sqrt().item() * 0.1
        assert report.drift == pytest.approx(rms)
        assert report.noise_plus >= 0
        assert report.noise_error > 0
        assert report.status == "converged"
    written = analysis.to_json()
    assert written["totals"]["noise_trace_before"] == pytest.approx(noise.trace.item())
    assert written["settings"]["gamma"] == 0.01
    json.dumps(written, allow_nan=False)
    shown = text(analysis, monkeypatch)
    for heading in ("size", "resid", "charge", "noise+", "noise-", "drift", "dist", "steps", "Tr Sigma", "potential"):
        assert heading in shown


def test_the_table_fits_a_terminal_and_ends_with_what_its_columns_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("diagonal, coupled layers")
    shown = text(nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries), monkeypatch)
    assert max(map(len, shown.splitlines())) <= 80
    assert "independent generators" in shown


def test_what_was_left_alone_is_explained_under_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[1] = 0.0
        one.model[0].bias[1] = -1.0
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries)
    shown = text(analysis, monkeypatch, width=200)
    assert "hidden*" in shown
    assert "* hidden: rows 1 carry neither" in shown
    assert analysis.to_json()["symmetries"][0]["status"] == "singular"
    assert math.isfinite(analysis.reports[0].relaxation_steps)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_the_picture_is_written_whole(one: object, tmp_path: Path) -> None:
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5, 0.02), one.symmetries)
    paths = figure.save(analysis, tmp_path / "deep" / "digits")
    assert [path.name for path in paths] == ["digits.png", "digits.svg"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    assert sorted(entry.name for entry in (tmp_path / "deep").iterdir()) == ["digits.png", "digits.svg"]


def test_a_rebalanced_copy_leaves_the_model_where_it_is() -> None:
    one = case("diagonal")
    model = one.model.float()
    loader = [tuple(tensor.float() for tensor in batch) for batch in one.loader()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis = nf.analyze(model, one.loss, loader, nf.SGD(0.1, 5, 0.02), one.symmetries)
    moved = rebalanced_copy(model, analysis, one.loss, loader[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, parameter in moved.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.detach().double(), analysis.equilibrium.params[name], rtol=1e-6, atol=1e-7)


def test_an_empty_loader_is_refused() -> None:
    one = case("diagonal")
    with pytest.raises(nf.EmptyDataError):
        nf.analyze(one.model, one.loss, [], nf.SGD(0.1, 5), one.symmetries)

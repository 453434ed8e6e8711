"""`equilibrate`, `analyze` and the command line with the settings of AdamW."""

import json
import math
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import checks
import noetherflow as nf
from cases import case, make
from noetherflow._cli import app
from test_equilibrate import attention
from test_search import samples

DECAYED = nf.AdamW(lr=0.01, weight_decay=0.1, batch_size=5)
UNDECAYED = nf.AdamW(lr=0.01, weight_decay=0.0, batch_size=5)
FILE = """
    import torch, noetherflow as nf

    def build():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(9)]
        return net, loss, batches, nf.AdamW(lr=0.01, weight_decay=0.1, batch_size=8)
"""


@pytest.mark.parametrize("adamw", [DECAYED, nf.AdamW(0.01, weight_decay=0.0, batch_size=5)], ids=["decay", "none"])
@pytest.mark.parametrize("name", ["diagonal, coupled layers", "scalar and diagonal on shared tensors"])
def test_the_search_ends_where_a_single_measurement_says(name: str, adamw: nf.AdamW) -> None:
    one = case(name)
    solved = nf.solve_equilibrium(checks.noise_of(one), adamw, one.model)
    given = (one.model, one.loss, one.loader(), adamw, one.symmetries)
    searched = nf.equilibrate(*given, tolerance=1e-10, progress=False)
    torch.testing.assert_close(searched.coordinates, solved.coordinates, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(searched.relaxation_steps, solved.relaxation_steps, rtol=1e-7, atol=0)
    assert searched.status is nf.Status.CONVERGED
    assert max(imbalance.after for imbalance in searched.imbalance.values()) < 1e-9
    nf.rebalance_(one.model, searched, one.loss, one.batch)
    there = nf.solve_equilibrium(checks.noise_of(one), adamw, one.model)
    assert max(imbalance.before for imbalance in there.imbalance.values()) < 1e-9
    # The twin: SGD rests elsewhere.
    sgd = nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.01, 5, 0.1), one.model)
    assert max(sgd.distance.values()) > 0.1


def test_heads_stay_and_gains_come_to_rest() -> None:
    one = make(attention)
    found = nf.equilibrate(one.model, one.loss, samples(one, 40, torch.Generator()), DECAYED, one.symmetries)
    mixing = {name for name, s in one.symmetries.items() if s.action is not nf.Action.SCALES_ENTRIES}
    assert mixing
    assert one.symmetries.keys() - mixing
    for name, outcome in found.outcomes.items():
        assert outcome.status is (nf.Status.NO_CHARGE if name in mixing else nf.Status.CONVERGED)
        assert bool(found.coordinates[name].any()) == (name not in mixing)
        assert found.standard_error[name].isnan().all() == (name in mixing)
        assert math.isnan(found.imbalance[name].before) == (name in mixing)
    assert found.status is nf.Status.NO_CHARGE
    assert "Query" not in str(found)
    assert "no charge" in str(found)


def test_relaxation_is_that_of_the_drift_with_step_sizes_held() -> None:
    """A small departure from the equilibrium: the drift over the charge that it adds is the rate."""
    one = case("diagonal")
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), DECAYED, one.model)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    noise, (name,) = checks.noise_of(one), one.symmetries
    symmetry, theta = one.symmetries[name], one.params
    v = {n: noise.variance[n] / 5 + noise.mean[n].square() for n in symmetry.names}
    step = torch.full((5,), 1e-5, dtype=torch.float64)
    moved = symmetry.act(step, theta)
    charge = [symmetry.charge({n: p[n] * (v[n].sqrt() / 0.01).sqrt() for n in symmetry.names}) for p in (theta, moved)]
    at = nf.SecondMoments(symmetry.act(-2 * step, v), dict.fromkeys(v, 1), one.symmetries)
    rate = -nf.drift(at, DECAYED, moved)[name] / (charge[1] - charge[0])
    torch.testing.assert_close(1 / rate, equilibrium.relaxation_steps[name], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_samples() -> None:
    one, generator = case("diagonal"), torch.Generator().manual_seed(2)
    ends = [
        nf.equilibrate(one.model, one.loss, samples(one, 640, generator), DECAYED, one.symmetries, progress=False)
        for _ in range(30)
    ]
    for name in one.symmetries:
        spread = torch.stack([end.coordinates[name] for end in ends]).std(0)
        claimed = torch.stack([end.standard_error[name] for end in ends]).square().mean(0).sqrt()
        assert 0.75 < (claimed / spread).mean() < 1.35, name


def test_an_analysis_in_the_units_of_the_conserved_charge(tmp_path: Path) -> None:
    one = case("diagonal")
    analysis = nf.analyze(one.model, one.loss, one.loader(), DECAYED, one.symmetries, progress=False)
    (report,), noise = analysis.reports, checks.noise_of(one)
    rate = nf.drift(noise, DECAYED, one.model)["hidden"]
    assert report.drift == pytest.approx(float(rate.square().mean().sqrt()))
    v = {n: noise.variance[n] / 5 + noise.mean[n].square() for n in noise.variance}
    weighted = {n: one.params[n] * (v[n].sqrt() / 0.01).sqrt() for n in v}
    assert report.charge == pytest.approx(float(one.symmetries["hidden"].charge(weighted).sum()), rel=1e-9)
    assert "Symmetries under AdamW" in str(analysis)
    analysis.save(tmp_path / "analysis.safetensors")
    again = nf.Analysis.load(tmp_path / "analysis.safetensors")
    assert again.settings == DECAYED
    assert again.to_json()["settings"]["optimizer"] == "AdamW"


def test_a_file_with_adamw_is_analysed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(FILE))
    done = CliRunner().invoke(app, ["analyze", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "out").rglob("*.json")
    settings = json.loads(written.read_text())["settings"]
    assert (settings["optimizer"], settings["weight_decay"]) == ("AdamW", 0.1)

"""Every number of the report, its table, its picture and its file, against the definitions."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import scipy.linalg
import torch
from torch import Tensor

import checks
import noetherflow as nf
import oracles
from cases import Case, case
from noetherflow.report import figure

LR, SIZE, DECAY, MOMENTUM = 0.002, 5, 0.3, 0.8
SETTINGS = nf.SGD(LR, SIZE, DECAY, MOMENTUM)
# As docs/conventions.md has it: gamma is half the weight decay, momentum divides the learning rate by 1 - mu.
GAMMA, RATE = DECAY / 2, LR / (1 - MOMENTUM)
HEAT = RATE / (2 * SIZE)
# Alone on their tensors, so that each has its closed form.
NAMES = ["scalar, two sides", "diagonal", "matrix", "scalar, plus only"]


class Truth(NamedTuple):
    """A symmetry's numbers from the definitions: per coordinate, or as a matrix."""

    charge: Tensor
    push: Tensor
    pull: Tensor
    x: Tensor
    times: Tensor


def as_matrix(value: Tensor) -> Tensor:
    return value if value.ndim == 2 else torch.diag(value.reshape(-1))


def truth_of(one: Case, name: str) -> tuple[Truth, oracles.Statistics]:
    symmetry = one.symmetries[name]
    noise = oracles.statistics(one.model, oracles.stacked(one.model, one.loss, one.batch), one.symmetries)
    here = oracles.grams(symmetry, one.model, {n: p.unsqueeze(0) for n, p in one.params.items()})
    plus, minus = (as_matrix(side) for side in here)
    noisy = [as_matrix(side) for side in noise.grams[name]]
    push, pull = 2 * HEAT * noisy[0] + 4 * GAMMA * minus, 2 * HEAT * noisy[1] + 4 * GAMMA * plus
    # e^{2x} R e^{2x} = P
    root = torch.from_numpy(scipy.linalg.sqrtm(pull.numpy()).real)
    inner = torch.from_numpy(scipy.linalg.sqrtm((root @ push @ root).numpy()).real)
    square = torch.linalg.solve(root, torch.linalg.solve(root, inner).mT)
    x = torch.from_numpy(scipy.linalg.logm(square.numpy()).real) / 2
    # A departure d moves drift by -(P + R) d - d (P + R) and charge by (C+ + C-) d + d (C+ + C-), all at rest.
    grow, shrink = torch.linalg.matrix_exp(x), torch.linalg.matrix_exp(-x)
    forces = shrink @ push @ shrink + grow @ pull @ grow
    sizes = grow @ plus @ grow + shrink @ minus @ shrink
    speeds = torch.from_numpy(scipy.linalg.eigh(forces.numpy(), sizes.numpy(), eigvals_only=True))
    times = 1 / (speeds * RATE)
    if not isinstance(symmetry, nf.MatrixSymmetry):
        times = sizes.diagonal() / forces.diagonal() / RATE
    return Truth(plus - minus, push, pull, x, times), noise


def analysis_of(one: Case) -> nf.Analysis:
    return nf.analyze(one.model, one.loss, [one.batch], SETTINGS, one.symmetries, progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_report(name: str) -> None:
    one = case(name)
    ((label, symmetry),) = one.symmetries.items()
    (report,) = analysis_of(one).reports
    truth, noise = truth_of(one, label)
    coordinates = len(truth.x)
    assert (report.name, report.kind) == (label, type(symmetry).__name__.removesuffix("Symmetry").lower())
    assert report.dimension == len(oracles.coordinates(symmetry, one.params))
    assert 0 <= report.residual < 1e-11
    sides = [as_matrix(side).trace().item() for side in noise.grams[label]]
    error = torch.as_tensor(noise.errors[label][2]).square().sum().sqrt().item()
    drift = RATE * torch.linalg.norm(truth.push - truth.pull).item() / coordinates**0.5
    assert report.charge == pytest.approx(truth.charge.trace().item(), rel=1e-9)
    assert (report.noise_plus, report.noise_minus) == pytest.approx((sides[0], sides[1]), rel=1e-9)
    assert report.noise_error == pytest.approx(error, rel=1e-6)
    assert report.drift == pytest.approx(drift, rel=1e-9)
    assert report.distance == pytest.approx(torch.linalg.norm(truth.x).item() / coordinates**0.5, rel=1e-7)
    # Of a matrix only the slowest direction is known.
    times = truth.times.sort().values
    slowest = times[-1].item()
    middle = slowest if isinstance(symmetry, nf.MatrixSymmetry) else times[(len(times) - 1) // 2].item()
    assert report.slowest_steps == pytest.approx(slowest, rel=1e-7)
    assert report.relaxation_steps == pytest.approx(middle, rel=1e-7)
    assert (report.status, report.message) == ("converged", "")


def test_the_cases_tell_the_numbers_of_a_report_apart() -> None:
    """Or two that are swapped would not be seen."""
    (report,) = analysis_of(case("diagonal")).reports
    numbers = [report.charge, report.noise_plus, report.noise_minus, report.drift, report.distance]
    numbers += [report.relaxation_steps, report.slowest_steps, report.dimension, report.noise_error]
    assert all(abs(a - b) > 0.01 * abs(b) for k, a in enumerate(numbers) for b in numbers[:k])


def test_a_symmetry_of_some_rows_at_rest_nowhere_says_so_in_its_report() -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[1] = 0.0
        one.model[0].bias[1] = -1.0
    analysis = nf.analyze(one.model, one.loss, [one.batch], nf.SGD(0.1, 5), one.symmetries, progress=False)
    (report,) = analysis.reports
    times = analysis.equilibrium.relaxation_steps["hidden"]
    alive = sorted(times[[0, 2, 3, 4]].tolist())
    assert times[1] == math.inf
    assert (report.relaxation_steps, report.slowest_steps) == (alive[1], alive[3])
    assert report.status == "singular"


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_measured_anew_at_both_ends(name: str) -> None:
    one = case(name)
    analysis = analysis_of(one)
    equilibrium = analysis.equilibrium
    ((label, symmetry),) = one.symmetries.items()
    x = truth_of(one, label)[0].x
    x = x if isinstance(symmetry, nf.MatrixSymmetry) else x.diagonal().reshape(symmetry.identity(one.params).shape)
    ends = {"before": torch.zeros_like(x), "after": x}
    for end, coordinate in ends.items():
        expected = checks.potential_by_definition(one, {label: coordinate}, RATE, SIZE, DECAY)
        trace = oracles.covariance(checks.move(one, {label: coordinate}), one.loss, one.batch)[1].trace().item()
        assert getattr(equilibrium, f"potential_{end}") == pytest.approx(expected, rel=1e-9)
        assert getattr(equilibrium, f"trace_{end}") == pytest.approx(trace, rel=1e-9)
    assert equilibrium.potential_after < equilibrium.potential_before


@pytest.mark.parametrize("name", ["diagonal", "matrix"])
def test_the_file_holds_the_numbers_of_the_report(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(case(name))
    analysis.save_json(tmp_path / "deep" / "analysis.json")
    written = json.loads((tmp_path / "deep" / "analysis.json").read_text(), parse_constant=pytest.fail)
    (report,), equilibrium = analysis.reports, analysis.equilibrium
    (symmetry,) = written["symmetries"]
    values = {field: getattr(report, field) for field in symmetry}
    assert symmetry == {field: None if value != value else value for field, value in values.items()}
    assert symmetry.keys() >= {"charge", "noise_plus", "noise_minus", "drift", "distance", "slowest_steps", "status"}
    assert written["totals"] == {
        "noise_trace_before": equilibrium.trace_before,
        "noise_trace_after": equilibrium.trace_after,
        "noise_trace_ratio": equilibrium.trace_after / equilibrium.trace_before,
        "potential_before": equilibrium.potential_before,
        "potential_after": equilibrium.potential_after,
        "newton_steps": equilibrium.iterations,
        "passes": 2,
        "status": "converged",
    }
    assert written["examples"] == 24
    settings = {"lr": LR, "batch_size": SIZE, "weight_decay": DECAY, "momentum": MOMENTUM, "replacement": True}
    settings |= {"dataset_size": None, "finite_step": False, "gamma": GAMMA, "temperature": HEAT}
    assert written["settings"].pop("optimizer") == "SGD"
    assert written["settings"] == pytest.approx(settings)
    assert written["versions"]["torch"] == torch.__version__


def test_what_json_has_no_word_for_is_null_in_the_file(tmp_path: Path) -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[:] = 0.0
        one.model[0].bias[:] = -1.0
    analysis = nf.analyze(one.model, one.loss, [one.batch], nf.SGD(0.1, 5), one.symmetries, progress=False)
    analysis.save_json(tmp_path / "analysis.json")
    written = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert analysis.reports[0].relaxation_steps == math.inf
    assert written["symmetries"][0]["relaxation_steps"] is None


# The table.


def cells(text: str, row: str) -> dict[str, str]:
    """The cells of a row of the first table by their headings; only the first heading and cell may hold spaces."""
    lines = text.splitlines()
    head = next(line for line in lines if re.search(r"\bsymmetry\b", line) and "charge" in line)
    line = next(line for line in lines if line.strip().startswith(row))
    headings = head.split()[1:]
    return dict(zip(headings, line.split()[-len(headings) :], strict=True))


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


@pytest.mark.parametrize("name", ["scalar, two sides", "diagonal", "matrix"])
def test_the_table_shows_each_number_under_its_heading(name: str) -> None:
    analysis = analysis_of(case(name))
    (report,) = analysis.reports
    found = cells(str(analysis), report.name)
    expected = {
        "charge": report.charge,
        "noise+": report.noise_plus,
        "noise-": report.noise_minus,
        "dist": report.distance,
    }
    for heading, value in expected.items():
        assert number(found[heading]) == pytest.approx(value, rel=0.006, abs=0.0006), heading
    assert number(found["size"]) == report.dimension
    assert number(found["steps"]) == pytest.approx(report.relaxation_steps, abs=0.51)
    assert number(found["drift"]) == pytest.approx(report.drift, rel=0.06)
    assert number(found["resid"]) == pytest.approx(report.residual, rel=0.51)


def test_the_second_table_shows_the_totals() -> None:
    analysis = analysis_of(case("diagonal"))
    equilibrium = analysis.equilibrium
    text = str(analysis)
    totals = {
        "gradient noise": (equilibrium.trace_before, equilibrium.trace_after),
        "potential": (equilibrium.potential_before, equilibrium.potential_after),
    }
    for what, (before, after) in totals.items():
        (line,) = (
            line for line in text.splitlines() if line.strip().startswith(what) and line.split()[-1][0].isdigit()
        )
        assert [number(cell) for cell in line.split()[-3:]] == pytest.approx([before, after, after / before], rel=1e-4)


# The picture.


def test_push_and_pull_lie_on_their_axes() -> None:
    for name in ("scalar, two sides", "diagonal", "matrix"):
        one = case(name)
        (label,) = one.symmetries
        truth, _ = truth_of(one, label)
        balance = figure.draw(analysis_of(one)).axes[0]
        points, line = balance.lines
        assert ("pull" in balance.get_xlabel(), "push" in balance.get_ylabel()) == (True, True)
        assert list(points.get_xdata()) == pytest.approx(truth.pull.diagonal().tolist(), rel=1e-9)
        assert list(points.get_ydata()) == pytest.approx(truth.push.diagonal().tolist(), rel=1e-9)
        assert points.get_label() == label
        assert list(line.get_xdata()) == list(line.get_ydata())
        assert (balance.get_xscale(), balance.get_yscale()) == ("log", "log")
        assert [text.get_text() for text in balance.get_legend().get_texts()] == [label]


@pytest.mark.parametrize("name", ["diagonal", "matrix", "scalar, two sides"])
def test_distances_are_drawn_in_order(name: str) -> None:
    one = case(name)
    (label,) = one.symmetries
    x = truth_of(one, label)[0].x
    expected = sorted(torch.linalg.eigvalsh(x).tolist())
    distance = figure.draw(analysis_of(one)).axes[1]
    points, zero = distance.lines
    assert list(points.get_ydata()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    places = list(points.get_xdata())
    assert places == sorted(places)
    assert 0 < places[0] <= places[-1] < 1
    assert len(places) == len(expected)
    assert set(zero.get_ydata()) == {0}


def test_several_symmetries_are_drawn_apart() -> None:
    one = case("diagonal, coupled layers")
    analysis = analysis_of(one)
    for axes, lines in zip(figure.draw(analysis).axes[:2], (3, 3), strict=True):
        points = axes.lines[:lines]
        assert [line.get_label() for line in points] == list(one.symmetries)
        assert [len(line.get_xdata()) for line in points] == [6, 4, 6]
        assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == 3


def test_a_legend_of_many_symmetries_names_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case("diagonal, coupled layers")
    analysis = analysis_of(one)
    legends = []
    for named in (3, 2):
        monkeypatch.setattr(figure, "_NAMED", named)
        legend = figure.draw(analysis).axes[0].get_legend()
        legends.append(([text.get_text() for text in legend.get_texts()], legend.get_title().get_text()))
    assert legends == [(list(one.symmetries), ""), (list(one.symmetries)[:2], "2 of 3 symmetries")]


def test_bars_are_ratios_of_the_totals() -> None:
    analysis = analysis_of(case("diagonal"))
    equilibrium = analysis.equilibrium
    totals = figure.draw(analysis).axes[2]
    noise = equilibrium.trace_after / equilibrium.trace_before
    potential = equilibrium.potential_after / equilibrium.potential_before
    assert abs(noise - potential) > 1e-3
    assert [bar.get_height() for bar in totals.patches] == pytest.approx([noise, potential])
    assert [label.get_text().split()[0] for label in totals.get_xticklabels()] == ["noise", "potential"]
    assert [text.get_text() for text in totals.texts] == [f"{noise:.3f}", f"{potential:.3f}"]
    assert totals.get_ylim()[0] == 0
    assert totals.get_ylim()[1] > max(1.0, noise, potential)

"""The page on forecasts: its tables are the stored measurements, its sentences hold, and what measures is right."""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import forecast_holds as study
import study as page_of_study
from holds.case import case, half_time, jackknife, summary
from holds.digits import losses, relu_network, relu_trace

from curvatures import hessian

RESULTS: dict[str, Any] = json.loads(study.OUT.read_text("utf-8"))
BY_NAME = {result["case"]: result for result in RESULTS["cases"]}
SAID = {name: summary(result) for name, result in BY_NAME.items()}


def shown() -> str:
    return page_of_study.shown(study.PAGE)


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    assert shown() == study.table(RESULTS)
    changed = copy.deepcopy(RESULTS)
    changed["cases"][0]["rows"][0]["measured"] *= 1.1
    assert shown() != study.table(changed)


GENTLE = ["F3, phi = 0.2", "F3, phi = 1", "F3, phi = 5", "F4's problem, x = 0.9"]
FINISHED, UNFINISHED = "F4 from Kaiming, finished GD", "F4 from Kaiming, unfinished GD"


def slowness(name: str) -> float:
    """The time that is forecast over the time that is measured."""
    return float(SAID[name]["half predicted"][0] / SAID[name]["half measured"][0])


def test_the_sentences_on_small_steps_at_a_minimum_hold() -> None:
    assert max(SAID[name]["share"] for name in GENTLE) == pytest.approx(0.11, abs=0.005)
    assert all(abs(SAID[name]["end ratio"][0] - 1) < 0.04 for name in GENTLE)
    assert all(SAID[name]["sign"] == (8, 8) for name in GENTLE)
    assert all(abs(slowness(name) - 1) < 0.125 for name in GENTLE[1:])
    assert slowness(GENTLE[0]) == pytest.approx(0.69, abs=0.005)
    curve = [value for _, value in BY_NAME[GENTLE[0]]["curve"]]
    assert (min(curve), curve[-1]) == (pytest.approx(32.8, abs=0.05), pytest.approx(36.6, abs=0.05))


def test_the_sentences_on_large_steps_and_learning_hold() -> None:
    assert SAID[FINISHED]["share"] == pytest.approx(0.61, abs=0.005)
    assert round(SAID[FINISHED]["half measured"][0]) == 17_234
    assert slowness(FINISHED) == pytest.approx(1.9, abs=0.05)
    assert 1 / SAID[FINISHED]["end ratio"][0] == pytest.approx(1.04, abs=0.005)
    assert SAID[UNFINISHED]["end ratio"][0] == pytest.approx(0.41, abs=0.005)
    assert all(SAID[name]["change measured"][0] < 0.1 for name in (FINISHED, UNFINISHED))
    assert all(SAID[name]["sign"] == (8, 8) for name in (FINISHED, UNFINISHED))


def test_the_sentences_on_digits_hold() -> None:
    plain, moved = SAID["digits MLP"], SAID["digits MLP, moved"]
    assert plain["sign"] == (0, 8)
    assert plain["change predicted"][0] == pytest.approx(0.93, abs=0.005)
    assert plain["change measured"][0] == pytest.approx(1.16, abs=0.005)
    assert all(row["error"] < 0.01 for row in BY_NAME["digits MLP"]["rows"])
    assert moved["sign"] == (7, 8)
    assert round(moved["half measured"][0]) == 47
    curve = [value for _, value in BY_NAME["digits MLP, moved"]["curve"]]
    assert (curve[0], min(curve)) == (pytest.approx(43.8, abs=0.05), pytest.approx(31.8, abs=0.05))
    assert min(curve) < moved["end predicted"][0] < moved["end measured"][0]
    assert moved["end measured"][0] == pytest.approx(38.7, abs=0.05)


@pytest.mark.parametrize("sizes", [(5, 4, 3), (5, 6, 4, 3)])
def test_the_trace_of_the_digits_is_that_of_the_full_hessian(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = relu_network(sizes)
    batch = torch.randn(20, 5).double(), torch.randint(0, 3, (20,))
    truth = float(hessian(model, losses, [batch]).trace())
    assert relu_trace(model, batch[0]) == pytest.approx(truth, rel=1e-10)
    # A twin: without the term of a smooth activation, the trace is not that of the Hessian.
    smooth = nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in model))
    assert relu_trace(model, batch[0]) != pytest.approx(float(hessian(smooth, losses, [batch]).trace()), rel=1e-3)


def decaying(time: float, end: float, seeds: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Curves from starts 1, 2, ... to a share of the start, with a relaxation time."""
    steps = torch.arange(0, 400, 2)
    starts = torch.arange(1.0, seeds + 1).double()
    curves = starts * (end + (1 - end) * torch.exp(-steps / time)).unsqueeze(1)
    return steps, curves, end * starts


@pytest.mark.parametrize("end", [0.3, 2.5])
def test_the_time_to_half_is_that_of_a_planted_decay(end: float) -> None:
    steps, curves, ends = decaying(30.0, end)
    assert half_time(steps, curves, ends) == pytest.approx(30 * math.log(2), rel=2e-3)
    assert half_time(steps, curves, 1.1 * ends) != pytest.approx(30 * math.log(2), rel=2e-2)


def test_the_error_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    error = jackknife(lambda seeds: float(values[seeds].mean()), 8)
    assert error == pytest.approx(float(values.std()) / 8**0.5, rel=1e-6)


def test_a_sign_counts_only_where_the_forecast_is_sure() -> None:
    rows = [
        {"seed": k, "now": 1.0, "predicted": ratio, "ratio": ratio, "error": 0.1, "half": 1.0, "measured": measured}
        for k, (ratio, measured) in enumerate([(1.3, 1.2), (1.1, 0.5), (0.5, 1.1), (0.5, 0.9)])
    ]
    assert summary({"case": "", "half": 1.0, "half_error": 0.1, "share": 0.1, "rows": rows})["sign"] == (2, 3)


def test_a_case_holds_what_was_forecast_and_what_was_measured() -> None:
    torch.manual_seed(0)
    model = relu_network((5, 4, 3))
    batches = [(torch.randn(20, 5).double(), torch.randint(0, 3, (20,))) for _ in range(4)]
    forecast = nf.forecast(model, losses, batches, nf.SGD(0.1, 4, 1e-3), progress=False)
    steps, curves, ends = decaying(30.0, 0.5, 3)
    result = case("planted", steps, curves, ends, [forecast] * 3, lr=0.1, unit=2.0)
    limit = min(forecast.noisy_step.now.value, forecast.noisy_step.then.value)
    assert result["share"] == pytest.approx(0.1 / limit)
    assert [row["measured"] for row in result["rows"]] == [0.5, 1.0, 1.5]
    assert {row["predicted"] for row in result["rows"]} == {forecast.trace.then.value / 2}
    assert {row["ratio"] for row in result["rows"]} == {forecast.trace.ratio.value}
    assert result["half_error"] == pytest.approx(0, abs=1e-9)
    assert result["curve"][0] == [0, 2.0]

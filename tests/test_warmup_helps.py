"""The page on warmup: its tables are the stored measurements, its sentences hold, and what measures is right."""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from noetherflow.forecasting.schedule import Need, Warmup

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study as page_of_study
import warmup_helps as study
from warming.case import State, case, recommended, schedule, summary
from warming.linear import F4, of_f4
from warming.normalised import Normalised, of_normalised

RESULTS: dict[str, Any] = json.loads(study.OUT.read_text("utf-8"))
SAID = {result["case"]: summary(result) for result in RESULTS["cases"]}


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    shown = page_of_study.shown(study.PAGE)
    assert shown == study.table(RESULTS)
    changed = copy.deepcopy(RESULTS)
    changed["cases"][0]["rows"][0]["with"] *= 1.1
    assert shown != study.table(changed)


def test_the_problems_of_the_page_are_those_of_the_study() -> None:
    assert [result["case"] for result in RESULTS["cases"]] == [problem.name for problem in problems()]


def problems() -> list[F4 | Normalised]:
    return [*of_f4(), *of_normalised()]


def test_the_steps_of_f4_are_those_of_torch() -> None:
    problem = of_f4()[1]
    start = {name: tensor[2:4] for name, tensor in problem.starts().items()}
    rates = [lambda step: 1e-4 * (step + 1), lambda step: 3e-4]
    ends = problem.train(start, rates, 5, [2, 3])
    for row, seed in enumerate((2, 3)):
        u, w = (start[name][row].clone().requires_grad_() for name in ("u", "w"))
        optimizer = torch.optim.SGD([u, w], lr=1.0)
        drawn = torch.randn(1000, 50, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for step in range(5):
            x, noise = drawn[step, :20], drawn[step, 20:]
            optimizer.param_groups[0]["lr"] = rates[row](step)
            optimizer.zero_grad()
            (u @ w @ x - problem.target @ x - noise).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(ends["u"][row], u.detach())
        torch.testing.assert_close(ends["w"][row], w.detach())


def test_the_loss_of_f4_is_that_of_many_examples() -> None:
    problem = of_f4()[1]
    params = {name: 0.3 * tensor for name, tensor in problem.starts().items()}
    drawn = torch.randn(200_000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, noise = drawn[:, :20], drawn[:, 20:]
    error = x @ (params["u"][0] @ params["w"][0] - problem.target).T - noise
    assert float(problem.loss(params)[0]) == pytest.approx(float(error.square().sum(1).mean()), rel=0.01)
    assert float(problem.loss({**params, "u": 1e9 * params["u"]})[0]) == float("inf")


class Planted:
    """A problem whose forecasts and losses are given: the loss at the end is the sum of all learning rates."""

    name, lr = "planted", 1.0

    def __init__(self, warmups: list[Warmup]) -> None:
        self.warmups, self.asked = warmups, 0

    def starts(self) -> State:
        return {"sum": torch.zeros(8, dtype=torch.float64)}

    def forecast(self, params: State, seed: int) -> Any:
        warmup = self.warmups[int(params["sum"][0] > 0)]
        self.asked += 1
        limit = SimpleNamespace(now=SimpleNamespace(value=0.1), then=SimpleNamespace(value=3.0))
        return SimpleNamespace(warmup=warmup, noisy_step=limit)

    def train(self, params: State, schedules: Sequence[Any], steps: int, seeds: Sequence[int]) -> State:
        sums = torch.tensor([sum(each(step) for step in range(steps)) for each in schedules], dtype=torch.float64)
        return {"sum": params["sum"] + sums}

    def loss(self, params: State) -> Tensor:
        return params["sum"]


def test_schedules_are_joined_where_a_forecast_asks_for_another() -> None:
    begin = Warmup(Need.BEGIN, ((0, 0.1), (4, 0.5)), "")
    problem = Planted([begin, Warmup(Need.WARMUP, ((0, 0.5), (2, 1.0)), "")])
    row = recommended(problem, problem.starts(), 3)
    assert row["points"] == [(0, 0.1), (4, 0.5), (4, 0.5), (6, 1.0)]
    assert [said["need"] for said in row["said"]] == ["BEGIN", "WARMUP"]
    result = case(problem, 10)
    assert result["steps"] == 16
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.75, *[1.0] * 10]
    assert [row["with"] for row in result["rows"]] == pytest.approx([sum(rates)] * 8)
    assert [row["without"] for row in result["rows"]] == [16.0] * 8
    # A schedule that reaches the learning rate needs no other forecast.
    reached = Planted([Warmup(Need.BEGIN, ((0, 0.1), (4, 1.0)), "")])
    assert len(recommended(reached, reached.starts(), 0)["said"]) == 1


def test_where_none_is_recommended_a_linear_warmup_is_the_comparison() -> None:
    result = case(Planted([Warmup(Need.NONE, (), "")]), 5, ramp=10)
    assert result["steps"] == 15
    ramp = [schedule([(0, 0.1), (10, 1.0)], 1.0)(step) for step in range(15)]
    assert [row["with"] for row in result["rows"]] == pytest.approx([sum(ramp)] * 8)


def test_runs_that_diverge_have_no_part_in_means() -> None:
    said = [{"need": "WARMUP", "now": 0.1, "then": 1.0, "steps": 3}]
    rows = [
        {"seed": k, "said": said, "points": [[0, 0.1], [3, 1.0]], "with": 1.0 + k, "without": None if k == 2 else 4.0}
        for k in range(3)
    ]
    summed = summary({"case": "", "lr": 1.0, "steps": 9, "ramp": 0, "rows": rows})
    assert (summed["diverged with"], summed["diverged without"]) == (0, 1)
    assert summed["without"] == (4.0, 0.0)
    assert summed["worse"][0] == 2.5


def test_a_network_of_the_study_is_scale_invariant() -> None:
    problem = Normalised("", 0.1, 1e-4, 1e-4)
    start = problem.starts()
    grown = {
        name: tensor * (7.0 if name in {"body.0.weight", "body.3.weight"} else 1.0) for name, tensor in start.items()
    }
    torch.testing.assert_close(problem.loss(grown), problem.loss(start))
    other = {**start, "body.8.weight": 7 * start["body.8.weight"]}
    assert not torch.allclose(problem.loss(other), problem.loss(start), rtol=1e-3)


def test_the_sentences_of_the_page_hold() -> None:
    kaiming, xavier, small, default = (SAID[name] for name in SAID)
    warmed = {"WARMUP", "BEGIN"}
    assert set(kaiming["verdicts"]) | set(small["verdicts"]) <= warmed
    assert not warmed & (set(xavier["verdicts"]) | set(default["verdicts"]))
    assert (kaiming["diverged without"], kaiming["diverged with"]) == (8, 0)
    assert kaiming["with"][0] - 30 == pytest.approx(0.4, abs=0.05)
    assert small["worse"] == (pytest.approx(0.42, abs=0.005), pytest.approx(0.04, abs=0.005))
    assert abs(xavier["worse"][0]) <= 1e-3
    assert default["worse"][0] == pytest.approx(-0.015, abs=5e-4)
    assert all(SAID[name][f"diverged {way}"] == 0 for name in [*SAID][1:] for way in ("with", "without"))

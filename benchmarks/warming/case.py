"""A problem that is trained with the warmup that a forecast recommends, and without, from several seeds."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.forecasting.schedule import Need, Warmup

SEEDS = 8
# Forecasts for a run, at most, and the steps at a constant learning rate after which another forecast is made.
MOST, AGAIN = 8, 1000
State = dict[str, Tensor]
Schedule = Callable[[int], float]


class Problem(Protocol):
    """What is trained."""

    name: str
    lr: float

    def starts(self) -> State:
        """The parameters of all seeds, stacked."""

    def forecast(self, params: State, seed: int) -> nf.Forecast:
        """The forecast at the parameters of a seed."""

    def train(self, params: State, schedules: Sequence[Schedule], steps: int, seeds: Sequence[int]) -> State:
        """Train seeds, each with a schedule, and each with examples that depend on the seed alone."""

    def loss(self, params: State) -> Tensor:
        """The loss by seed."""


def recommended(problem: Problem, start: State, seed: int) -> dict[str, Any]:
    """The schedule that forecasts recommend, with another forecast wherever the last asks for that."""
    points: list[tuple[int, float]] = []
    said, done = [], 0
    here = first = {name: tensor[seed : seed + 1] for name, tensor in start.items()}
    for _ in range(MOST):
        forecast = problem.forecast(here, seed)
        warmup = forecast.warmup
        limit = forecast.noisy_step
        said.append({"need": warmup.need.name, "now": limit.now.value, "then": limit.then.value, "steps": warmup.steps})
        points += [(done + step, lr) for step, lr in warmup.schedule]
        if warmup.need is not Need.BEGIN or warmup.lr_at(warmup.steps) >= problem.lr:
            break
        steps = warmup.steps or AGAIN
        done += steps
        here = problem.train(first, [schedule(points, points[-1][1])], done, [seed])
        if not bool(torch.isfinite(problem.loss(here)).all()):
            break
    return {"seed": seed, "said": said, "points": points}


def schedule(points: Sequence[tuple[int, float]], lr: float) -> Schedule:
    """Linear between points; the learning rate that is to be used after the last."""
    warmup = Warmup(Need.WARMUP, tuple(points), "")
    return lambda step: warmup.lr_at(step) if points and step <= points[-1][0] else lr


def case(problem: Problem, after: int, *, ramp: int = 0) -> dict[str, Any]:
    """Train with and without the warmup.

    Args:
        problem: The problem.
        after: The steps at the learning rate after the longest warmup.
        ramp: The steps of a linear warmup from a tenth of the learning rate, where none is recommended.

    Returns:
        What was forecast, and the losses at the end, by seed.
    """
    start = problem.starts()
    rows = [recommended(problem, start, seed) for seed in range(SEEDS)]
    steps = max([row["points"][-1][0] for row in rows if row["points"]], default=ramp) + after
    linear: list[tuple[int, float]] = [(0, 0.1 * problem.lr), (ramp, problem.lr)] if ramp else []
    warm = [schedule(row["points"] or linear, problem.lr) for row in rows]
    ends = {}
    for name, schedules in (("with", warm), ("without", [schedule([], problem.lr)] * SEEDS)):
        ends[name] = problem.loss(problem.train(start, schedules, steps, range(SEEDS)))
    for row in rows:
        row |= {name: float(end[row["seed"]]) for name, end in ends.items()}
    before = problem.loss(start)
    result = {
        "case": problem.name,
        "lr": problem.lr,
        "steps": steps,
        "start": float(before.mean()),
        "ramp": ramp,
        "rows": rows,
    }
    print(json.dumps(summary(result)), flush=True)
    return result


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Verdicts, divergences, and means over seeds with errors; losses of runs that did not diverge."""
    rows = result["rows"]
    needs = [row["said"][0]["need"] for row in rows]
    lengths = [row["points"][-1][0] for row in rows if row["points"]]
    both = [row for row in rows if all(_finite(row[name]) for name in ("with", "without"))]
    return {
        "case": result["case"],
        "lr": result["lr"],
        "steps": result["steps"],
        "verdicts": {need: needs.count(need) for need in sorted(set(needs))},
        "forecasts": max(len(row["said"]) for row in rows),
        "now": mean_and_error([row["said"][0]["now"] for row in rows]),
        "then": mean_and_error([row["said"][0]["then"] for row in rows]),
        "length": mean_and_error(lengths) if lengths else (0.0, 0.0),
        "diverged with": sum(not _finite(row["with"]) for row in rows),
        "diverged without": sum(not _finite(row["without"]) for row in rows),
        "with": mean_and_error([row["with"] for row in rows if _finite(row["with"])]),
        "without": mean_and_error([row["without"] for row in rows if _finite(row["without"])]),
        "worse": mean_and_error([row["without"] - row["with"] for row in both]),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error; NaN without values."""
    listed = torch.tensor(values, dtype=torch.float64)
    if len(listed) < 2:
        return (float(listed.mean()) if len(listed) else float("nan")), float("nan")
    return float(listed.mean()), float(listed.std() / len(listed) ** 0.5)


def _finite(value: float | None) -> bool:
    return value is not None and value == value and abs(value) < float("inf")

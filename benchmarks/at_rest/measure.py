"""`nf.equilibrate` and SGD from the same model, in turn: time, operations, and the drift that is left."""

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import noetherflow as nf
from noetherflow._minibatch import minibatches
from noetherflow.equilibrium import search
from noetherflow.equilibrium.blocks import Blocks
from noetherflow.equilibrium.descent import Descent

from .cases import CASES, Case, Stepper, train

# The drift of SGD is measured at the start, and at these shares of the budget.
CHECKS = (0.005, 0.01, 0.02, *(k / 20 for k in range(1, 21)))
# Shares of the drift at the start; the file says when SGD first reached each.
LEVELS = (0.5, 0.1, 0.01)


def compare(name: str, state: str, rounds: int, seed: int, share: float) -> dict[str, Any]:
    """A row of the file: a case, as built or trained until its loss is flat; `share` of the budgets for tests."""
    size = CASES[name]
    case = size.build(max(int(size.steps * share), 4), max(int(size.epochs * share), 1), seed)
    training = train(case, seed + 1)._asdict() if state == "trained" else None
    start = copy.deepcopy(case.model)

    def equilibrate() -> nf.Equilibrium:
        return nf.equilibrate(start, case.loss, case.batches(), case.sgd, progress=False)

    # Not timed: the first call of a process compiles loops, and counting takes time.
    with FlopCounterMode(display=False) as counter:
        equilibrium = equilibrate()
    seconds, parts, course = in_turn(case, equilibrate, equilibrium, rounds, seed + 2)
    step_operations = course.pop("operations of a step")
    examples = (equilibrium.passes + 1) * case.size
    ours = {
        "passes": equilibrium.passes,
        "status": equilibrium.status.name,
        "seconds": statistics.median(seconds["equilibrate"]),
        "operations": counter.get_total_flops(),
        "examples": examples,
        "drift before": largest_and_median({key: pair.before for key, pair in equilibrium.imbalance.items()}),
        "drift after": fresh_drift(case, equilibrium),
        "share of time": parts,
        "relaxation steps": relaxation(equilibrium),
    }
    sgd_seconds = statistics.median(seconds["SGD"]) * case.steps
    theirs = {
        "steps": case.steps,
        "seconds": sgd_seconds,
        "operations": step_operations * case.steps,
        "examples": case.sgd.batch_size * case.steps,
        **summary(course["drift"], ours["drift after"]["largest"], sgd_seconds / case.steps),
        "loss before": course["loss before"],
        "loss after": course["loss after"],
        "course": course["drift"],
    }
    pairs = zip(seconds["SGD"], seconds["equilibrate"], strict=True)
    return {
        "model": name,
        "state": state,
        "parameters": sum(parameter.numel() for parameter in start.parameters()),
        "symmetries": len(equilibrium.symmetries),
        "examples": case.size,
        "settings": {
            "lr": case.sgd.lr,
            "batch size": case.sgd.batch_size,
            "weight decay": case.sgd.weight_decay,
            "momentum": case.sgd.momentum,
        },
        "training": training,
        "seeds": {"model and data": seed, "training": seed + 1, "SGD": seed + 2},
        "equilibrate": ours,
        "SGD": theirs,
        "SGD over equilibrate": {
            "seconds": statistics.median(step * case.steps / call for step, call in pairs),
            "operations": theirs["operations"] / ours["operations"],
            "examples": theirs["examples"] / examples,
        },
        "rounds": {"equilibrate, seconds": seconds["equilibrate"], "SGD, seconds of a step": seconds["SGD"]},
    }


def in_turn(
    case: Case, equilibrate: Callable[[], nf.Equilibrium], equilibrium: nf.Equilibrium, rounds: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any]]:
    """A call of `equilibrate`, then a part of the budget of SGD, and so on: seconds, shares of time, course of SGD."""
    stepper = Stepper(case, seed)
    course: dict[str, Any] = {"loss before": case.mean_loss(), "drift": [[0, *drift_of(case, equilibrium).values()]]}
    checks = sorted({max(round(case.steps * share), 1) for share in CHECKS})
    ends = [round(case.steps * (turn + 1) / rounds) for turn in range(rounds)]
    seconds: dict[str, list[float]] = {"equilibrate": [], "SGD": []}
    shares: list[dict[str, float]] = []
    taken = 0
    for end in ends:
        with clocks() as parts:
            begin = time.perf_counter()
            equilibrate()
            seconds["equilibrate"].append(time.perf_counter() - begin)
        shares.append({part: spent / seconds["equilibrate"][-1] for part, spent in parts.items()})
        spent, before = 0.0, taken
        for stop in sorted({*(check for check in checks if taken < check <= end), end}):
            begin = time.perf_counter()
            stepper.run(stop - taken)
            spent += time.perf_counter() - begin
            taken = stop
            if taken in checks:
                course["drift"].append([taken, *drift_of(case, equilibrium).values()])
        seconds["SGD"].append(spent / (taken - before))
    course["loss after"] = case.mean_loss()
    course["operations of a step"] = stepper.operations()
    median = {part: statistics.median(share[part] for share in shares) for part in shares[0]}
    return seconds, median | {"rest": 1 - sum(median.values())}, course


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds by part of `equilibrate`: finder, first and later passes with the solver, standard errors."""
    spent = dict.fromkeys(("finding", "first pass", "later passes", "standard errors"), 0.0)

    def timed(function: Callable[..., Any], part: Callable[[], str]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            name, begin = part(), time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - begin

        return run

    def pass_name() -> str:
        return "later passes" if spent["first pass"] else "first pass"

    with (
        mock.patch.object(search, "_detected", timed(search._detected, lambda: "finding")),
        mock.patch.object(search, "standard_errors", timed(search.standard_errors, lambda: "standard errors")),
        mock.patch.object(Descent, "measure", timed(Descent.measure, pass_name)),
    ):
        yield spent


def drift_of(case: Case, equilibrium: nf.Equilibrium, model: nn.Module | None = None) -> dict[str, float]:
    """The relative drift of the model, measured now over all examples, as in `Equilibrium.imbalance`."""
    model = model or case.model
    noise = nf.estimate_noise(model, case.loss, case.batches(), equilibrium.symmetries, variances=True, progress=False)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    residuals = Blocks.of(params, minibatches(noise, case.sgd)).residuals()
    return largest_and_median({name: residual.imbalance for name, residual in residuals.items()})


def fresh_drift(case: Case, equilibrium: nf.Equilibrium) -> dict[str, float]:
    """The relative drift at the equilibrium, measured on a model that holds its parameters."""
    model = copy.deepcopy(case.model)
    model.load_state_dict(equilibrium.params, strict=False)
    return drift_of(case, equilibrium, model)


def largest_and_median(drift: dict[str, float]) -> dict[str, float]:
    """Over the symmetries."""
    return {"largest": max(drift.values()), "median": statistics.median(drift.values())}


def relaxation(equilibrium: nf.Equilibrium) -> dict[str, float]:
    """SGD steps in which a small departure from the equilibrium shrinks by e: median and slowest of finite times."""
    times = torch.cat([steps.reshape(-1) for steps in equilibrium.relaxation_steps.values()])
    finite = times[times.isfinite()]
    return {"median": float(finite.median()), "slowest": float(finite.max())}


def summary(course: list[list[float]], target: float, step_seconds: float) -> dict[str, Any]:
    """Whether SGD reached the drift that `equilibrate` left, the best value, and the steps to shares of the start."""
    steps, best = min(((row[0], row[1]) for row in course), key=lambda pair: pair[1])
    reached = next((row[0] for row in course if row[1] <= target), None)
    levels = {str(level): next((row[0] for row in course if row[1] <= level * course[0][1]), None) for level in LEVELS}
    return {
        "reached": reached is not None,
        "steps until reached": reached,
        "seconds until reached": None if reached is None else reached * step_seconds,
        "best drift": best,
        "steps until best": steps,
        "last drift": course[-1][1],
        "steps until share of start": levels,
    }

"""Forecasts whose numbers a test writes."""

import dataclasses
import functools
import math
from typing import Any

import torch

import noetherflow as nf
from noetherflow.forecasting.estimate import Change, Estimate, unknown
from noetherflow.forecasting.norms import Norm
from noetherflow.forecasting.schedule import Need, Warmup

NAN = math.nan
SCHEDULE = ((0, 0.01), (100, 0.02), (300, 0.05), (1000, 0.1))


@functools.cache
def small() -> nf.Forecast:
    """A real forecast, whose parts a test replaces."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    batches = [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(4)]
    settings = nf.SGD(lr=0.1, batch_size=8, weight_decay=1e-3)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)  # noqa: E731
    return nf.forecast(net, loss, batches, settings, progress=False)


def change(now: float, then: float, error: float = NAN, sampling: float = NAN) -> Change:
    """A change with equal errors on both sides, and their share of the ratio."""
    return Change(
        Estimate(now, error, sampling),
        Estimate(then, error, sampling),
        Estimate(then / now, error / now, sampling / now),
    )


def ordinary(**changes: Any) -> nf.Forecast:
    """Numbers of all kinds: with both errors, with one, exact, and without; a warmup; norms, of which a row grows."""
    none = unknown("an operation has no second derivative (<b>roll</b>)")
    blocks = {
        "first.weight": change(10.0, 20.0, 0.5, 0.25),
        "second.weight": change(-3.0, -1.0, 0.0, 0.0),
        "third.weight": change(200.0, 100.0, 0.5),
        "fourth.bias": Change(none, none, none),
    }
    values = {
        "trace": change(207.0, 119.0, 0.5, 0.25),
        "blocks": blocks,
        "largest": Change(none, none, none),
        "critical": change(9.0, 3.0, 0.03),
        "stable_step": change(0.02, 0.25, 0.0, 0.001),
        "noisy_step": Change(Estimate(0.015, 1e-9, 1e-3), unknown("no point to go to"), unknown("no point to go to")),
        "half_steps": Estimate(1234.5, 56.7),
        "warmup": Warmup(Need.WARMUP, SCHEDULE, "learning rate 0.1; largest stable step 0.02 +- 0.001 now"),
        "norms": {"norm.scale": norm([1.0, 2.0, 4.0], [2.0, 3.0, math.inf])},
        "exact": False,
        "assumptions": ("the first assumption", "the second <i>assumption</i>"),
        "notes": ("the pooler <b>is not used</b> by the loss",),
    }
    return dataclasses.replace(small(), **(values | changes))


def norm(now: list[float], then: list[float]) -> Norm:
    """Norms of rows."""
    rows = [torch.tensor(values, dtype=torch.float64) for values in (now, then)]
    return Norm(*rows, rows[0] * NAN, 0.1 / rows[0].square(), 0.1 / rows[1].square(), rows[0] * 1000)

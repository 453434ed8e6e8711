"""What was predicted and measured for a problem, over seeds."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import noetherflow as nf

SEEDS = 8
# Intervals of the curve that is kept.
_SHOWN = 60


def half_time(steps: Tensor, curves: Tensor, ends: Tensor) -> float:
    """The step at which the mean of curves, each over its start, has made half of its change.

    Args:
        steps: The steps, shape (T,).
        curves: The sharpness, shape (T, seeds).
        ends: The sharpness at the end, shape (seeds,).

    Returns:
        The first such step, between records by interpolation.
    """
    mean, end = (curves / curves[0]).mean(1), float((ends / curves[0]).mean())
    share = (mean - 1) / (end - 1)
    after = int((share >= 0.5).double().argmax())
    left, right = float(share[after - 1]), float(share[after])
    first, second = float(steps[after - 1]), float(steps[after])
    return first + (second - first) * (0.5 - left) / (right - left)


def jackknife(statistic: Callable[[list[int]], float], count: int) -> float:
    """The standard error of a statistic of seeds."""
    left_out = torch.tensor([statistic([k for k in range(count) if k != j]) for j in range(count)])
    return float(((count - 1) / count * (left_out - left_out.mean()).square().sum()).sqrt())


def case(
    name: str,
    steps: Tensor,
    curves: Tensor,
    ends: Tensor,
    forecasts: list[nf.Forecast],
    *,
    lr: float,
    unit: float = 1.0,
) -> dict[str, Any]:
    """What was predicted and measured for a problem; `unit` is the factor of the loss that the forecast saw."""
    rows = [
        {
            "seed": seed,
            "now": float(curves[0, seed]),
            "predicted": forecast.trace.then.value / unit,
            "ratio": forecast.trace.ratio.value,
            "error": forecast.trace.ratio.total,
            "half": forecast.half_steps.value,
            "measured": float(ends[seed]),
        }
        for seed, forecast in enumerate(forecasts)
    ]

    def half(seeds: list[int]) -> float:
        return half_time(steps, curves[:, seeds], ends[seeds])

    limits = [min(f.noisy_step.now.value, f.noisy_step.then.value) for f in forecasts]
    shown = sorted({round(k * (len(steps) - 1) / _SHOWN) for k in range(_SHOWN + 1)})
    result = {
        "case": name,
        "half": half([*range(len(forecasts))]),
        "half_error": jackknife(half, len(forecasts)),
        "share": lr / (sum(limits) / len(limits)),
        "curve": [[int(steps[k]), float(curves[k].mean())] for k in shown],
        "rows": rows,
    }
    print(json.dumps(summary(result)), flush=True)
    return result


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error."""
    listed = torch.tensor([*values], dtype=torch.float64)
    return float(listed.mean()), float(listed.std() / len(listed) ** 0.5)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds with errors, and how often the sign is right where the forecast is sure of the sign."""
    rows = result["rows"]
    sure = [row for row in rows if abs(row["ratio"] - 1) > 2 * row["error"]]
    right = [row for row in sure if (row["ratio"] > 1) == (row["measured"] > row["now"])]
    return {
        "case": result["case"],
        "change predicted": mean_and_error(row["ratio"] for row in rows),
        "change measured": mean_and_error(row["measured"] / row["now"] for row in rows),
        "end predicted": mean_and_error(row["predicted"] for row in rows),
        "end measured": mean_and_error(row["measured"] for row in rows),
        "end ratio": mean_and_error(row["predicted"] / row["measured"] for row in rows),
        "half predicted": mean_and_error(row["half"] for row in rows),
        "half measured": (result["half"], result["half_error"]),
        "sign": (len(right), len(sure)),
        "share": result["share"],
    }

"""What was predicted and measured for a problem, over seeds."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import noetherflow as nf

SEEDS = 8


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
    name: str, steps: Tensor, curves: Tensor, ends: Tensor, forecasts: list[nf.Forecast], unit: float = 1.0
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

    limits = [f.noisy_step for f in forecasts]
    share = max(forecasts[0].settings.lr / min(limit.now.value, limit.then.value) for limit in limits)
    every = [*range(SEEDS)]
    result = {"case": name, "half": half(every), "half_error": jackknife(half, SEEDS), "share": share, "rows": rows}
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
        "now": mean_and_error(row["now"] for row in rows),
        "predicted": mean_and_error(row["predicted"] for row in rows),
        "measured": mean_and_error(row["measured"] for row in rows),
        "ratio": mean_and_error(row["predicted"] / row["measured"] for row in rows),
        "half predicted": mean_and_error(row["half"] for row in rows),
        "half measured": (result["half"], result["half_error"]),
        "sign": (len(right), len(sure)),
    }

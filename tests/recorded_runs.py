"""Recorded runs for the tests of their page, with curves that formulas give."""

import math
from pathlib import Path

import numpy as np

from noetherflow.record import Run, names

WAYS = tuple(names.PARTS)


def run_of(columns: dict[str, list[float] | np.ndarray], steps: list[int] | None = None, name: str = "run") -> Run:
    """A run from columns."""
    count = len(next(iter(columns.values())))
    return Run(
        name,
        Path("metrics.jsonl"),
        np.array(range(count) if steps is None else steps, dtype=np.int64),
        {key: np.array(values, dtype=float) for key, values in columns.items()},
    )


def ordinary(symmetries: int = 2, count: int = 30, layers: int = 2) -> Run:
    """Noise with intervals, of which the last third has no upper end; charges with parts; distances; a loss."""
    k = np.arange(count)
    scale = 100 * np.exp(2 * k / count) * (1 + 0.2 * np.sin(k))
    columns = {
        "noise/scale": scale,
        "noise/scale_low": scale * 0.6,
        "noise/scale_high": np.where(3 * k < 2 * count, scale * 1.7, math.inf),
        "noise/scale_preconditioned": scale / 9,
        "noise/scale_preconditioned_low": scale / 12,
        "noise/scale_preconditioned_high": scale / 8,
        "noise/trace": 3 + np.cos(k),
        "grad/norm_sq_unbiased": 0.1 * np.cos(k / 3) + 0.05,
        "loss": 2 * np.exp(-k / count),
    }
    for layer in range(layers):
        name = f"layer.{layer}"
        columns |= {f"noise/scale/{name}": scale * (layer + 2), f"noise/scale_low/{name}": scale * (layer + 1)}
        columns |= {f"noise/scale_high/{name}": scale * (layer + 3), f"noise/trace/{name}": 1.0 + k}
    for place in range(symmetries):
        name = f"s{place}"
        # The larger the place, the more the charge moves, and the further is the equilibrium.
        parts = {way: (place + 1) * (index - 1.2) * k / count for index, way in enumerate(WAYS)}
        columns |= {f"{way}/{name}": values for way, values in parts.items()}
        columns[f"charge/{name}"] = 5.0 - place + sum(parts.values())
        columns[f"distance/{name}"] = (place + 1) / symmetries * np.exp(-k / count)
    return run_of(columns, [20 * step for step in range(count)])

"""Steps to a loss over batch sizes, beside the critical batch size that the noise scale predicts.

    python benchmarks/which_batch_size.py          measures, and writes results/which_batch_size.json (minutes)
    python benchmarks/which_batch_size.py --show   prints the table, and writes it into docs/which-batch-size.md

A network of two layers learns the digits of scikit-learn from batches that are drawn with replacement. For every batch
size the learning rate is tuned: factors of 2, then of sqrt(2) around the best. The steps S to the loss are fitted by
S = S_min (1 + B_crit / B), the model of McCandlish et al. (2018), least squares in log S. The noise scale is that of
the runs at the batch size 32, every step measured, averaged over the run from its start to the loss.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from machine import environment
from scipy.optimize import least_squares
from sklearn.datasets import load_digits
from torch import Tensor, nn

import noetherflow as nf

OUT = Path(__file__).parent / "results" / "which_batch_size.json"
PAGE = Path(__file__).parents[1] / "docs" / "which-batch-size.md"
SIZES = (8, 16, 32, 64, 128, 256, 512)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0),
}
START = {"SGD": 0.16, "AdamW": 4e-3}
TARGET, MOST, EVERY, SEEDS = 0.1, 6000, 4, 3
WATCHED = 32


def problem(seed: int) -> tuple[nn.Sequential, Tensor, Tensor, torch.Generator]:
    digits = load_digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    images, labels = torch.tensor(digits.data / 16.0).float(), torch.tensor(digits.target)
    return model, images, labels, torch.Generator().manual_seed(seed)


def steps_to_loss(kind: str, size: int, lr: float, seed: int, watch: bool = False) -> tuple[float, Any]:
    """Steps until the loss of all digits is at most the target, between evaluations by interpolation."""
    model, images, labels, generator = problem(seed)
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=lr)
    scale = nf.NoiseScale(model, optimizer=optimizer, every=1, window=math.inf) if watch else None
    before = math.inf
    for step in range(MOST):
        if step % EVERY == 0:
            with torch.no_grad():
                now = float(nn.functional.cross_entropy(model(images), labels))
            if not math.isfinite(now):
                return math.inf, None
            if now <= TARGET:
                share = (math.log(before) - math.log(TARGET)) / (math.log(before) - math.log(now)) if step else 0.0
                return step - EVERY * (1 - share), scale
            before = now
        chosen = torch.randint(len(images), (size,), generator=generator)
        batch = images[chosen], labels[chosen]
        optimizer.zero_grad()
        if scale is None:
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        else:
            with scale.step(batch):
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return math.inf, None


def mean_steps(kind: str, size: int, lr: float) -> list[float]:
    return [steps_to_loss(kind, size, lr, seed)[0] for seed in range(SEEDS)]


def tuned(kind: str, size: int, start: float) -> dict[str, Any]:
    """The learning rate with the fewest steps, by factors of 2 and then of sqrt(2)."""
    tried: dict[float, list[float]] = {}

    def steps(lr: float) -> float:
        if lr not in tried:
            tried[lr] = mean_steps(kind, size, lr)
        return statistics.fmean(tried[lr])

    best = start
    for factor in (2.0, math.sqrt(2)):
        while True:
            nearby = min((best * factor, best / factor), key=steps)
            if steps(nearby) >= steps(best):
                break
            best = nearby
    return {"optimizer": kind, "batch": size, "lr": best, "steps": tried[best]}


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """S_min and B_crit, and the root mean square of log S about the fit."""
    sizes = np.array([row["batch"] for row in rows], dtype=float)
    steps = np.log([statistics.fmean(row["steps"]) for row in rows])
    done = least_squares(lambda p: p[0] + np.log1p(np.exp(p[1]) / sizes) - steps, [steps.min(), math.log(100)])
    return {"fewest": math.exp(done.x[0]), "critical": math.exp(done.x[1]), "rms": float(np.sqrt(np.mean(done.fun**2)))}


def watched(kind: str, lr: float) -> list[dict[str, Any]]:
    """The noise scale on the way, of each seed."""
    rows = []
    for seed in range(SEEDS):
        _, scale = steps_to_loss(kind, WATCHED, lr, seed, watch=True)
        estimate, adapted = scale.estimate, scale.preconditioned
        row = {"optimizer": kind, "seed": seed, "scale": estimate.scale, "low": estimate.low, "high": estimate.high}
        rows.append(row | ({} if adapted is None else {"adapted": adapted.scale}))
    return rows


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    results: dict[str, Any] = {"rows": [], "watched": [], "fits": {}}
    for kind in OPTIMIZERS:
        start, rows = START[kind], []
        for size in SIZES:
            rows.append(tuned(kind, size, start))
            start = rows[-1]["lr"]
            print(json.dumps(rows[-1]), flush=True)
        results["rows"] += rows
        results["fits"][kind] = fit(rows)
        results["watched"] += watched(kind, next(row["lr"] for row in rows if row["batch"] == WATCHED))
    return results | {"seconds": round(time.perf_counter() - begin, 1)} | environment([])


def table(results: dict[str, Any]) -> str:
    """Measured steps, the fit, and the noise scales."""
    lines = ["| batch size | " + " | ".join(f"{k}: steps | {k}: lr | {k}: fit" for k in OPTIMIZERS) + " |"]
    lines.append("| ---: |" + " ---: |" * 3 * len(OPTIMIZERS))
    for size in SIZES:
        cells = [str(size)]
        for kind in OPTIMIZERS:
            row = next(r for r in results["rows"] if (r["optimizer"], r["batch"]) == (kind, size))
            curve = results["fits"][kind]
            fitted = curve["fewest"] * (1 + curve["critical"] / size)
            cells += [f"{statistics.fmean(row['steps']):.0f}", f"{row['lr']:.2g}", f"{fitted:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| | " + " | ".join(OPTIMIZERS) + " |", "| --- |" + " ---: |" * len(OPTIMIZERS)]
    curves = [results["fits"][kind] for kind in OPTIMIZERS]
    lines.append("| critical batch size of the fit | " + " | ".join(f"{c['critical']:.0f}" for c in curves) + " |")
    lines.append("| deviation from the fit (rms) | " + " | ".join(f"{c['rms']:.0%}" for c in curves) + " |")
    for name, key in (("noise scale, over the run", "scale"), ("the same in the optimizer's metric", "adapted")):
        cells = []
        for kind in OPTIMIZERS:
            seen = [row[key] for row in results["watched"] if row["optimizer"] == kind and key in row]
            ratio = statistics.fmean(seen) / results["fits"][kind]["critical"] if seen else 0
            cells.append(f"{statistics.fmean(seen):.0f} ({ratio:.2g} of the fit)" if seen else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    study.run(__doc__, OUT, PAGE, measure, table)

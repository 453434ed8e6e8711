"""What watching the noise scale costs: training steps with `nf.NoiseScale` beside steps without, in turn.

    python benchmarks/watching.py           measures, and writes results/watching.json (minutes)
    python benchmarks/watching.py --show    prints the table of the file

A block is as many steps as the watch has one measured step in (20 by default): forward and backward pass and a step of
the optimizer. Blocks with and without the watch alternate; a row has the median of the ratios of neighbours. The
measured step alone is beside it: its time over that of a plain step.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gradient_noise.models import MODELS, Built, build
from machine import environment

import noetherflow as nf
from noetherflow import _files

OUT = Path(__file__).parent / "results" / "watching.json"
EVERY = 20
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-6),
}


def block(built: Built, optimizer: torch.optim.Optimizer, watch: nf.NoiseScale | None, steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        if watch is None:
            built.loss(built.model, built.batch).mean().backward()
        else:
            with watch.step(built.batch):
                built.loss(built.model, built.batch).mean().backward()
        optimizer.step()
    return time.perf_counter() - begin


def row(name: str, kind: str, rounds: int) -> dict[str, Any]:
    built = build(name)
    optimizer = OPTIMIZERS[kind](built.model.parameters())
    rare, always = (nf.NoiseScale(built.model, optimizer=optimizer, every=every) for every in (EVERY, 1))
    for watch in (rare, always, None):  # the first measured step finds out where the examples are
        block(built, optimizer, watch, 2)
    rare.steps = 0
    ratios, measured = [], []
    for _ in range(rounds):
        plain = block(built, optimizer, None, EVERY)
        ratios.append(block(built, optimizer, rare, EVERY) / plain)
        plain = block(built, optimizer, None, 2)
        measured.append(block(built, optimizer, always, 2) / plain)
    spread = statistics.quantiles(ratios, n=4)
    result = {"model": name, "optimizer": kind, "ratio": statistics.median(ratios), "quartiles": [spread[0], spread[2]]}
    return result | {"measured": statistics.median(measured), "rounds": rounds}


def show(results: dict[str, Any]) -> str:
    lines = ["| model | optimizer | one step in 20 measured | quartiles | a measured step |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for one in results["rows"]:
        low, high = one["quartiles"]
        cells = (
            one["model"],
            one["optimizer"],
            f"{one['ratio']:.3f}",
            f"{low:.3f}, {high:.3f}",
            f"{one['measured']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of the file")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if not arguments.show:
        torch.set_num_threads(1)
        rows = []
        for name in MODELS:
            for kind in OPTIMIZERS:
                rows.append(row(name, kind, arguments.rounds))
                print(json.dumps(rows[-1]), flush=True)
        _files.write_json(OUT, {"rows": rows, "every": EVERY} | environment(["transformers"]))
    print(show(json.loads(OUT.read_text("utf-8"))))


if __name__ == "__main__":
    main()

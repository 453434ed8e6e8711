"""Time of the joint equilibrium under AdamW of a million rescaled neurons, from second moments alone.

    python benchmarks/million_neurons.py           a minute; writes benchmarks/results/million_neurons.json
    python benchmarks/million_neurons.py --show    prints the table, and writes it into docs/benchmarks.md

Parameters and second moments are random. Three models: gated layers, whose neurons share no tensor; channels of
depthwise convolutions, where each tensor belongs to the channels before and behind it, so that all layers are solved
jointly; and hidden layers with dense matrices, for which a million neurons would not fit into memory. `seconds` is the
time of `nf.solve_equilibrium`; `prepare` and `minimise` are timed apart: the terms of the potential of every entry, and
the search.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow import _files
from noetherflow._minibatch import minibatches
from noetherflow._params import snapshot
from noetherflow.equilibrium.blocks import Blocks

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "million_neurons.json"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- million neurons -->", "<!-- end of million neurons -->")
DECAYS = (0.0, 0.1)
COLUMNS = ("model", "coordinates", "entries", "decay", "Newton", "prepare", "minimise", "seconds")


class Subject(NamedTuple):
    """Parameters, second moments, and symmetries."""

    params: dict[str, Tensor]
    moments: nf.SecondMoments


class Draws:
    """Random weights, with second moments that differ between rows by factors of e."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def add(self, name: str, *size: int) -> None:
        self.params[name] = self.normal(*size)
        self.values[name] = (self.normal(*size) * self.normal(size[0], *(1 for _ in size[1:])).exp()).square()

    def subject(self, symmetries: dict[str, nf.Symmetry]) -> Subject:
        steps, eps = dict.fromkeys(self.values, 1000), dict.fromkeys(self.values, 0.0)
        return Subject(self.params, nf.SecondMoments(self.values, steps, symmetries, eps))


def gated(count: int) -> Subject:
    """40 layers whose neurons read and write a stream of width 32."""
    draws, width = Draws(), count // 40
    for k in range(40):
        draws.add(f"{k}.up", width, 32)
        draws.add(f"{k}.down", 32, width)
    return draws.subject(
        {f"{k}": nf.DiagonalSymmetry(nf.Axis(f"{k}.up", 0), nf.Axis(f"{k}.down", 1)) for k in range(40)}
    )


def depthwise(count: int) -> Subject:
    """8 layers of channels between 9 depthwise convolutions of 3 x 3 weights."""
    draws, width = Draws(), count // 8
    for k in range(9):
        draws.add(f"{k}.weight", width, 1, 3, 3)
        draws.add(f"{k}.bias", width)
    hidden: dict[str, nf.Symmetry] = {
        f"{k}": nf.DiagonalSymmetry([nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k}.bias", 0)], nf.Axis(f"{k + 1}.weight", 0))
        for k in range(8)
    }
    return draws.subject(hidden)


def dense(count: int) -> Subject:
    """8 hidden layers; a 62nd part of the neurons, with 28 million weights for 16,000 of them."""
    draws, width = Draws(), max(2, count // 500)
    sizes = [32, *([width] * 8), 16]
    for k in range(9):
        draws.add(f"{k}.weight", sizes[k + 1], sizes[k])
        draws.add(f"{k}.bias", sizes[k + 1])
    hidden: dict[str, nf.Symmetry] = {
        f"{k}": nf.DiagonalSymmetry([nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k}.bias", 0)], nf.Axis(f"{k + 1}.weight", 1))
        for k in range(8)
    }
    return draws.subject(hidden)


MODELS: dict[str, Callable[[int], Subject]] = {"gated": gated, "depthwise": depthwise, "dense": dense}


def measure(name: str, count: int, decay: float, rounds: int) -> dict[str, Any]:
    """The median over rounds of the time of `nf.solve_equilibrium`, and how it is spent."""
    params, moments = MODELS[name](count)
    adamw = nf.AdamW(lr=1e-3, weight_decay=decay, eps=0.0)
    seconds, parts = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        solved = nf.solve_equilibrium(moments, adamw, params)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        blocks = Blocks.of(snapshot(params), minibatches(moments, adamw))
        ready = time.perf_counter()
        blocks.minimise()
        parts.append((ready - start, time.perf_counter() - ready))
    prepare, minimise = (statistics.median(column) for column in zip(*parts, strict=True))
    start_drift = nf.drift(moments, adamw, params)
    left = max(float(x.abs().max() / start_drift[key].abs().max()) for key, x in solved.drift.items())
    return {
        "model": name,
        "coordinates": sum(x.numel() for x in solved.coordinates.values()),
        "entries": sum(v.numel() for v in moments.values.values()),
        "decay": decay,
        "status": solved.status.name,
        "Newton steps": solved.iterations,
        "drift over its start": left,
        "seconds": statistics.median(seconds),
        "prepare": prepare,
        "minimise": minimise,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in result["rows"]:
        times = (f"{row[key]:.2f}" for key in ("prepare", "minimise", "seconds"))
        sizes = (f"{row['coordinates']:,}", f"{row['entries'] / 1e6:.1f} M")
        lines.append(" | ".join((row["model"], *sizes, f"{row['decay']:g}", str(row["Newton steps"]), *times)))
    about = result["environment"]
    return (
        f"Seconds on {about['processor']}, {about['threads']} thread, median of {result['rounds']} rounds.\n\n"
        + "\n".join(f"| {line} |" for line in lines)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=1_000_000, help="neurons of the first two models")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table and write it into docs/benchmarks.md")
    given = parser.parse_args(arguments)
    if given.show:
        shown = table(json.loads(given.out.read_text("utf-8")))
        page = PAGE.read_text("utf-8")
        between = re.compile(f"(?<={MARKS[0]}\n).*?(?={MARKS[1]})", re.DOTALL)
        PAGE.write_text(between.sub(lambda _: shown + "\n", page), "utf-8")
        print(shown)
        return
    torch.set_num_threads(1)
    about = machine.environment([]) | {"threads": torch.get_num_threads()}
    rows = [measure(name, given.count, decay, given.rounds) for name in MODELS for decay in DECAYS]
    result = {"environment": about, "rounds": given.rounds, "rows": rows}
    _files.write_json(given.out, result)
    print(table(result))


if __name__ == "__main__":
    main()

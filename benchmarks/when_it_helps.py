"""What moving to the equilibrium changes, and what it does not: the experiments of docs/when-does-it-help.md.

    python benchmarks/when_it_helps.py             measures, and writes results/when_it_helps.json (46 minutes)
    python benchmarks/when_it_helps.py adamw       measures a part
    python benchmarks/when_it_helps.py --show      prints the tables, and writes them into the page

Models: those of examples/digits_mlp.py, digits_cnn.py, gpt2.py and lora.py, from several seeds. Everything is computed
in float64 on one thread: a second run gives the numbers of the first up to rounding, which training amplifies.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from moving import experiments, show, subjects

from noetherflow import _files, _versions

OUT = Path(__file__).parent / "results" / "when_it_helps.json"
Rows = Iterator[dict[str, Any]]
EPOCHS = (0, 1, 10, 100, 1000)


def at_once() -> Rows:
    for name, (make, seeds) in subjects.MAKERS.items():
        for seed in range(seeds):
            yield {"model": name, "seed": seed} | experiments.at_once(make(seed))


def continuation() -> Rows:
    for name, (make, seeds) in subjects.MAKERS.items():
        for seed in range(seeds):
            subject = make(seed)
            for kind in subjects.OPTIMIZERS:
                yield {"model": name, "seed": seed, "optimizer": kind} | experiments.continuation(subject, kind, seed)


def course() -> Rows:
    for seed in range(3):
        for weight_decay in (0.0, 1e-4, 1e-3):
            for row in experiments.course(weight_decay, EPOCHS, seed):
                yield {"model": "digits MLP", "seed": seed} | row


def decays() -> Rows:
    for name, seeds in (("digits MLP", 5), ("GPT-2", 2)):
        for seed in range(seeds):
            subject = subjects.MAKERS[name][0](seed)
            for weight_decay in (0.0, 1e-4, 1e-3, 1e-2):
                yield {"model": name, "seed": seed} | experiments.decays(subject, weight_decay)


def adapters() -> Rows:
    for seed in range(3):
        for steps in (0, 1, 2, 4, 16):
            yield {"seed": seed} | experiments.adapters(steps, seed)


def adamw() -> Rows:
    for seed in range(3):
        yield {"seed": seed} | experiments.adamw(seed)


PARTS: dict[str, Callable[[], Rows]] = {
    part.__name__: part for part in (at_once, continuation, course, decays, adapters, adamw)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--show", action="store_true", help="print the tables, and write them into the page")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if arguments.show:
        print(show.write(OUT))
        return
    torch.set_num_threads(1)
    for name in arguments.parts or PARTS:
        start = time.perf_counter()
        rows = []
        for row in PARTS[name]():
            rows.append(row)
            print(name, json.dumps(row), flush=True)
        results = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
        part = {"seconds": round(time.perf_counter() - start, 1), "versions": _versions.versions(), "rows": rows}
        _files.write_json(OUT, results | {name: _files.finite(part)})


if __name__ == "__main__":
    main()

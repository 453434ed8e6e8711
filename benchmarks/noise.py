"""Cost of measuring gradient noise: time and memory relative to a plain training step, for several methods.

    python benchmarks/noise.py           measures, and writes benchmarks/results/noise.json (twenty minutes)
    python benchmarks/noise.py --show    writes the tables and the figure of docs/benchmarks.md from that file

Models: four networks, and a sweep of linear layers over the number of tokens in an example. The ratio of a method is
the time of its step over that of a plain step, which runs directly before it. Each round times all methods in turn.
A method is timed only if its Tr Sigma agrees with a float64 loop over single examples. Each model is timed in a
separate process. With `--allocator warm` (the default) the allocator of the process does not return memory to the
system; with `--allocator default` the settings of the system apply. Each peak of memory is measured in a process that
runs a single method.

The file holds a run for each number of threads and each allocator. The run with one thread and the warm allocator also
contains the sweep, the peaks of memory, and a comparison with two threads. `make bench` installs the packages for
comparison.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from gradient_noise import child, show
from gradient_noise.models import MODELS

from noetherflow import _files

OUT = Path(__file__).parent / "results" / "noise.json"
PACKAGES = ("transformers", "backpack-for-pytorch", "opacus")
# glibc: never return memory to the system, and never map memory for a single tensor.
WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
# glibc: map each tensor of 64 KiB or more separately and unmap freed tensors: the peak counts live tensors.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# Mean number of processors in use. A value below this means that two threads share a processor.
TWO = 1.3


def run_child(job: dict[str, Any], allocator: dict[str, str]) -> list[dict[str, Any]]:
    """Run a job in a separate process and return its rows; print a message and return no rows if the process fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])} | allocator
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{job} ended with {done.returncode}: its rows are left out", flush=True)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def save(name: str, run: dict[str, Any]) -> None:
    """Write a run, finished or not, into the file, which keeps the runs with different settings."""
    runs = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    _files.write_json(OUT, {key: value for key, value in runs.items() if "allocator" in key} | {name: run})


def run(given: argparse.Namespace, folder: str) -> None:
    name = show.name_of(given.threads, given.allocator)
    first = name == show.FIRST
    allocator = WARM if given.allocator == "warm" else {}
    common = {"threads": given.threads, "rounds": given.rounds, "only": None, "kept": folder}
    result: dict[str, Any] = {
        "environment": machine.environment(PACKAGES),
        "rounds": given.rounds,
        "models": given.models,
    }
    result["ways"] = []
    for model in given.models:
        result["ways"] += run_child(common | {"do": "time", "model": model}, allocator)
        save(name, result)
    for row in result["ways"]:
        if given.threads > 1 and row.get("processors", TWO) < TWO:
            print(f"{row['model']}: a plain step keeps only {row['processors']:.2f} processors busy", flush=True)
    if not first:
        return
    result["sweep"] = run_child(common | {"do": "sweep", "model": "linear"}, allocator)
    save(name, result)
    result["memory"] = []
    for model in given.models:
        right = [row["way"] for row in result["ways"] if row["model"] == model and "ratio" in row]
        if right:
            result["memory"] += run_child(common | {"do": "memory", "model": model, "only": right}, EXACT)
    save(name, result)
    if machine.processors() == 1:
        print(
            "two threads need two processors, this process may use a single processor: no comparison",
            flush=True,
        )
        return
    two = common | {"threads": 2, "only": ["while training"]}
    result["two threads"] = [
        row for model in given.models for row in run_child(two | {"do": "time", "model": model}, allocator)
    ]
    save(name, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--allocator", choices=("warm", "default"), default="warm")
    parser.add_argument(
        "--show",
        action="store_true",
        help="print the tables, write them into docs/benchmarks.md, draw the figure",
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(_files.finite(child.do(given.job))))
    elif given.show:
        show.show(OUT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(given, folder)


if __name__ == "__main__":
    main()

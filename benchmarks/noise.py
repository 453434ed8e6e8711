"""What gradient noise costs beside a plain training step, and beside other ways of measuring it.

    python benchmarks/noise.py           measures; writes benchmarks/results/noise.json (twenty minutes)
    python benchmarks/noise.py --show    tables and figure of docs/benchmarks.md, from that file

Four models, and linear layers that see more or fewer tokens in an example. The ways take turns; a plain step runs right
before every step that is timed, and the time of the second is divided by that of the first. Each model has a process
of its own, whose allocator keeps what it has (--allocator default: as it comes). Ways whose Tr Sigma is not that of a
float64 loop over single examples are not timed. Each peak of memory is that of a process that does nothing else.

The file keeps a run for each number of threads and allocator; all but the first, one thread and warm, are only timed,
without the tokens, the memory and the two threads. `make bench` installs the packages that are compared with.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gradient_noise import child, show
from gradient_noise.models import MODELS

from noetherflow import _files, _versions

OUT = Path(__file__).parent / "results" / "noise.json"
PACKAGES = ("transformers", "backpack-for-pytorch", "opacus")
# For glibc: nothing is given back to the system, and nothing taken from it for a single tensor.
WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
# Every tensor is given back as soon as it is freed, so that the peak is that of what is in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# Below this, two threads share a processor.
TWO = 1.3


def run_child(job: dict[str, Any], allocator: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a job that has a process of its own; none, and a line, if that ended."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])} | allocator
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{job} ended with {done.returncode}: its rows are left out", flush=True)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, Any]:
    processor = "unknown"
    if (info := Path("/proc/cpuinfo")).exists():
        processor = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    versions = _versions.versions()
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its ways are left out (make bench installs it)", flush=True)
    return {"versions": versions, "processor": processor, "processors": processors()}


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(name: str, run: dict[str, Any]) -> None:
    """Put a run, finished or not, beside the others."""
    runs = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {}
    _files.write_json(OUT, {key: one for key, one in runs.items() if "allocator" in key} | {name: run})


def run(given: argparse.Namespace, kept: str) -> None:
    name = show.name_of(given.threads, given.allocator)
    first = name == show.FIRST
    allocator = WARM if given.allocator == "warm" else {}
    common = {"threads": given.threads, "rounds": given.rounds, "only": None, "kept": kept}
    result: dict[str, Any] = {"environment": environment(), "rounds": given.rounds, "models": given.models}
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
    if processors() == 1:
        print("two threads need two processors, and this process may use one: they are left out", flush=True)
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
    parser.add_argument("--show", action="store_true", help="print tables, put them into the page, draw the figure")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(_files.finite(child.do(given.job))))
    elif given.show:
        show.show(OUT)
    else:
        with tempfile.TemporaryDirectory() as kept:
            run(given, kept)


if __name__ == "__main__":
    main()

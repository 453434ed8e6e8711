"""What gradient noise costs beside a plain training step, and beside other ways of measuring it.

    python benchmarks/noise.py [--threads 1] [--rounds 15]    measures; writes benchmarks/results/noise.json
    python benchmarks/noise.py --show                         tables and figure of docs/benchmarks.md, from that file

Four models, and linear layers that see more or fewer tokens in an example. A plain step runs just before every step
that is timed, and the time of the second is divided by that of the first. Each model has a process of its own, whose
allocator keeps what it has (--allocator default: as it comes); each peak of memory is that of a process that does
nothing else. Ways whose Tr Sigma is not that of a float64 loop over single examples are not timed.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gradient_noise import child, show
from gradient_noise.models import MODELS, SWEEP
from gradient_noise.ways import OURS, RIVALS

from noetherflow import _files, _versions

OUT = Path(__file__).parent / "results" / "noise.json"
# For glibc: nothing is given back to the system, and nothing taken from it for a single tensor.
WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}


def run_child(job: dict[str, Any], threads: int, *, warm: bool) -> Any:
    """A job in a process of its own; what it returns, or why it ended."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | (WARM if warm else {})
    command = [sys.executable, __file__, "--job", json.dumps(job | {"threads": threads})]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(given: argparse.Namespace) -> dict[str, Any]:
    processor = "unknown"
    if (info := Path("/proc/cpuinfo")).exists():
        processor = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    versions = _versions.versions()
    for package in ("transformers", "backpack-for-pytorch", "opacus"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its ways are left out (make bench installs it)", flush=True)
    return {"versions": versions, "processor": processor, "rounds": given.rounds, "allocator": given.allocator}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--allocator", choices=("warm", "default"), default="warm")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(_files.finite(child.do(given.job))))
        return
    if given.show:
        show.show(OUT)
        return
    warm = given.allocator == "warm"
    result: dict[str, Any] = {"environment": environment(given)}
    rounds = {"rounds": given.rounds}
    result["ways"] = [
        row
        for name in given.models
        for row in run_child({"do": "time", "model": name, **rounds}, given.threads, warm=warm)
    ]
    result["two threads"] = [
        row for name in given.models for row in run_child({"do": "threads", "model": name, **rounds}, 2, warm=warm)
    ]
    result["sweep"] = [
        row
        for tokens in SWEEP
        for row in run_child({"do": "sweep", "model": str(tokens), **rounds}, given.threads, warm=warm)
    ]
    result["memory"] = [
        run_child({"do": "memory", "model": name, "way": way}, given.threads, warm=False)
        for name in given.models
        for way in ("plain", *OURS, *RIVALS)
    ]
    _files.write_json(OUT, result)


if __name__ == "__main__":
    main()

"""What one process does: time the ways of one model, or find the peak of memory of one way."""

import ctypes
import gc
import logging
import resource
import statistics
import sys
import time
import warnings
from typing import Any

import torch

from .models import Built, build, one_by_one
from .ways import OURS, RIVALS, Way, plain

# Ways that take many times as long are timed less often, after all others.
_SLOW_ROUNDS = 3
_SLOW = ("torch.func", "nf, exact=True", "loop")
# How far a Tr Sigma in float32 may be from the loop in float64.
_CORRECT = 1e-4


def do(job: dict[str, Any]) -> Any:
    """Dispatch."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    if job["do"] == "memory":
        return memory(job["model"], job["way"])
    built = build(job["model"])
    if job["do"] == "time":
        return measured(job["model"], built, list(OURS) + list(RIVALS), job["rounds"])
    if job["do"] == "sweep":
        return measured(job["model"], built, ["while training"], job["rounds"])
    return [*measured(job["model"], built, ["while training"], job["rounds"]), processors(job["model"], built)]


def measured(name: str, built: Built, wanted: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each way: its error, or what is wrong; if nothing is, its times."""
    truth = one_by_one(built.in_double())
    base = plain(built)
    rows, ways = [], {}
    for way in wanted:
        row, built_way = judged(built, way, truth)
        row = {"model": name, "way": way} | row
        rows.append(row)
        if built_way is not None:
            ways[way] = (row, built_way)
    for row, way in sorted(ways.values(), key=lambda pair: pair[0]["way"] in _SLOW):
        few = min(rounds, _SLOW_ROUNDS) if row["way"] in _SLOW else rounds
        row |= timed(base, way, few)
    for row in rows:
        said = row.get("wrong") or f"{row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})"
        print(f"{name:8s} {row['way']:26s} {said}", file=sys.stderr, flush=True)
    return rows


def judged(built: Built, name: str, truth: float) -> tuple[dict[str, Any], Way | None]:
    """How far a way is from the truth; None if it is not the truth."""
    try:
        way = (OURS | RIVALS)[name](built)
        way.step()
        error = abs(way.trace() / truth - 1)
    except ImportError:
        return {"wrong": "not installed"}, None
    except Exception as problem:  # whatever a package raises is what is to be reported
        return {"wrong": f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"}, None
    if not error < _CORRECT:
        return {"error": error, "wrong": f"Tr Sigma is off by {error:.1%}"}, None
    return {"error": error}, way


def timed(base: Way, way: Way, rounds: int) -> dict[str, Any]:
    """Seconds of a way and of the plain step before it, and page faults."""
    ours, theirs, faults = [], [], []
    for _ in range(rounds + 1):
        gc.collect()
        start = time.perf_counter()
        base.step()
        middle, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        way.step()
        end = time.perf_counter()
        theirs.append(middle - start)
        ours.append(end - middle)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    ours, theirs, faults = ours[1:], theirs[1:], faults[1:]  # the first one warms up
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "page faults": statistics.median(faults),
        "milliseconds": 1e3 * statistics.median(ours),
        "plain milliseconds": 1e3 * statistics.median(theirs),
        "seconds": ours,
        "plain seconds": theirs,
    }


def processors(name: str, built: Built) -> dict[str, Any]:
    """How many processors a plain step keeps busy."""
    base = plain(built)
    base.step()
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(5):
        base.step()
    busy, wall = time.process_time() - busy, time.perf_counter() - wall
    return {"model": name, "way": "plain", "processors": busy / wall}


def memory(name: str, way: str) -> dict[str, Any]:
    """What a way adds to the memory of a process that holds model and batch, at most, in bytes."""
    built = build(name)
    row: dict[str, Any] = {"model": name, "way": way}
    try:
        ready = plain(built) if way == "plain" else (OURS | RIVALS)[way](built)
        # What was needed to get ready does not count: finding symmetries takes more than a step.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = peak(reset=True)
        for _ in range(3):
            ready.step()
    except Exception as problem:
        return row | {"wrong": type(problem).__name__}
    return row | {"bytes": peak() - before}


def peak(*, reset: bool = False) -> int:
    """The most memory that was resident since the last reset, from Linux."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

"""What one process does: time the ways of one model, or find the peaks of memory."""

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import pickle
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from noetherflow.noise.buffers import EACH, OF_SUM, Buffer
from noetherflow.noise.kernels import Window, kernels_for
from noetherflow.noise.statistics import Requested, StatisticsLayout

from .models import SWEEP, Built, build, in_examples_of, one_by_one
from .ways import FOUND, OURS, Way, plain, symmetries_of, ways_for

# A way that takes that many plain steps is timed after all others, and in so many rounds as fit into these seconds.
_SLOW, _PATIENCE, _FEWEST = 3.0, 10.0, 3
# Rounds of the ways of others.
_RIVALS = 7
# Where two steps take longer than these seconds, the peak of memory is that of two; otherwise of three.
_LONG = 2.0
# Of many small examples, the truth is found for so many.
_JUDGED = 64
_STATUS = Path("/proc/self/status")
# How far a Tr Sigma in float32 may be from the loop in float64.
_CORRECT = 1e-4


def do(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one job."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    if job["do"] == "sweep":
        return sweep(job["rounds"])
    built = build(job["model"])
    remember(built, Path(job["kept"]) / f"{job['model']}.pickle")
    wanted = job["only"] or list(ways_for(built))
    rows = memory(built, wanted) if job["do"] == "memory" else measured(built, wanted, job["rounds"])
    for row in rows:
        row["model"] = job["model"]
        say(row)
    return rows


def remember(built: Built, path: Path) -> None:
    """Find the symmetries, or read what another job for the same model found: it takes as long as many steps."""
    if path.exists():
        FOUND[built.model] = pickle.loads(path.read_bytes())
    else:
        symmetries_of(built, matrices=True)
        path.write_bytes(pickle.dumps(FOUND[built.model]))


def sweep(rounds: int) -> list[dict[str, Any]]:
    """The same linear layers and tokens, with more and more tokens in an example."""
    whole, rows = build("linear"), []
    for tokens in SWEEP:
        built = in_examples_of(whole, tokens)
        few = built._replace(batch=built.examples(slice(_JUDGED)))
        for row in measured(built, ["while training"], rounds, few):
            row |= {"model": "linear", "tokens": tokens, "batch": built.size}
            rows.append(row)
            say(row)
    return rows


def measured(built: Built, wanted: list[str], rounds: int, few: Built | None = None) -> list[dict[str, Any]]:
    """A row for the plain step, and one for each way: its error, or what is wrong; if nothing is, its times.

    The error is that on all examples, or on a few.
    """
    truth = one_by_one((few or built).in_double())
    base = plain(built)
    rows = [{"way": "plain"} | busy(base)]
    rows[0]["floor"] = 1 + built.formed * passes() / (rows[0]["milliseconds"] / 1e3)
    ways: list[tuple[dict[str, Any], Way]] = []
    for name in wanted:
        row, way = judged(few or built, name, truth)
        rows.append(row)
        if way is not None:
            ways.append((row, ways_for(built)[name](built) if few else way))
    limit = _SLOW * rows[0]["milliseconds"] / 1e3
    costs = [(row, way, once(way)["seconds"] if row["first seconds"] > limit else 0.0) for row, way in ways]
    times: dict[str, list[dict[str, float]]] = {row["way"]: [] for row, _ in ways}
    for number in range(rounds):
        for row, way, cost in costs:
            if cost <= limit and (row["way"] in OURS or number < _RIVALS):
                times[row["way"]].append(beside(base, way))
    for row, way, cost in costs:
        if cost > limit:
            number = min(rounds, max(_FEWEST, int(_PATIENCE / cost)))
            times[row["way"]] = [beside(base, way) for _ in range(number)]
    for row, _ in ways:
        row |= summed_up(times[row["way"]])
    return rows


def judged(built: Built, name: str, truth: float) -> tuple[dict[str, Any], Way | None]:
    """How far a way is from the truth; None if it is not the truth."""
    row: dict[str, Any] = {"way": name}
    try:
        way = ways_for(built)[name](built)
        row["first seconds"] = once(way, clear=False)["seconds"]
        row["error"] = abs(way.trace() / truth - 1)
        missing = way.missing()
        way.clear()
    except ImportError as problem:
        return row | {"absent": str(problem)}, None
    except Exception as problem:  # whatever a package raises is what is to be reported
        first = next(iter(str(problem).splitlines()), "")
        return row | {"wrong": f"raises {type(problem).__name__}: {first[:200]}"}, None
    if missing or not row["error"] < _CORRECT:
        off = f"{row['error']:.0%}" if row["error"] > 0.1 else f"{row['error']:.1g}"
        return row | {"wrong": f"{missing}; " * bool(missing) + f"Tr Σ is off by {off}"}, None
    return row, way


def once(way: Way, *, clear: bool = True) -> dict[str, float]:
    """Seconds and page faults of a step."""
    gc.collect()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    way.step()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    if clear:
        way.clear()
    return {"seconds": seconds, "faults": faults}


def beside(base: Way, way: Way) -> dict[str, float]:
    """The same of a way, and of a plain step right before it."""
    before = once(base)
    return {"plain seconds": before["seconds"], "plain faults": before["faults"]} | once(way)


def summed_up(times: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [one["seconds"] / one["plain seconds"] for one in times]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "rounds": len(times),
        "milliseconds": 1e3 * statistics.median(one["seconds"] for one in times),
        "plain milliseconds": 1e3 * statistics.median(one["plain seconds"] for one in times),
        "page faults": statistics.median(one["faults"] for one in times),
        "plain page faults": statistics.median(one["plain faults"] for one in times),
        "seconds": [round(one["seconds"], 6) for one in times],
        "plain seconds": [round(one["plain seconds"], 6) for one in times],
    }


def busy(base: Way) -> dict[str, float]:
    """How long a plain step takes, and how many processors it keeps busy."""
    base.step()
    steps, wall, used = 0, time.perf_counter(), time.process_time()
    while steps < 5 or time.perf_counter() - wall < 0.5:
        base.step()
        steps += 1
    used, wall = time.process_time() - used, time.perf_counter() - wall
    return {"milliseconds": 1e3 * wall / steps, "processors": used / wall}


def passes() -> float:
    """Seconds that squaring a number of a gradient and adding it up take where a cache holds the gradient."""
    strip, total = torch.randn(256, 256), torch.zeros(256, 256)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        torch.linalg.vector_norm(strip, dim=1)
        total += strip
        times.append(time.perf_counter() - start)
    return statistics.median(times) / strip.numel()


def memory(built: Built, wanted: list[str]) -> list[dict[str, Any]]:
    """What each way adds to the memory of a process that holds model and batch, at most, in bytes.

    Every way has a process of its own, forked from this one, which has not run a backward pass: torch forbids to fork
    after one.
    """
    for name in ("torch._dynamo", "opacus", "backpack"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)  # once, not in every process
    load_loops()
    rows = []
    known = {"plain": plain} | ways_for(built)
    for name in ("plain", *wanted):
        make = known[name]
        said = forked(lambda make=make: json.dumps(growth(built, make)).encode())
        rows.append({"way": name} | (json.loads(said) if said else {"wrong": "the process ended"}))
    return rows


def load_loops() -> None:
    """Run every kernel once: its compiled code is there before the first step, as that of torch is."""
    stack, ids = torch.ones(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)
    kernels, window = kernels_for(stack), Window([1], [0], [1], 1, [1])
    for asked in (Requested(True, True), Requested(True, True, entries=True)):
        matrix, weight, wide_weight = (
            Buffer.blank(StatisticsLayout.of(torch.Size(shape), asked), stack)
            for shape in ((2, 2), (2, 2, 1), (2, 64, 1))
        )
        kernels.outer_products(stack, stack, matrix, needs_sum=True)
        kernels.patches(stack, stack, window, weight)
        kernels.patches(torch.ones(1, 64, 2), stack[:1], window, wide_weight)
        kernels.table_rows(ids, stack, matrix)
        kernels.accumulate(stack, matrix, EACH, torch.ones(2, 2))
        kernels.accumulate(stack, matrix, OF_SUM)
    # Wide enough for the compiled product of matrices.
    wide = torch.ones(1, 64, 64)
    matrix = Buffer.blank(StatisticsLayout.of(torch.Size((64, 64)), Requested(True, True)), wide)
    kernels.outer_products(wide, wide, matrix, needs_sum=True)
    kernels.channel_sums(stack, stack)
    kernels.affine_sums(stack, stack, stack[..., :1].contiguous(), stack[..., :1].contiguous())


def forked(function: Callable[[], bytes]) -> bytes:
    """What a function returns in a copy of this process; nothing if that came to an end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(function())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def growth(built: Built, make: Callable[[Built], Way]) -> dict[str, Any]:
    base = plain(built)
    base.step()  # so that what the libraries keep for themselves is there
    base.clear()
    built.model.zero_grad()
    try:
        way = make(built)
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        before, code = peak(reset=True), resident("RssFile")
        start = time.perf_counter()
        for done in range(3):
            if done > 1 and time.perf_counter() - start > _LONG:
                break
            way.step()
    except Exception as problem:
        return {"wrong": type(problem).__name__}
    # Code that a process runs for the first time since it was forked is mapped anew, but there already: it is left out,
    # as if all of it had been mapped before the peak.
    return {"bytes": peak() - before - (resident("RssFile") - code)}


def peak(*, reset: bool = False) -> int:
    """The most memory that was resident since the last reset; where there is no reset, ever."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def resident(kind: str) -> int:
    """What the system says of some kind of this process' memory, in bytes; 0 if it says nothing."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(kind)), 0)


def say(row: dict[str, Any]) -> None:
    """A row in a line, for whoever waits."""
    if "ratio" in row:
        low, high = row["quartiles"]
        said = f"{row['ratio']:8.3f} ({low:.3f} to {high:.3f}) in {row['rounds']} rounds, off by {row['error']:.0e}"
    elif "processors" in row:
        said = f"{row['milliseconds']:8.1f} ms, keeps {row['processors']:.2f} processors busy"
    elif "bytes" in row:
        said = f"{row['bytes'] / 1e6:8.1f} MB"
    else:
        said = row.get("wrong") or row["absent"]
    name = f"{row['model']} {row.get('tokens', '')}".strip()
    print(f"{name:12s} {row['way']:33s} {said}", file=sys.stderr, flush=True)

"""Times, memory and errors of a method, beside a plain step."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .methods import Method, Truth, plain
from .models import Built

WARM = 2
# Largest relative error of Tr Sigma that rounding explains, by the type of the computation.
BOUNDS = {torch.float32: 5e-3, torch.bfloat16: 0.1}


@dataclass
class Clock:
    """Times and memory of steps on a device."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, step: Callable[[], object]) -> float:
        """The duration of a step, by CUDA events on a GPU."""
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak(self, step: Callable[[], object]) -> int | None:
        """The largest memory of PyTorch's allocator in a step, in bytes; None on the CPU."""
        if not self.cuda:
            step()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def cleared(built: Built, method: Method) -> Callable[[], object]:
    """A step without gradients of the step before; to clear them takes no time of the step."""
    built.model.zero_grad(set_to_none=True)
    return method.step


def compared(built: Built, method: Method, truth: Truth) -> dict[str, Any]:
    """The errors of a method."""
    row: dict[str, Any] = {"error": abs(method.trace() / truth.trace - 1)}
    if method.noise is not None:
        noise, worst = method.noise(), 0.0
        for name, net in truth.nets.items():
            grams = noise.grams[name]
            size = float(grams.plus.norm() + grams.minus.norm())
            off = float((noise.symmetries[name].charge_of(grams).cpu() - net).norm())
            worst = max(worst, off / size if size else 0.0)
        row["error of Grams"] = worst
    if not row["error"] < BOUNDS[built.precision]:
        row["wrong"] = f"Tr Sigma is off by {row['error']:.2g}"
    elif not row.get("error of Grams", 0.0) < BOUNDS[built.precision]:
        row["wrong"] = f"a charge is off by {row['error of Grams']:.2g}"
    return row


def measured(
    built: Built, make: Callable[[Built], Method], truth: Truth, clock: Clock, rounds: int, until: float
) -> dict[str, Any]:
    """The row of a method: errors, memory, and times beside plain steps; or what went wrong."""
    base = plain(built)
    try:
        method = make(built)
        # The first step compiles kernels and fills caches.
        first = clock.seconds(method.step)
        row = compared(built, method, truth) | {"first milliseconds": 1e3 * first}
        if "wrong" in row:
            return row
        row["peak bytes"] = clock.peak(cleared(built, method))
        row["plain peak bytes"] = clock.peak(cleared(built, base))
        times: list[tuple[float, float]] = []
        for number in range(WARM + rounds):
            pair = clock.seconds(cleared(built, base)), clock.seconds(cleared(built, method))
            if number >= WARM or time.monotonic() > until:
                times.append(pair)
            if time.monotonic() > until:
                break
    except ImportError as problem:
        return {"absent": str(problem)}
    except Exception as problem:  # whatever is raised is what is to be reported
        first = next(iter(str(problem).splitlines()), "")
        return {"wrong": f"raises {type(problem).__name__}: {first[:300]}"}
    finally:
        built.model.zero_grad(set_to_none=True)
        gc.collect()
    ratios = [ours / theirs for theirs, ours in times]
    return row | {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2] if len(ratios) > 1 else ratios * 2,
        "milliseconds": 1e3 * statistics.median(ours for _, ours in times),
        "plain milliseconds": 1e3 * statistics.median(theirs for theirs, _ in times),
        "rounds": len(times),
    }

"""Cost of measuring gradient noise on a GPU: time, memory and error of several methods, in at most six minutes.

    python benchmarks/noise_gpu.py                         on a GPU, writes benchmarks/results/noise_gpu.json
    python benchmarks/noise_gpu.py --quick --device cpu    small sizes on the CPU: whether the script runs

Models: Llama of 160 million parameters in bfloat16 (16 sequences of 2,048 tokens); GPT-2 small in float32 under
bfloat16 autocast (16 sequences of 1,024 tokens); a ResNet-50 in float32 (64 images) with GroupNorm in place of
BatchNorm, which couples examples; an MLP in float32 (1,024 vectors). Weights are random; nothing is downloaded.

Methods: a plain step; `NoiseMeter` while training, in a step that only measures, and with the Grams of the symmetries
that are declared here; `torch.func` over single examples, in parts that fit into memory; a loop over single examples;
Opacus, if installed. Each is compared with a float32 loop over single examples (TF32 off): the error of Tr Sigma, and
for Grams the largest error of a charge relative to both of its sides. A method with a larger error than the precision
allows is reported as wrong and not timed.

Times are medians of CUDA events, each beside a plain step right before it. The file is written after every method, so a
run that is cut off leaves what it measured. No model begins after `--seconds`, and no method after its share.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import machine
import torch
from noise_on_gpu.measure import Clock, measured
from noise_on_gpu.methods import METHODS, Truth
from noise_on_gpu.models import MODELS

from noetherflow import _files

OUT = Path(__file__).parent / "results" / "noise_gpu.json"
ROUNDS = 12


def environment(device: torch.device) -> dict[str, Any]:
    """The name of the GPU, its memory, and versions."""
    found = machine.environment(("transformers", "opacus", "triton", "numba"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"GPU": properties.name, "GPU bytes": properties.total_memory, "CUDA": torch.version.cuda}
    found["TF32"] = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=330.0, help="after which no method begins")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    device, start = torch.device(given.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: try --quick --device cpu")
    clock, rounds = Clock(device), 2 if given.quick else ROUNDS
    result: dict[str, Any] = {"environment": environment(device), "quick": given.quick, "rounds": rounds, "models": {}}
    for number, name in enumerate(given.models):
        # What is left is shared between the models that are left.
        left = given.seconds - (time.monotonic() - start)
        end = time.monotonic() + left / (len(given.models) - number)
        rows: dict[str, Any] = {}
        result["models"][name] = entry = {"rows": rows}
        try:
            torch.manual_seed(0)
            built = MODELS[name](device, given.quick)
            entry |= {
                "parameters": sum(p.numel() for p in built.model.parameters()),
                "batch": [list(tensor.shape) for tensor in built.batch],
                "precision": str(built.precision).removeprefix("torch.") + (" autocast" if built.autocast else ""),
                "symmetries": len(built.symmetries),
            }
            begin = time.monotonic()
            truth = Truth.of(built)
            entry |= {"trace": truth.trace, "seconds of the truth": time.monotonic() - begin}
        except Exception as problem:
            entry["wrong"] = f"raises {type(problem).__name__}: {problem}"[:400]
            _files.write_json(given.out, result)
            continue
        for index, method in enumerate(given.methods):
            now = time.monotonic()
            if now > end:
                rows[method] = {"absent": "no time was left"}
            else:
                until = now + (end - now) / (len(given.methods) - index)
                rows[method] = measured(built, METHODS[method], truth, clock, rounds, until)
            print(name, method, json.dumps(rows[method]), flush=True)
            _files.write_json(given.out, result)
        del built, truth
        gc.collect()
        if clock.cuda:
            torch.cuda.empty_cache()
    result["seconds"] = time.monotonic() - start
    _files.write_json(given.out, result)
    for name, entry in result["models"].items():
        for method, row in entry["rows"].items():
            said = (
                f"{row['ratio']:6.2f}  {row['milliseconds']:9.2f} ms" if "ratio" in row else row.get("wrong", "absent")
            )
            print(f"{name:8} {method:16} {said}")
    print(f"{given.out}: {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()

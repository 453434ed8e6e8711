"""Wall time of `nf.find_symmetries` by depth, for GPT-2 architectures of width 64 with 4, 12, 24 and 48 layers.

    python benchmarks/detect.py

Each of 3 rounds times all depths in turn, so that a change of the machine's load affects all depths alike. The script
writes all times, their medians, and the versions of the packages to benchmarks/results/detect.json.
"""

import json
import logging
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import noetherflow as nf
from noetherflow import _versions

DEPTHS = (4, 12, 24, 48)
ROUNDS = 3
OUT = Path(__file__).parent / "results" / "detect.json"


def model(depth: int) -> nn.Module:
    config = transformers.GPT2Config(n_layer=depth, n_head=4, n_embd=64, vocab_size=100, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(100, (2, 8))
    models = {depth: model(depth) for depth in DEPTHS}
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    counts = {}
    nf.find_symmetries(models[DEPTHS[0]], loss, tokens)
    for _ in range(ROUNDS):
        for depth, network in models.items():
            start = time.perf_counter()
            counts[depth] = len(nf.find_symmetries(network, loss, tokens))
            seconds[depth].append(time.perf_counter() - start)
    rows = [
        {"layers": depth, "symmetries": counts[depth], "seconds": statistics.median(times), "all": times}
        for depth, times in seconds.items()
    ]
    for row in rows:
        print(
            f"{row['layers']:3d} layers  {row['symmetries']:4d} symmetries  {row['seconds']:6.2f} s  "
            f"{row['seconds'] / row['layers']:.3f} s per layer"
        )
    OUT.write_text(json.dumps({"versions": _versions.versions(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

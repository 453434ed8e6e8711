"""A rank of runs of the Trainer of Hugging Face in DistributedDataParallel: the environment says which.

python tests/trainer_ranks.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import trainer_runs as runs


def metrics_of(folder: Path, between: str, **options: Any) -> tuple[runs.Metrics, list[float]]:
    """The metrics of a run in float64, and a sum of each parameter at its end."""
    options |= {"compute_loss_func": runs.next_token, "max_steps": 2, "watched": {"every": 1, "between": between}}
    run, noise = runs.watched_run(runs.llama().double(), folder, runs.rows(padded=True), **options)
    return noise.watch.metrics(), [float(parameter.detach().sum()) for parameter in run.model.parameters()]


def main(folder: Path) -> None:
    """Train twice, and write what this rank has measured."""
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "gradient_accumulation_steps": 2}
    results = [metrics_of(folder, between, **options) for between in ("examples", "microbatches")]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results), "utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

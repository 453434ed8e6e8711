"""What each of two processes does in the tests of several ranks: all cases, so that processes are started once."""

import datetime
import pickle
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import ranks
import ranks_examples
import ranks_sharded


def work(rank: int, folder: Path) -> None:
    """Go through all cases, and leave a file with what was seen."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        seen = {
            "microbatches": ranks.work(rank),
            "examples": ranks_examples.work(rank),
            "sharded": ranks_sharded.work(rank),
        }
        with open(folder / f"{rank}.pickle", "wb") as file:
            pickle.dump(seen, file)
    finally:
        dist.destroy_process_group()

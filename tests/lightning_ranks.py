"""A run of Lightning's Trainer on two ranks, as a program: `python lightning_ranks.py FOLDER` logs to FOLDER/k."""

import sys
import warnings
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_runs import QUIET, Pair, Regression, fit, loader, network, pairs
from noetherflow.integrations.lightning import NoiseCallback

RANKS = 2
ACCUMULATED = (1, 2)


def batches() -> list[Pair]:
    """Eight batches, of which a rank takes every second: with k = 1, steps have the batches (0, 1), (2, 3), ..."""
    return [*pairs()[:6], *pairs()[:2]]


def of_all_ranks() -> list[Pair]:
    """The examples of both ranks in a step, as batches of a single process."""
    steps = zip(batches()[::2], batches()[1::2], strict=True)
    return [(torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])) for one, other in steps]


@final
class Shared(Regression):
    """A regression whose ranks take turns at the batches."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batches()[self.global_rank :: RANKS])


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    for line in QUIET:
        warnings.filterwarnings("ignore", line.removeprefix("ignore:"))
    runs = {"examples": (1, NoiseCallback(every=1))}
    runs |= {str(k): (k, NoiseCallback(every=1, between="microbatches")) for k in ACCUMULATED}
    for name, (k, callback) in runs.items():
        fit(
            Shared(network()),
            [callback],
            strategy="ddp_fork",  # forked before there are threads: nothing is imported twice
            devices=RANKS,
            use_distributed_sampler=False,
            accumulate_grad_batches=k,
            logger=CSVLogger(folder, name=None, version=name),
            own_loader=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

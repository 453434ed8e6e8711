"""What the ranks of DistributedDataParallel do in the tests of the noise between them, each a process."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import noetherflow as nf
from noetherflow.noise import between_ranks

# For each rank the sizes of its microbatches.
CASES = {
    "equal": [[6], [6]],
    "unequal": [[3], [7]],
    "accumulated": [[2, 3], [4, 1]],
    "more on one": [[2, 3, 1], [5]],
    "none on one": [[2, 3], []],
}
Batch = tuple[Tensor, Tensor]


class Seen(NamedTuple):
    """What one rank has after a step: its gradients, those without a meter, and what the meter says."""

    gradients: dict[str, Tensor]
    plain: dict[str, Tensor]
    noise: nf.NoiseMoments
    skipped: int


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


@functools.cache
def symmetries() -> dict[str, nf.Symmetry]:
    return nf.find_symmetries(build(), loss, parts_of([[6]])[0][0])


def parts_of(sizes: list[list[int]]) -> list[list[Batch]]:
    """Microbatches by rank, of examples that are all different."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (
                torch.randn(size, 3, generator=generator, dtype=torch.float64),
                torch.randn(size, 2, generator=generator, dtype=torch.float64),
            )
            for size in own
        ]
        for own in sizes
    ]


def work(rank: int) -> dict[str, Seen]:
    """Go through all cases."""
    found = {name: step(parts_of(sizes)[rank], synced=name != "none on one") for name, sizes in CASES.items()}
    found["one per rank"] = step(parts_of(CASES["accumulated"])[rank], once=True)
    bucket, between_ranks._BUCKET = between_ranks._BUCKET, 7
    found["in pieces"] = step(parts_of(CASES["more on one"])[rank])
    between_ranks._BUCKET = bucket
    found["afterwards"] = afterwards(parts_of(CASES["equal"])[rank])
    found["overflow"] = step(parts_of(CASES["equal"])[rank], scales=[1.0, float("inf") if rank else 1.0])
    return found


def step(parts: list[Batch], *, once: bool = False, synced: bool = True, scales: list[float] | None = None) -> Seen:
    """One step, or several with the loss multiplied by something in each, with a meter and without."""
    found = []
    for metered in (False, True):
        model = build()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=once)
        meter = nf.MicrobatchMeter(model, symmetries(), variances=True, group=dist.group.WORLD)
        for scale in scales or [1.0]:
            with meter.step() if metered else contextlib.nullcontext(lambda **_: None) as done:
                accumulate(ddp, parts, done, once=once, synced=synced, scale=scale)
        found.append({name: one.grad for name, one in model.named_parameters()})
    return Seen(found[1], found[0], meter.noise, meter.skipped)


def accumulate(ddp: nn.Module, parts: list[Batch], done: Any, *, once: bool, synced: bool, scale: float) -> None:
    total = sum(len(part[0]) for part in parts)
    for index, part in enumerate(parts):
        size = len(part[0])
        last = index == len(parts) - 1
        with contextlib.nullcontext() if last and synced else ddp.no_sync():
            (scale * size / total * loss(ddp, part).mean()).backward()
        if not once:
            done(size=size, weight=scale * size / total)
    if once:
        done(size=total)


def afterwards(parts: list[Batch]) -> Seen:
    """The mistake: the gradients that are compared have been averaged over the ranks."""
    model = build()
    ddp = DistributedDataParallel(model)
    loss(ddp, parts[0]).mean().backward()
    averaged = {name: one.grad.clone() for name, one in model.named_parameters()}
    meter = nf.MicrobatchMeter(model, symmetries(), variances=True, group=dist.group.WORLD)
    with meter.step() as done:
        sum((one * averaged[name]).sum() for name, one in model.named_parameters()).backward()
        done(size=len(parts[0][0]))
    return Seen(averaged, averaged, meter.noise, meter.skipped)

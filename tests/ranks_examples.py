"""What two ranks do in the tests of the noise of their examples, taken apart under DistributedDataParallel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import noetherflow as nf
from ranks import Batch, build, loss, parts_of, symmetries

# Examples of each rank.
SIZES = {"equal": [[6], [6]], "unequal": [[3], [8]], "a single example each": [[1], [1]]}


class Measured(NamedTuple):
    """What one rank has after some steps."""

    noise: nf.NoiseMoments | None
    steps: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    skipped: int
    unmeasured: dict[str, str]
    error: str


def weights(meter: Any) -> dict[str, Tensor]:
    """Weights of the squares of all entries, no two neighbours of which are equal."""
    return {name: (1.0 + torch.arange(p.numel()) % 7).view(p.shape) for name, p in meter._params.items()}


def observed(meter: Any) -> list[dict[str, Tensor]]:
    """What a meter tells of each step, filled while it runs."""
    steps: list[dict[str, Tensor]] = []

    def note(step: Any) -> None:
        said = {"trace": step.trace(), "norm_sq": step.norm_sq(), "examples": torch.tensor(float(step.examples))}
        if step.weighted:
            said |= {"weighted trace": step.trace(weighted=True), "weighted norm": step.norm_sq(weighted=True)}
        steps.append(said)

    meter.observers.append(note)
    return steps


def measured(
    train: Callable[[nf.NoiseMeter, nn.Module], None],
    model: nn.Module | None = None,
    *,
    found: dict[str, nf.Symmetry] | None = None,
    alone: bool = False,
    wrap: bool = True,
    entries: bool = True,
) -> Measured:
    """Steps with a meter, whose error is written down; without squares of entries, vectors are squared together."""
    model = build() if model is None else model
    meter = nf.NoiseMeter(
        model,
        symmetries() if found is None else found,
        variances=entries,
        weighted=True,
        group=None if alone else dist.group.WORLD,
    )
    steps, error = observed(meter), ""
    try:
        train(meter, DistributedDataParallel(model) if wrap else model)
    except nf.NoetherflowError as caught:
        error = f"{type(caught).__name__}: {caught}"
    noise = meter.noise if steps else None
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return Measured(noise, steps, gradients, meter.skipped, meter.unmeasured, error)


def one_step(batch: Batch, **options: Any) -> Callable[[nf.NoiseMeter, nn.Module], None]:
    def train(meter: nf.NoiseMeter, ddp: nn.Module) -> None:
        with meter.step(batch, weights=weights(meter), **options):
            loss(ddp, batch).mean().backward()

    return train


def accumulated(rank: int) -> Callable[[nf.NoiseMeter, nn.Module], None]:
    """Two steps under accumulation, the first without an average over ranks: .grad is not zero in the second."""
    first, second = parts_of([[2, 4], [5, 3]])[rank]

    def train(meter: nf.NoiseMeter, ddp: Any) -> None:
        with ddp.no_sync(), meter.step(first, weight=0.5 / len(first[0]), weights=weights(meter)):
            (loss(ddp, first).mean() / 2).backward()
        with meter.step(second, weight=0.5 / len(second[0]), weights=weights(meter)):
            (loss(ddp, second).mean() / 2).backward()

    return train


def clipped(batch: Batch) -> Callable[[nf.NoiseMeter, nn.Module], None]:
    """Gradients are changed in place inside the block."""

    def train(meter: nf.NoiseMeter, ddp: nn.Module) -> None:
        with meter.step(batch, weights=weights(meter)):
            loss(ddp, batch).mean().backward()
            for parameter in ddp.parameters():
                parameter.grad.mul_(0.01)

    return train


class Recurrent(nn.Module):
    """A second layer that cannot be taken apart by example, if it is on."""

    def __init__(self, *, on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.on = nn.Linear(3, 4), nn.RNN(4, 2), on
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result = self.second(hidden[None])[0][0]
        return result if self.on else result.detach() + hidden[:, :2]


def overflowing(batch: Batch, rank: int) -> Callable[[nf.NoiseMeter, nn.Module], None]:
    def train(meter: nf.NoiseMeter, ddp: nn.Module) -> None:
        for bad in (False, True):
            with meter.step(batch, weights=weights(meter)):
                ((float("inf") if bad and rank else 1.0) * loss(ddp, batch).mean()).backward()

    return train


def refused(batch: Batch, rank: int) -> Callable[[nf.NoiseMeter, nn.Module], None]:
    """One rank gives an empty batch, or leaves out the backward pass of its loss."""

    def train(meter: nf.NoiseMeter, model: nn.Module) -> None:
        with meter.step((batch[0][:0], batch[1][:0]) if rank else batch):
            loss(model, batch).mean().backward()

    return train


def work(rank: int) -> dict[str, Measured]:
    """Go through all cases."""
    seen = {}
    for name, sizes in SIZES.items():
        (batch,) = parts_of(sizes)[rank]
        seen[name] = measured(one_step(batch))
        seen[f"{name}, only measured"] = measured(one_step(batch, train=False), wrap=False)
    (batch,) = parts_of(SIZES["unequal"])[rank]
    seen["in single precision"] = measured(
        one_step((batch[0].float(), batch[1].float())), build().float(), found=symmetries()
    )
    seen["each for itself"] = measured(one_step(batch), alone=True, entries=False)
    seen["accumulated"] = measured(accumulated(rank))
    seen["clipped"] = measured(clipped(batch), entries=False)
    seen["overflow"] = measured(overflowing(batch, rank))
    seen["refused"] = measured(refused(batch, rank))
    seen["recurrent on one"] = measured(one_step(batch), Recurrent(on=bool(rank)), found={}, wrap=False)
    other = nn.Sequential(nn.Linear(3, 2)).double() if rank else build()
    seen["stages"] = measured(one_step(batch), other, found={}, wrap=False)
    return seen

"""What two ranks do in the tests of the noise of a model that FSDP2 shards."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import noetherflow as nf
from ranks import Batch, parts_of
from ranks_examples import observed, weights

# Microbatches of each rank.
SIZES = {"one each": [[3], [7]], "accumulated": [[2, 3], [4, 1]]}
RESHARDS = (True, False)


class Sharded(NamedTuple):
    """What one rank has after two steps: what the meter says, and its shards, also after a run without a meter."""

    noise: nf.NoiseMoments
    steps: list[dict[str, Tensor]]
    shards: dict[str, Tensor]
    plain: dict[str, Tensor]


class Tied(nn.Module):
    """A frozen layer, a weight under two names, used twice, and more rows than ranks, or fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.frozen = nn.Linear(3, 5), nn.Linear(5, 5)
        self.outputs = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
        self.back, self.last = nn.Linear(3, 5, bias=False), nn.Linear(5, 1)
        self.back.weight = self.inputs.weight
        self.unused = nn.Linear(2, 3)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(torch.tanh(self.inputs(x)))
        return self.last(self.outputs(hidden) + torch.sigmoid(self.back(x)))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1][:, :1]).square().sum(1)


def symmetries() -> dict[str, nf.Symmetry]:
    return {
        "neurons": nf.DiagonalSymmetry(
            [nf.Axis("outputs.0.weight", 0), nf.Axis("outputs.0.bias", 0)], nf.Axis("outputs.2.weight", 1)
        ),
        "tied": nf.MatrixSymmetry(nf.Axis("back.weight", 1), nf.Axis("last.weight", 1, 0, 3)),
    }


def shard(model: nn.Module, *, nested: bool, **options: Any) -> nn.Module:
    if nested:
        fully_shard(model.outputs[0], **options)
        fully_shard(model.outputs, **options)
    return fully_shard(model, **options)


def train(model: nn.Module, parts: list[Batch], meter: nf.MicrobatchMeter | None) -> None:
    """Two steps of SGD, each with all microbatches."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    total = sum(len(part[0]) for part in parts)
    for _ in range(2):
        optimizer.zero_grad()
        with contextlib.nullcontext(lambda **_: None) if meter is None else meter.step(weights=weights(meter)) as done:
            for index, part in enumerate(parts):
                model.set_requires_gradient_sync(index == len(parts) - 1)
                share = len(part[0]) / total
                (share * loss(model, part).mean()).backward()
                done(size=len(part[0]), weight=share)
        optimizer.step()


def run(parts: list[Batch], *, dtype: torch.dtype = torch.float64, **options: Any) -> Sharded:
    shards = []
    for metered in (False, True):
        model = shard(Tied().to(dtype), **options)
        steps: list[dict[str, Tensor]] = []
        meter = None
        if metered:
            meter = nf.MicrobatchMeter(model, symmetries(), variances=True, weighted=True, group=dist.group.WORLD)
            steps = observed(meter)
        train(model, parts, meter)
        shards.append({name: one.detach().to_local().clone() for name, one in model.named_parameters()})
    assert meter is not None
    return Sharded(meter.noise, steps, shards[1], shards[0])


def replicated(parts: list[Batch]) -> Sharded:
    """The same training, with a copy of the model on each rank."""
    model = Tied()
    meter = nf.MicrobatchMeter(model, symmetries(), variances=True, weighted=True, group=dist.group.WORLD)
    steps = observed(meter)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp.set_requires_gradient_sync = lambda flag: setattr(ddp, "require_backward_grad_sync", flag)
    train(ddp, parts, meter)
    shards = {name: one.detach().clone() for name, one in model.named_parameters()}
    return Sharded(meter.noise, steps, shards, shards)


def watched(parts: list[Batch], *, in_shards: bool) -> dict[str, float]:
    """What is logged of three steps of AdamW, whose second moments are sharded like the parameters."""
    model = Tied()
    model.unused.requires_grad_(False)
    trained = shard(model, nested=True) if in_shards else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    watch = nf.NoiseScale(model, {}, optimizer, every=1, between="microbatches", group=dist.group.WORLD)
    (batch,) = parts
    for _ in range(3):
        optimizer.zero_grad()
        with watch.step() as done:
            loss(trained, batch).mean().backward()
            done(size=len(batch[0]))
        optimizer.step()
    return watch.metrics()


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except nf.NoetherflowError as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def refusals(rank: int) -> dict[str, str]:
    """What is said of models that cannot be measured."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    alone = dist.new_group([rank], use_local_synchronization=True)

    def meter(model: nn.Module, group: Any = dist.group.WORLD) -> Callable[[], Any]:
        return lambda: nf.MicrobatchMeter(model, {}, group=group)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()

    in_parts = parallelize_module(net(), mesh, {"0": ColwiseParallel()})
    in_both = fully_shard(parallelize_module(net(), both["tp"], {"0": ColwiseParallel()}), mesh=both["dp"])
    sharded, flat = fully_shard(net()), FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    (batch,) = parts_of([[3], [3]])[rank]

    def outside() -> None:
        model = net()
        fully_shard(model[1], reshard_after_forward=True)
        fully_shard(model)
        measuring = nf.MicrobatchMeter(model, {}, group=dist.group.WORLD)
        value = (model(batch[0]) - batch[1]).square().mean()
        with measuring.step() as done:
            value.backward()
            done(size=3)

    def ignored() -> None:
        model = nn.Sequential(nn.Linear(3, 4), Distributed(), nn.Linear(4, 2, bias=False)).double()
        model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Shard(1)]))
        fully_shard(model, ignored_params={model[2].weight})
        model(batch[0]).square().mean().backward()  # .grad is there before the block
        measuring = nf.MicrobatchMeter(model, {}, group=dist.group.WORLD)
        with measuring.step() as done:
            model(batch[0]).square().mean().backward()
            done(size=3)

    class Distributed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return DTensor.from_local(x, mesh, run_check=False)

    return {
        "tensor parallel": error_of(meter(in_parts)),
        "tensor parallel and sharded": error_of(meter(in_both)),
        "another group": error_of(meter(sharded, alone)),
        "each for itself": error_of(meter(sharded, None)),
        "flat": error_of(meter(flat)),
        "examples, flat": error_of(lambda: nf.NoiseMeter(flat, {})),
        "examples": error_of(lambda: nf.NoiseMeter(sharded, {})),
        "forward pass outside": error_of(outside),
        "a parameter that is ignored": error_of(ignored),
    }


def work(rank: int) -> dict[str, Any]:
    """Go through all cases."""
    seen: dict[str, Any] = {}
    for (name, sizes), nested, reshard in itertools.product(SIZES.items(), (False, True), RESHARDS):
        parts = parts_of(sizes)[rank]
        seen[f"{name}, {nested=}, {reshard=}"] = run(parts, nested=nested, reshard_after_forward=reshard)
    parts = parts_of(SIZES["accumulated"])[rank]
    seen["replicated"] = replicated(parts)
    meshes = {shape: init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")) for shape in ((1, 2), (2, 1))}
    for shape, mesh in meshes.items():
        seen[f"mesh {shape}"] = run(parts, nested=True, mesh=mesh)
    seen["single precision"] = run([(x.float(), y.float()) for x, y in parts], nested=True, dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen["mixed precision"] = run(
        [(x.float(), y.float()) for x, y in parts], nested=True, dtype=torch.float32, mp_policy=policy
    )
    for in_shards in (False, True):
        seen[f"watched, {in_shards=}"] = watched(parts_of([[4], [4]])[rank], in_shards=in_shards)
    seen["refusals"] = refusals(rank)
    return seen

"""F12: training of networks with the optimizers of PyTorch, and Tr H of a network by formulas of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.forecasting import Forecast, forecast
from noetherflow.optimizers import SGD, AdamW
from noetherflow.paper.f12_measured import Measured
from noetherflow.simulation.stream import Sampler

# Examples whose Jacobian is held at a time.
_CHUNK = 200
Stack = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Task:
    """A network, its data, and the measure of Tr H.

    Args:
        model: A new network, from a seed.
        loss: `loss(model, batch)`, shape (B,).
        sample: Batches of new examples.
        given: The batches that a forecast sees, from a seed.
        trace: Tr H of the mean loss of a network; the seed is that of random vectors.
    """

    model: Callable[[int], nn.Module]
    loss: Loss
    sample: Sampler
    given: Callable[[int], list[Batch]]
    trace: Callable[[nn.Module, int], float]

    def starts(self, seeds: Sequence[int]) -> Stack:
        """New networks, stacked by parameter."""
        return stacked([self.model(seed) for seed in seeds])

    def network(self, stack: Stack, replica: int) -> nn.Module:
        """A network with the parameters of a replica."""
        model = self.model(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stack[name][replica])
        return model


@final
@dataclass(frozen=True)
class Trainer:
    """An optimizer of PyTorch with its settings, with the batch size.

    Args:
        kind: The class.
        lr: The learning rate.
        weight_decay: The weight decay.
        batch_size: Examples per step.
    """

    kind: type[torch.optim.SGD] | type[torch.optim.AdamW]
    lr: float
    weight_decay: float
    batch_size: int

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer."""
        return self.kind(parameters, lr=self.lr, weight_decay=self.weight_decay)

    @property
    def settings(self) -> SGD | AdamW:
        """The settings that a forecast takes."""
        rule = SGD if self.kind is torch.optim.SGD else AdamW
        return rule(self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay)


def stacked(models: Sequence[nn.Module]) -> Stack:
    """The parameters of networks of equal shape, stacked."""
    parameters = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([each[name].detach() for each in parameters]) for name in parameters[0]}


def train(
    task: Task,
    start: Stack,
    trainer: Trainer,
    steps: int,
    generator: torch.Generator,
    *,
    record: Sequence[int] = (),
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> list[Stack]:
    """Train replicas by `torch.optim.SGD` or `torch.optim.AdamW`, each with batches of its own.

    Both optimizers act on every entry by itself, so that stacked replicas are trained as each would be alone.

    Args:
        task: The network and the data.
        start: The parameters, shape (R, *parameter) by name.
        trainer: The optimizer.
        steps: The number of steps.
        generator: Of the batches.
        record: Steps before which the parameters are kept.
        schedule: Factor on the learning rate by step.

    Returns:
        The parameters at the recorded steps, and after the last step.
    """
    parameters = {name: nn.Parameter(stack.clone()) for name, stack in start.items()}
    model, size = task.model(0), trainer.batch_size
    replicas = len(next(iter(start.values())))
    optimizer = trainer.optimizer(parameters.values())

    def mean_loss(params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        def network(*inputs: Tensor, **named: Tensor) -> Tensor:
            outputs: Tensor = functional_call(model, dict(params), inputs, named)
            return outputs

        return task.loss(network, batch).mean()  # type: ignore[arg-type]  # a function in place of a module

    seen, recorded = [], set(record)
    for step in range(steps):
        if step in recorded:
            seen.append({name: stack.detach().clone() for name, stack in parameters.items()})
        for group in optimizer.param_groups:
            group["lr"] = trainer.lr * schedule(step)
        batch = tuple(part.unflatten(0, (replicas, size)) for part in task.sample(replicas * size, generator))
        optimizer.zero_grad()
        vmap(mean_loss)(parameters, batch).sum().backward()
        optimizer.step()
    return [*seen, {name: stack.detach().clone() for name, stack in parameters.items()}]


def compare(name: str, task: Task, start: Stack, trainer: Trainer, *, steps: int, records: int, seed: int) -> Measured:
    """Forecast every replica at the start, train on, and measure Tr H on the way; the end is the last 30 % of records.

    Args:
        name: The name of the problem.
        task: The network and the data.
        start: The parameters of all replicas.
        trainer: The optimizer.
        steps: The number of steps.
        records: The number of intervals between records, half of which are evenly spaced in the logarithm.
        seed: Of the batches and of the random vectors.

    Returns:
        The forecasts and the measurements.
    """
    forecasts = forecasts_of(task, start, trainer, seed)
    at, curves = curves_of(task, start, trainer, recorded_steps(steps, records), steps, seed)
    ends = curves[at >= 0.7 * steps].mean(0)
    return Measured.of(name, at, curves, ends, forecasts, lr=trainer.lr)


def forecasts_of(task: Task, start: Stack, trainer: Trainer, seed: int) -> list[Forecast]:
    """The forecast of every replica, each from data of its own."""
    seeds = range(len(next(iter(start.values()))))
    given = {k: task.given(seed + k) for k in seeds}
    # Detected once, because the symmetries are those of the architecture.
    symmetries = find_symmetries(task.network(start, 0), task.loss, given[0][0])
    return [
        forecast(task.network(start, k), task.loss, given[k], trainer.settings, symmetries, progress=False)
        for k in seeds
    ]


def curves_of(
    task: Task, start: Stack, trainer: Trainer, record: Sequence[int], steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The recorded steps with the last, shape (T,), and Tr H of every replica there, shape (T, R)."""
    stacks = train(task, start, trainer, steps, torch.Generator().manual_seed(seed + 1), record=record)
    seeds = range(len(next(iter(start.values()))))
    rows = [[task.trace(task.network(stack, k), seed + k) for k in seeds] for stack in stacks]
    return torch.tensor([*record, steps]), torch.tensor(rows, dtype=torch.float64)


def recorded_steps(steps: int, records: int) -> list[int]:
    """Steps below a number: half of them evenly spaced in the logarithm, half evenly spaced."""
    half = records // 2
    even = {round(steps * k / half) for k in range(half)}
    return sorted(even | {round(10 * (steps / 10) ** (k / half)) for k in range(half)})


def trace_by_jacobians(model: nn.Module, images: Tensor) -> float:
    r"""Tr H of the mean cross-entropy of a network that is piecewise linear in every single parameter.

    With the probabilities p and the gradients J_c of the logit c of an example, Tr H is the mean over examples of
    $\sum_c p_c |J_c|^2 - |\sum_c p_c J_c|^2$, which is the trace of the Gauss-Newton matrix.

    Args:
        model: The network.
        images: The inputs.

    Returns:
        The trace.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def logits(params: Stack, image: Tensor) -> Tensor:
        outputs: Tensor = functional_call(model, params, (image[None],))
        return outputs[0]

    total = 0.0
    for part in images.split(_CHUNK):
        p = vmap(logits, (None, 0))(parameters, part).softmax(1)
        for jacobian in vmap(jacrev(logits), (None, 0))(parameters, part).values():
            flat = jacobian.flatten(2)
            mean = torch.einsum("bc,bcn->bn", p, flat)
            total += float((p * flat.square().sum(2)).sum() - mean.square().sum())
    return total / len(images)


def trace_by_signs(model: nn.Module, loss: Loss, batch: Batch, vectors: int, seed: int) -> float:
    """Tr H of the mean loss of a batch, estimated by random signs: the mean of v H v (Hutchinson)."""
    parameters, generator = [*model.parameters()], torch.Generator().manual_seed(seed)
    gradient = torch.autograd.grad(loss(model, batch).mean(), parameters, create_graph=True)
    total = 0.0
    for _ in range(vectors):
        v = [torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1 for p in parameters]
        product = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        total += sum(float((a * b).sum()) for a, b in zip(v, product, strict=True))
    return total / vectors

"""Stepping: what turns settings into motion."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from noetherflow._optimizers import SGD
from noetherflow.simulation.dynamics import GradientFlow, Langevin, Schedule
from noetherflow.simulation.fused import Fused, ReplicaGradients
from noetherflow.simulation.stream import FullBatch, Minibatches

Tensors = Sequence[Tensor]


class Integrator(ABC):
    """The state of all replicas, and how it takes a step."""

    @property
    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """The parameters now, shape (R, *parameter) by name."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Take a step."""

    @abstractmethod
    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss before it of the examples that it saw, shape (R,)."""


@final
class GradientIntegrator(Integrator):
    """Motion by gradients: a state, and a map of state and inputs to the next state.

    The state is the parameters, then whatever else is carried along.

    Args:
        params: Stacked parameters at the start.
        carried: Further tensors of the state.
        step: Maps (*state, *inputs) to (mean losses, *state).
        inputs: What the map is fed at a step.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        carried: Tensors,
        step: Callable[..., tuple[Tensor, ...]],
        inputs: Callable[[int], Tensors],
    ) -> None:
        self._names = list(params)
        # The record of a step holds for tensors that lie in memory as those of the first step did.
        self._state: tuple[Tensor, ...] = tuple(tensor.contiguous() for tensor in (*params.values(), *carried))
        self._step = Fused(step)
        self._inputs = inputs

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters now, shape (R, *parameter) by name."""
        return dict(zip(self._names, self._state, strict=False))

    def advance(self, step: int) -> None:
        """Take a step."""
        self._state = self._step.rest(*self._state, *self._inputs(step))

    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss before it of the examples that it saw, shape (R,)."""
        means, *state = self._step(*self._state, *self._inputs(step))
        self._state = tuple(state)
        return means


def by_steps(
    params: dict[str, Tensor],
    gradients: ReplicaGradients,
    sgd: SGD,
    source: Minibatches | FullBatch,
    schedule: Schedule | None,
) -> Integrator:
    """Steps of `torch.optim.SGD`, on minibatches or on the whole data set."""
    count, first = len(params), next(iter(params.values()))
    weights = first.new_full((len(first), source.size), 1 / source.size)
    velocity = [torch.zeros_like(tensor) for tensor in params.values()] if sgd.momentum else []
    carried = count + len(velocity)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, velocity = tensors[:count], tensors[count:carried]
        rate, leaves = (tensors[carried], tensors[carried + 1 :]) if schedule else (None, tensors[carried:])
        pushes, means = gradients(theta, weights, leaves, shared=source.shared)
        if sgd.weight_decay:
            pushes = [push.add(p, alpha=sgd.weight_decay) for p, push in zip(theta, pushes, strict=True)]
        if velocity:
            pushes = [sgd.momentum * v + push for v, push in zip(velocity, pushes, strict=True)]
        if rate is None:
            moved = [p.sub(push, alpha=sgd.lr) for p, push in zip(theta, pushes, strict=True)]
        else:
            moved = [p - rate * push for p, push in zip(theta, pushes, strict=True)]
        return (means, *moved, *(pushes if velocity else ()))

    def inputs(step: int) -> Tensors:
        return (first.new_tensor(sgd.lr * schedule(step)), *source.next()) if schedule else source.next()

    return GradientIntegrator(params, velocity, step, inputs)


def by_flow(
    params: dict[str, Tensor], gradients: ReplicaGradients, flow: GradientFlow, source: FullBatch
) -> Integrator:
    """The classical Runge-Kutta method on gradient flow."""
    count, first = len(params), next(iter(params.values()))
    weights = first.new_full((len(first), source.size), 1 / source.size)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, leaves = tensors[:count], tensors[count:]

        def slope(at: Tensors) -> tuple[Tensors, Tensor]:
            found, means = gradients(at, weights, leaves, shared=True)
            return [-g - flow.weight_decay * p for g, p in zip(found, at, strict=True)], means

        def ahead(slopes: Tensors, time: float) -> Tensors:
            return [p + time * s for p, s in zip(theta, slopes, strict=True)]

        one, means = slope(theta)
        two, _ = slope(ahead(one, flow.dt / 2))
        three, _ = slope(ahead(two, flow.dt / 2))
        four, _ = slope(ahead(three, flow.dt))
        mixed = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(one, two, three, four, strict=True)]
        return (means, *ahead(mixed, flow.dt))

    return GradientIntegrator(params, (), step, lambda _: source.next())


def by_diffusion(
    params: dict[str, Tensor],
    gradients: ReplicaGradients,
    dynamics: Langevin,
    source: FullBatch,
    generator: torch.Generator,
) -> Integrator:
    """Euler-Maruyama steps, drift and noise from one weighted gradient."""
    count, first = len(params), next(iter(params.values()))
    dt, sgd = dynamics.time_step, dynamics.sgd
    amplitude = (2 * sgd.temperature * dt / source.size) ** 0.5

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, (weights, *leaves) = tensors[:count], tensors[count:]
        moves, means = gradients(theta, weights, leaves, shared=True)
        return (means, *(p - move - 2 * sgd.gamma * dt * p for p, move in zip(theta, moves, strict=True)))

    def inputs(step: int) -> Tensors:
        shape = (len(first), source.size)
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        # Equal weights make the gradient, centred normal weights the noise.
        weights = dt / source.size + amplitude * (normal - normal.mean(1, keepdim=True))
        return (weights.to(first), *source.next())

    return GradientIntegrator(params, (), step, inputs)

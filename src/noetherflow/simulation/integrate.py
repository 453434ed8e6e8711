"""Integrators: steps of SGD, of gradient flow and of its diffusion, for all replicas at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from noetherflow.optimizers import SGD
from noetherflow.optimizers.by_parameter import value_of
from noetherflow.simulation.dynamics import GradientFlow, Langevin, Schedule
from noetherflow.simulation.fused import Fused, ReplicaGradients
from noetherflow.simulation.stream import FullBatch, Minibatches

Tensors = Sequence[Tensor]


class Integrator(ABC):
    """The state of all replicas and the rule of a step."""

    @property
    @abstractmethod
    def params(self) -> dict[str, Tensor]:
        """The parameters at present, shape (R, *parameter) by name."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Take a step."""

    @abstractmethod
    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss of the step's examples before the update, shape (R,)."""

    @property
    def second_moments(self) -> dict[str, Tensor]:
        """Averages of squares of gradients, shape (R, *parameter) by name; empty for an optimizer that keeps none."""
        return {}


@final
class GradientIntegrator(Integrator):
    """An integrator whose step is a function of tensors, and therefore can be recorded.

    Args:
        params: Stacked parameters at the start, shape (R, *parameter) by name.
        carried: Further tensors of the state, such as momentum.
        step: Maps (*params, *carried, *inputs) to (mean losses, *params, *carried).
        inputs: The inputs of a step as a function of its number.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        carried: Tensors,
        step: Callable[..., tuple[Tensor, ...]],
        inputs: Callable[[int], Tensors],
    ) -> None:
        self._names = list(params)
        # The recorded graph is valid for the strides of the first step, and later steps return contiguous tensors.
        self._state: tuple[Tensor, ...] = tuple(tensor.contiguous() for tensor in (*params.values(), *carried))
        self._step = Fused(step)
        self._inputs = inputs

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters at present, shape (R, *parameter) by name."""
        return dict(zip(self._names, self._state, strict=False))

    @property
    def carried(self) -> Tensors:
        """The further tensors of the state at present."""
        return self._state[len(self._names) :]

    def advance(self, step: int) -> None:
        """Take a step."""
        self._state = self._step.rest(*self._state, *self._inputs(step))

    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss of the step's examples before the update, shape (R,)."""
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
    """Steps of `torch.optim.SGD`, on minibatches or on all examples."""
    count, first = len(params), next(iter(params.values()))
    weights = first.new_full((len(first), source.size), 1 / source.size)
    velocity = [torch.zeros_like(tensor) for tensor in params.values()] if sgd.momentum else []
    carried = count + len(velocity)
    decays, rates = [2 * sgd.gamma_of(name) for name in params], [value_of(sgd.lr, name, "lr") for name in params]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, velocity = tensors[:count], tensors[count:carried]
        rate, leaves = (tensors[carried], tensors[carried + 1 :]) if schedule else (None, tensors[carried:])
        pushes, means = gradients(theta, weights, leaves, shared=source.shared)
        if any(decays):
            pushes = [push.add(p, alpha=decay) for p, push, decay in zip(theta, pushes, decays, strict=True)]
        if velocity:
            pushes = [sgd.momentum * v + push for v, push in zip(velocity, pushes, strict=True)]
        if rate is None:
            moved = [p.sub(push, alpha=lr) for p, push, lr in zip(theta, pushes, rates, strict=True)]
        else:
            moved = [p - lr * push for p, push, lr in zip(theta, pushes, rate, strict=True)]
        return (means, *moved, *(pushes if velocity else ()))

    def inputs(step: int) -> Tensors:
        return (first.new_tensor(rates) * schedule(step), *source.next()) if schedule else source.next()

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
            of_loss, means = gradients(at, weights, leaves, shared=True)
            return [-g - flow.weight_decay * p for g, p in zip(of_loss, at, strict=True)], means

        def ahead(slopes: Tensors, time: float) -> Tensors:
            return [p + time * s for p, s in zip(theta, slopes, strict=True)]

        k1, means = slope(theta)
        k2, _ = slope(ahead(k1, flow.dt / 2))
        k3, _ = slope(ahead(k2, flow.dt / 2))
        k4, _ = slope(ahead(k3, flow.dt))
        mean_slopes = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)]
        return (means, *ahead(mean_slopes, flow.dt))

    return GradientIntegrator(params, (), step, lambda _: source.next())


def by_diffusion(
    params: dict[str, Tensor],
    gradients: ReplicaGradients,
    dynamics: Langevin,
    source: FullBatch,
    generator: torch.Generator,
) -> Integrator:
    r"""Euler-Maruyama steps of the diffusion limit.

    The gradient of $\sum_i w_i \ell_i$ with $w_i = dt/N + (2 \sigma^2 dt / N)^{1/2} (\xi_i - \bar\xi)$ is drift and
    noise together.

    Returns:
        The integrator.
    """
    count, first = len(params), next(iter(params.values()))
    dt, sgd = dynamics.time_step, dynamics.sgd
    decays = [2 * sgd.gamma_of(name) * dt for name in params]
    amplitude = (2 * sgd.temperature * dt / source.size) ** 0.5

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, (weights, *leaves) = tensors[:count], tensors[count:]
        moves, means = gradients(theta, weights, leaves, shared=True)
        return (means, *(p - move - decay * p for p, move, decay in zip(theta, moves, decays, strict=True)))

    def inputs(step: int) -> Tensors:
        shape = (len(first), source.size)
        normal = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        # Centred, so that the noise has the covariance of gradients about their mean.
        weights = dt / source.size + amplitude * (normal - normal.mean(1, keepdim=True))
        return (weights.to(first), *source.next())

    return GradientIntegrator(params, (), step, inputs)

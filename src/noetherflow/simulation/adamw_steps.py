"""Steps of AdamW for all replicas at once, with the averages of gradients and of squares of gradients."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from noetherflow.optimizers import AdamW
from noetherflow.simulation.dynamics import Schedule
from noetherflow.simulation.fused import ReplicaGradients
from noetherflow.simulation.integrate import GradientIntegrator, Integrator
from noetherflow.simulation.stream import Minibatches


@final
class AdamWIntegrator(Integrator):
    """Steps of `torch.optim.AdamW`, or of `torch.optim.Adam` if the weight decay is not decoupled.

    Args:
        params: Stacked parameters at the start, shape (R, *parameter) by name.
        gradients: Gradients and mean losses of all replicas.
        adamw: The settings, with the names of the parameters.
        source: The minibatches.
        schedule: Factor on the learning rate as a function of the step, or None.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        gradients: ReplicaGradients,
        adamw: AdamW,
        source: Minibatches,
        schedule: Schedule | None,
    ) -> None:
        self._taken = 0
        self._betas = [adamw.betas_of(name) for name in params]
        settings = [(adamw.lr_of(name), *adamw.betas_of(name), adamw.decay_of(name)) for name in params]
        step, first = _step(params, gradients, adamw, source), next(iter(params.values()))

        def inputs(step: int) -> list[Tensor]:
            factor, taken = schedule(step) if schedule else 1.0, self._taken + 1
            # By parameter: the factor of a decoupled decay, the step size, and the root of the correction of squares.
            numbers = [
                (1 - factor * lr * decay, factor * lr / (1 - beta**taken), (1 - beta_of_squares**taken) ** 0.5)
                for lr, beta, beta_of_squares, decay in settings
            ]
            return [first.new_tensor(numbers), *source.next()]

        # A tensor of its own for every average: a recorded graph takes a tensor that is given twice as a single input.
        zeros = [torch.zeros_like(stack) for _ in range(2) for stack in params.values()]
        self._steps = GradientIntegrator(params, zeros, step, inputs)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters at present, shape (R, *parameter) by name."""
        return self._steps.params

    @property
    def second_moments(self) -> dict[str, Tensor]:
        """Bias-corrected averages of squares of gradients, shape (R, *parameter) by name; zero before a step."""
        names = list(self.params)
        averages = self._steps.carried[len(names) :]
        corrections = [1 - square**self._taken if self._taken else 1.0 for _, square in self._betas]
        return {name: v / factor for name, v, factor in zip(names, averages, corrections, strict=True)}

    def advance(self, step: int) -> None:
        """Take a step."""
        self._steps.advance(step)
        self._taken += 1

    def advance_watched(self, step: int) -> Tensor:
        """Take a step; returns the mean loss of the step's examples before the update, shape (R,)."""
        means = self._steps.advance_watched(step)
        self._taken += 1
        return means


def _step(
    params: dict[str, Tensor], gradients: ReplicaGradients, adamw: AdamW, source: Minibatches
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a step: (*params, *averages, *averages of squares, numbers, *batch) to (losses, *state)."""
    names, first = list(params), next(iter(params.values()))
    count = len(names)
    weights = first.new_full((len(first), source.size), 1 / source.size)
    betas, decays = [adamw.betas_of(name) for name in names], [adamw.decay_of(name) for name in names]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        theta, averages, squares = (tensors[k * count : (k + 1) * count] for k in range(3))
        numbers, leaves = tensors[3 * count], tensors[3 * count + 1 :]
        shrinks, rates, roots = numbers.unbind(1)
        pushes, means = gradients(theta, weights, leaves, shared=source.shared)
        moved, means_of_gradients, means_of_squares = [], [], []
        for k, (p, push, (beta, beta_of_squares)) in enumerate(zip(theta, pushes, betas, strict=True)):
            if decays[k] and not adamw.decoupled:
                push = push.add(p, alpha=decays[k])
            average = averages[k].lerp(push, 1 - beta)
            square = (beta_of_squares * squares[k]).addcmul(push, push, value=1 - beta_of_squares)
            kept = p * shrinks[k] if decays[k] and adamw.decoupled else p
            moved.append(kept - rates[k] * average / (square.sqrt() / roots[k] + adamw.eps))
            means_of_gradients.append(average)
            means_of_squares.append(square)
        return (means, *moved, *means_of_gradients, *means_of_squares)

    return step

"""Two linear layers whose replicas have different data distributions, for the experiments F3, F4, F7 and F9.

A `World` is a data distribution with the settings of a step. `LinearPair` holds the numbers of a `World` as parameters,
so that `simulate` runs replicas of different worlds in one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._types import Params
from noetherflow.linear import TwoLayer
from noetherflow.paper.measure import geometric
from noetherflow.simulation.stream import Sampler
from noetherflow.symmetry import Axis, MatrixSymmetry

ROTATION = {"hidden": MatrixSymmetry(plus=(Axis("w", 0),), minus=(Axis("u", 1),))}


@final
class LinearPair(nn.Module):
    r"""The loss $c\,(|U W x - y|^2 + \gamma\,(|U|^2 + |W|^2))$ with $y = V x + \epsilon$, for diagonal covariances.

    V, the covariances, c and gamma are parameters whose gradient is zero (`detach`). `simulate` stacks parameters over
    replicas, so that V, the covariances, c and gamma may differ between replicas. The factor c multiplies the learning
    rate.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape, dtype=torch.float64))

        self.w, self.u = parameter(hidden, inputs), parameter(outputs, hidden)
        self.target = parameter(outputs, inputs)
        self.input_scale, self.noise_scale = parameter(inputs), parameter(outputs)
        self.rate, self.gamma = parameter(), parameter()

    def forward(self, standard: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of each example, shape (B,), from standard normal inputs (B, inputs) and label noise (B, outputs)."""
        inputs, noise = standard
        x = inputs * self.input_scale.detach()
        y = x @ self.target.detach().mT + noise * self.noise_scale.detach()
        error = x @ self.w.mT @ self.u.mT - y
        decay = self.gamma.detach() * (self.u.square().sum() + self.w.square().sum())
        return self.rate.detach() * (error.square().sum(-1) + decay)


@final
@dataclass(frozen=True)
class World:
    r"""A data distribution $y = V x + \epsilon$ with diagonal covariances, and the step settings of a replica.

    Args:
        target: V, shape (outputs, inputs).
        input_variances: Diagonal of $\Sigma_x$, shape (inputs,).
        noise_variances: Diagonal of $\Sigma_\epsilon$, shape (outputs,).
        rate: Factor c of the learning rate.
        gamma: Weight decay $\gamma$ of the term $\gamma |\theta|^2$, half of PyTorch's `weight_decay`.
    """

    target: Tensor
    input_variances: Tensor
    noise_variances: Tensor
    rate: float = 1.0
    gamma: float = 0.0

    @property
    def input_cov(self) -> Tensor:
        r"""$\Sigma_x$, shape (inputs, inputs)."""
        return self.input_variances.diag()

    @property
    def noise_cov(self) -> Tensor:
        r"""$\Sigma_\epsilon$, shape (outputs, outputs)."""
        return self.noise_variances.diag()

    def constants(self) -> dict[str, Tensor]:
        """The parameters of `LinearPair` that SGD does not change, by name."""
        return {
            "target": self.target,
            "input_scale": self.input_variances.sqrt(),
            "noise_scale": self.noise_variances.sqrt(),
            "rate": torch.tensor(self.rate, dtype=torch.float64),
            "gamma": torch.tensor(self.gamma, dtype=torch.float64),
        }


def rank_one(
    inputs: int, outputs: int, *, length: float, input_ends: Sequence[float], noise_ends: Sequence[float]
) -> World:
    """World with constant V of Frobenius norm `length` and geometric variances between the given ends."""
    target = torch.full((outputs, inputs), length / (inputs * outputs) ** 0.5, dtype=torch.float64)
    return World(target, geometric(input_ends, inputs), geometric(noise_ends, outputs))


def replicated(replicas: Sequence[tuple[World, TwoLayer]]) -> dict[str, Tensor]:
    """Stack worlds and weights to parameters of shape (replicas, ...), the start of a simulation."""
    rows = [world.constants() | {"u": weights.u, "w": weights.w} for world, weights in replicas]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def weights_of(params: Params) -> TwoLayer:
    """U and W from the parameters of `LinearPair`."""
    return TwoLayer(params["u"], params["w"])


def standard_normal(inputs: int, outputs: int) -> Sampler:
    """Sampler of standard normal inputs (count, inputs) and label noise (count, outputs) for `LinearPair`."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.randn(count, inputs + outputs, generator=generator, dtype=torch.float64)
        return both[:, :inputs], both[:, inputs:]

    return sample


def population(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Data set without label noise and with second moment 1 of the inputs: its full gradient is the population's."""
    return inputs**0.5 * torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, outputs, dtype=torch.float64)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of each example, shape (B,): the model computes the loss itself."""
    values: Tensor = model(batch)
    return values

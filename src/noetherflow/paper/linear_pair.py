"""Two linear layers in many worlds at once: the ground of several experiments."""

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

    V, the covariances, c and gamma are dials: parameters that no gradient reaches, so that every replica of a
    simulation can live in a world of its own. The factor c multiplies the learning rate.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()

        def filled(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape, dtype=torch.float64))

        self.w, self.u = filled(hidden, inputs), filled(outputs, hidden)
        self.target, self.input_scale, self.noise_scale = filled(outputs, inputs), filled(inputs), filled(outputs)
        self.rate, self.gamma = filled(), filled()

    def forward(self, standard: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of every example, shape (B,), from standard normal inputs and label noises."""
        inputs, noise = standard
        x = inputs * self.input_scale.detach()
        y = x @ self.target.detach().mT + noise * self.noise_scale.detach()
        error = x @ self.w.mT @ self.u.mT - y
        decay = self.gamma.detach() * (self.u.square().sum() + self.w.square().sum())
        return self.rate.detach() * (error.square().sum(-1) + decay)


@final
@dataclass(frozen=True)
class World:
    """A target, the variances of inputs and label noises, and what one replica's steps are like.

    Args:
        target: V, shape (outputs, inputs).
        input_variances: Diagonal of the input covariance.
        noise_variances: Diagonal of the covariance of the label noise.
        rate: Factor on the learning rate.
        gamma: Weight decay as the theory writes it.
    """

    target: Tensor
    input_variances: Tensor
    noise_variances: Tensor
    rate: float = 1.0
    gamma: float = 0.0

    @property
    def input_cov(self) -> Tensor:
        """Shape (inputs, inputs)."""
        return self.input_variances.diag()

    @property
    def noise_cov(self) -> Tensor:
        """Shape (outputs, outputs)."""
        return self.noise_variances.diag()

    def dials(self) -> dict[str, Tensor]:
        """As parameters of `LinearPair`."""
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
    """A target of rank one in which every input and output counts alike, among geometric variances."""
    target = torch.full((outputs, inputs), length / (inputs * outputs) ** 0.5, dtype=torch.float64)
    return World(target, geometric(input_ends, inputs), geometric(noise_ends, outputs))


def replicated(replicas: Sequence[tuple[World, TwoLayer]]) -> dict[str, Tensor]:
    """The start of a simulation: one replica per world and weights."""
    rows = [world.dials() | {"u": weights.u, "w": weights.w} for world, weights in replicas]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def weights_of(params: Params) -> TwoLayer:
    """The weights of both layers."""
    return TwoLayer(params["u"], params["w"])


def standard_normal(inputs: int, outputs: int) -> Sampler:
    """A stream of examples for `LinearPair`."""

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.randn(count, inputs + outputs, generator=generator, dtype=torch.float64)
        return both[:, :inputs], both[:, inputs:]

    return sample


def population(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A data set without noise whose second moment is exactly the identity: its full gradient is the population's."""
    return inputs**0.5 * torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, outputs, dtype=torch.float64)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of every example."""
    values: Tensor = model(batch)
    return values

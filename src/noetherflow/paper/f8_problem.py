"""F8: the settings, the data distribution, the networks and their initialisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from noetherflow.linear import deep_noise
from noetherflow.paper.measure import geometric


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    depths: tuple[int, ...] = (3, 4, 5)
    width: int = 4
    condition: float = 5.0
    label_noise: float = 0.5
    lr: float = 0.005
    batch_size: int = 1
    warmup_steps: int = 20_000
    steps: int = 200_000
    cool_steps: int = 4_000
    replicas: int = 8
    spare_rank: int = 2
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(depths=(3,), lr=0.01, steps=40_000, warmup_steps=8_000, replicas=6)


@final
class Problem(NamedTuple):
    r"""The data distribution $y = V x + \epsilon$.

    Args:
        target: V, shape (outputs, inputs).
        input_root: $\Sigma_x^{1/2}$, shape (inputs, inputs).
        noise_root: $\Sigma_\epsilon^{1/2}$, shape (outputs, outputs).
    """

    target: Tensor
    input_root: Tensor
    noise_root: Tensor

    @property
    def covariances(self) -> tuple[Tensor, Tensor]:
        r"""$\Sigma_x$ and $\Sigma_\epsilon$."""
        return self.input_root @ self.input_root, self.noise_root @ self.noise_root

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw examples x of shape (count, inputs) and y of shape (count, outputs)."""
        x, noise = torch.randn(2, count, len(self.target), generator=generator, dtype=torch.float64)
        x = x @ self.input_root
        return x, x @ self.target.mT + noise @ self.noise_root

    def population(self) -> tuple[Tensor, Tensor]:
        """Data set without label noise whose input covariance is exact: its full gradient is the population's."""
        x = len(self.target) ** 0.5 * self.input_root
        return x, x @ self.target.mT

    def imbalance(self, weights: Sequence[Tensor]) -> Tensor:
        """Largest |N+ - N-| / (|N+| + |N-|) over the balance equations, shape ()."""
        sides = deep_noise(weights, *self.covariances)
        return torch.stack(
            [torch.linalg.norm(a - b) / (torch.linalg.norm(a) + torch.linalg.norm(b)) for a, b in sides]
        ).max()


def make_problem(config: Config, generator: torch.Generator) -> Problem:
    """Draw V of full rank and covariances of a given condition number with random eigenvectors."""

    def root() -> Tensor:
        basis = torch.linalg.qr(normal(config.width, config.width, generator=generator)).Q
        return (basis * geometric((config.condition**-0.25, config.condition**0.25), config.width)) @ basis.mT

    target = normal(config.width, config.width, generator=generator) / config.width**0.5
    # Small singular values take many steps to fit: raise them to 0.4.
    left, values, right = torch.linalg.svd(target)
    target = (left * values.clamp_min(0.4)) @ right
    return Problem(target, root(), config.label_noise * root())


def kaiming(config: Config, depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the weights of all layers with variance 1 / width, shape (replicas, width, width) each."""
    scale = (1 / config.width) ** 0.5
    shape = config.replicas, config.width, config.width
    return {f"{layer}.weight": scale * normal(*shape, generator=generator) for layer in range(depth)}


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(width: int, depth: int) -> nn.Sequential:
    """Linear layers of equal width without bias, float64."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(depth)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of each example, shape (B,)."""
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)

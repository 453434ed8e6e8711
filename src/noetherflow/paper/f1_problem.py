"""F1: the settings, the scale-invariant loss, and the examples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow.symmetry import Axis, ScalarSymmetry

LENGTH = {"length": ScalarSymmetry(plus=(Axis("theta", 0),))}


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    lr: float = 0.05
    batch_size: int = 1
    steps: int = 20_000
    replicas: int = 64
    mean: float = 1.0
    variances: tuple[float, ...] = (4.0, 1.0)
    angle: float = 2.0
    weight_decay: float = 2e-3
    decay_starts: tuple[float, ...] = (0.7, 3.0)
    flow_time: float = 20.0
    kick_batch_size: int = 8
    kick_mean: float = 3.0
    kicks: int = 200_000
    identity_steps: int = 200
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(steps=8_000, replicas=48, weight_decay=6e-3, kicks=50_000)


@final
class Direction(nn.Module):
    r"""The loss $-z \cdot \theta / |\theta|$, which depends only on the direction of $\theta$."""

    def __init__(self) -> None:
        """Create theta, shape (2,); every simulation replaces the initial value."""
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """Loss of each example z, shapes (B, 2) -> (B,)."""
        return -(z @ self.theta) / self.theta.norm()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Loss of each example: the model computes the loss itself."""
    values: Tensor = model(batch)
    return values


def stream(mean: float, variances: tuple[float, ...]) -> Callable[[int, torch.Generator], Tensor]:
    """Sampler of Gaussian examples z, shape (count, 2), with mean (mean, 0) and diagonal covariance."""
    centre = torch.tensor([mean, 0.0], dtype=torch.float64)
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return centre + scale * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    return sample


def two_points(mean: float) -> Tensor:
    """Two examples with mean (mean, 0): the loss is linear in z, so gradient flow depends on the mean alone."""
    return torch.tensor([[mean, 1.0], [mean, -1.0]], dtype=torch.float64)


def point(length: float, angle: float) -> Tensor:
    """Point of the plane in polar coordinates, shape (2,); the angle is in radians."""
    return length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def replicas(point: Tensor, count: int) -> dict[str, Tensor]:
    """Parameters of `count` replicas at a point, shape (count, 2)."""
    return {"theta": point.expand(count, -1).clone()}

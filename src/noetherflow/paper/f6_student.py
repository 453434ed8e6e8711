"""F6: the settings, the student network with its teacher and data distribution, and the initialisation."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow.paper.measure import geometric

WORLDS = ("isotropic", "anisotropic")


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 6
    hidden: int = 8
    outputs: int = 6
    scale: float = 0.3
    saturating_scale: float = 2.0
    condition: float = 10.0
    lr: float = 0.02
    batch_size: int = 1
    steps: int = 40_000
    descent_lr: float = 0.1
    descent_steps: int = 4_000
    descent_examples: int = 2_048
    weight_decay: float = 0.02
    replicas: int = 16
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(lr=0.03, steps=16_000, descent_examples=256, descent_steps=2_000)


@final
class Student(nn.Module):
    """A tanh network against a tanh teacher with label noise.

    The teacher and the square roots of the covariances are parameters whose gradient is zero (`detach`). `simulate`
    stacks parameters over replicas, so that teacher and covariances may differ between replicas.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape, dtype=torch.float64))

        self.w, self.u = parameter(config.hidden, config.inputs), parameter(config.outputs, config.hidden)
        self.inner, self.outer = parameter(config.hidden, config.inputs), parameter(config.outputs, config.hidden)
        self.input_root = parameter(config.inputs, config.inputs)
        self.noise_root = parameter(config.outputs, config.outputs)

    def forward(self, standard: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of each example, shape (B,), from standard normal inputs (B, inputs) and label noise (B, outputs)."""
        x = standard[0] @ self.input_root.detach()
        y = torch.tanh(x @ self.inner.detach().mT) @ self.outer.detach().mT + standard[1] @ self.noise_root.detach()
        return (torch.tanh(x @ self.w.mT) @ self.u.mT - y).square().sum(-1)


def start(config: Config, condition: float, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a student, a teacher and covariances for each replica."""

    def layer(rows: int, columns: int) -> Tensor:
        return normal(config.replicas, rows, columns, generator=generator) / columns**0.5

    def root(size: int) -> Tensor:
        basis = torch.linalg.qr(normal(config.replicas, size, size, generator=generator)).Q
        return (basis * geometric((condition**-0.25, condition**0.25), size)) @ basis.mT

    inner, outer = (config.hidden, config.inputs), (config.outputs, config.hidden)
    return {
        "w": layer(*inner),
        "u": layer(*outer),
        # With an orthonormal outer layer of the teacher, anisotropy comes from the data alone.
        "inner": layer(*inner),
        "outer": torch.linalg.qr(layer(config.hidden, config.outputs)).Q.mT,
        "input_root": scale * root(config.inputs),
        "noise_root": root(config.outputs),
    }


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)

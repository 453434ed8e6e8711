"""F3: the settings, and the predicted ratios of norms and of sharpness."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow.linear import noise_factors
from noetherflow.optimizers import SGD
from noetherflow.paper.linear_pair import World


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    width: int = 10
    hidden: int = 2
    phis: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    label_noises: tuple[float, ...] = (1.0, 6.0)
    small: float = 0.1
    batch_size: int = 16
    lr_times_trace: float = 0.15
    weight_decay: float = 0.002
    descent_weight_decay: float = 0.1
    steps: int = 40_000
    descent_steps: int = 10_000
    cool_steps: int = 3_000
    replicas: int = 8
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(replicas=4, steps=16_000, phis=(0.2, 0.5, 1.0, 2.0, 5.0, 10.0))

    def world(self, phi: float, label_noise: float, weight_decay: float) -> World:
        r"""The data distribution with input variance $\phi$ and label noise $p_e$, and the settings of the step."""
        inputs, outputs = (torch.ones(self.width, dtype=torch.float64) for _ in range(2))
        inputs[: self.hidden], outputs[: self.hidden] = phi, label_noise
        target = torch.zeros(self.width, self.width, dtype=torch.float64)
        target[: self.hidden, : self.hidden] = torch.eye(self.hidden, dtype=torch.float64)
        rate = self.lr_times_trace / inputs.sum().item()
        return World(target, inputs, outputs, rate=rate, gamma=SGD(rate, self.batch_size, weight_decay).gamma)


def predicted_ratios(
    config: Config, weight_decay: float, *, phis: list[float] | None = None, swapped: bool = False
) -> Tensor:
    """|U|^2 / |W|^2 at the equilibrium, shape (label noises, phis); `swapped` exchanges the trace factors."""
    rows = []
    for noise in config.label_noises:
        for phi in phis or config.phis:
            world = config.world(phi, noise, weight_decay)
            sgd = SGD(world.rate, config.batch_size, weight_decay)
            gamma_u, gamma_w = (factor[0, 0].item() for factor in noise_factors(world.input_cov, world.noise_cov))
            if swapped:
                traces = (world.noise_variances.sum() / world.input_variances.sum()).item()
                gamma_u, gamma_w = gamma_u * traces, gamma_w / traces
            decay, noisy = 4 * sgd.gamma, 2 * sgd.temperature
            rows.append((decay + noisy * gamma_w) / (decay + noisy * gamma_u))
    return torch.tensor(rows, dtype=torch.float64).reshape(len(config.label_noises), -1)


def predicted_sharpening(config: Config, label_noise: float, phis: list[float] | None = None) -> Tensor:
    """Sharpness of the noise equilibrium over that of balanced norms, shape (phis,)."""
    changes = []
    for phi in phis or config.phis:
        world = config.world(phi, label_noise, 0.0)
        g, f = (config.width * v[0] / v.sum() for v in (world.input_variances, world.noise_variances))
        changes.append(torch.cosh(f.log() / 2) / torch.cosh(g.log() / 2))
    return torch.stack(changes)

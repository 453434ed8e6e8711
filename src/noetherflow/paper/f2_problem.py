"""F2: the settings, the data distribution with its predicted equilibrium, and the initialisations."""

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from noetherflow._types import Params
from noetherflow.linear import TwoLayer, noise_factors, two_layer_equilibrium, two_layer_noise
from noetherflow.symmetry import Axis, MatrixSymmetry

INNER, OUTER = "0.weight", "1.weight"
ROTATION = {"hidden": MatrixSymmetry(plus=(Axis(INNER, 0),), minus=(Axis(OUTER, 1),))}
INITS = ("small", "Kaiming", "2U, W/2", "U/4, 4W")


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 32
    outputs: int = 28
    hidden: int = 4
    input_variances: tuple[float, ...] = (0.3, 3.0)
    noise_variances: tuple[float, ...] = (0.1, 4.0)
    singular_values: tuple[float, ...] = (1.5, 0.7)
    corner: int = 12
    lr: float = 0.01
    batch_size: int = 32
    steps: int = 40_000
    fit_steps: int = 2_000
    cool_steps: int = 4_000
    replicas: int = 8
    small: float = 0.02
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(lr=0.02, steps=10_000, fit_steps=1_000, cool_steps=2_000, replicas=4)

    def replicas_of(self, index: int) -> slice:
        """The replicas of initialisation `INITS[index]`."""
        return slice(index * self.replicas, (index + 1) * self.replicas)


@final
class Problem(NamedTuple):
    r"""The data distribution $y = V x + \epsilon$, a balanced minimum UW = V, and the predicted equilibrium.

    Args:
        target: V, shape (outputs, inputs).
        input_cov: Diagonal, shape (inputs, inputs).
        noise_cov: Diagonal, shape (outputs, outputs).
        minimum: U and W with $U^T U = W W^T$.
        equilibrium: U and W of the noise equilibrium, from `two_layer_equilibrium`.
    """

    target: Tensor
    input_cov: Tensor
    noise_cov: Tensor
    minimum: TwoLayer
    equilibrium: TwoLayer

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw examples x of shape (count, inputs) and y of shape (count, outputs)."""
        x = self.input_cov.diagonal().sqrt() * torch.randn(
            count, len(self.input_cov), generator=generator, dtype=torch.float64
        )
        noise = torch.randn(count, len(self.noise_cov), generator=generator, dtype=torch.float64)
        return x, x @ self.target.mT + self.noise_cov.diagonal().sqrt() * noise

    def population(self) -> tuple[Tensor, Tensor]:
        """Data set without label noise whose input covariance is exact: its full gradient is the population's."""
        x = (len(self.input_cov) * self.input_cov).sqrt()
        return x, x @ self.target.mT

    def imbalance(self, params: Params) -> Tensor:
        r"""$I/n$ with $n = |U^T \Gamma_U U| + |W \Gamma_W W^T|$, shape (hidden, hidden)."""
        weights = TwoLayer(params[OUTER], params[INNER])
        plus, minus = two_layer_noise(
            weights, noise_factors(self.input_cov, self.noise_cov, weights.u @ weights.w - self.target)
        )
        return (plus - minus) / (torch.linalg.norm(plus) + torch.linalg.norm(minus))

    def error(self, weights: TwoLayer, reference: TwoLayer | None = None) -> Tensor:
        r"""Mean relative distance of $W^T W$ and $U U^T$ from those of the reference (by default the equilibrium).

        $W^T W$ and $U U^T$ do not change when the hidden units are rotated.

        Returns:
            The distance, shape (...) for weights of shape (..., rows, columns).
        """
        reference = reference or self.equilibrium
        inner, outer = weights.w.mT @ weights.w, weights.u @ weights.u.mT
        inner_0, outer_0 = reference.w.mT @ reference.w, reference.u @ reference.u.mT
        distances = (
            torch.linalg.norm(inner - inner_0) / torch.linalg.norm(inner_0),
            torch.linalg.norm(outer - outer_0) / torch.linalg.norm(outer_0),
        )
        return (distances[0] + distances[1]) / 2


def make_problem(config: Config, generator: torch.Generator) -> Problem:
    """Draw V of rank `hidden`, with rows in the noisiest outputs and columns in the inputs of least variance."""

    def geometric(ends: tuple[float, ...], count: int) -> Tensor:
        return torch.logspace(math.log10(ends[0]), math.log10(ends[1]), count, dtype=torch.float64)

    def directions(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, config.hidden, generator=generator, dtype=torch.float64)).Q

    left, right = (
        torch.zeros(config.outputs, config.hidden).double(),
        torch.zeros(config.inputs, config.hidden).double(),
    )
    left[-config.corner :], right[: config.corner] = directions(config.corner), directions(config.corner)
    values = geometric(config.singular_values, config.hidden)
    input_cov = geometric(config.input_variances, config.inputs).diag()
    noise_cov = geometric(config.noise_variances, config.outputs).diag()
    target = (left * values) @ right.mT
    minimum = TwoLayer(left * values.sqrt(), values.sqrt()[:, None] * right.mT)
    return Problem(
        target, input_cov, noise_cov, minimum, two_layer_equilibrium(target, input_cov, noise_cov, config.hidden)
    )


def starts(config: Config, problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the replicas of the four initialisations, shape (4 * replicas, ...), in the order of `INITS`."""

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(config.replicas, rows, columns, generator=generator, dtype=torch.float64)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.expand(config.replicas, *tensor.shape)

    u, w = problem.minimum
    hidden, inputs, outputs = config.hidden, config.inputs, config.outputs
    kaiming = (2 / inputs) ** 0.5, (2 / hidden) ** 0.5
    inner = draw(hidden, inputs, config.small), draw(hidden, inputs, kaiming[0]), repeated(w / 2), repeated(4 * w)
    outer = draw(outputs, hidden, config.small), draw(outputs, hidden, kaiming[1]), repeated(2 * u), repeated(u / 4)
    return {INNER: torch.cat(inner), OUTER: torch.cat(outer)}


def network(config: Config) -> nn.Sequential:
    """Two linear layers without bias, float64."""
    return nn.Sequential(
        nn.Linear(config.inputs, config.hidden, bias=False, dtype=torch.float64),
        nn.Linear(config.hidden, config.outputs, bias=False, dtype=torch.float64),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of each example, shape (B,)."""
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)

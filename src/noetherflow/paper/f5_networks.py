"""F5: the settings, the two networks, and their training."""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from noetherflow._types import Params
from noetherflow.optimizers import SGD
from noetherflow.simulation import GradientDescent, Trajectory, simulate
from noetherflow.symmetry import Axis, ScalarSymmetry

NETS = ("Net-A", "Net-B")
# A scaling of a single layer is a symmetry of Net-B alone. The norms of the layers of Net-A are recorded, too.
INNER, OUTER = Axis("inner", 0), Axis("outer", 0)
NORMS = {
    "total": ScalarSymmetry(plus=(INNER, OUTER)),
    "inner": ScalarSymmetry(plus=(INNER,)),
    "outer": ScalarSymmetry(plus=(OUTER,)),
}
# Slices of the recorded noise, whose entries are (inner, outer).
LAYERS = {"inner": slice(0, 1), "outer": slice(1, 2), "total": slice(0, 2)}


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 8
    hidden: int = 16
    outputs: int = 2
    examples: int = 64
    label_noise: float = 0.5
    lr: float = 0.05
    batch_size: int = 1
    large_lr: float = 0.1
    large_batch_size: int = 16
    weight_decay: float = 0.01
    steps: int = 4_000
    decay_steps: int = 12_000
    replicas: int = 8
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(steps=2_500, weight_decay=0.03, decay_steps=4_000)


@final
class Net(nn.Module):
    """f(x) = 3 u tanh(3 w x) with normalised weights u and w.

    Args:
        config: Sizes of the layers.
        by_layer: Whether each layer is divided by its norm (Net-B) or both layers by their joint norm (Net-A).
    """

    def __init__(self, config: Config, *, by_layer: bool) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.ones(config.hidden, config.inputs, dtype=torch.float64))
        self.outer = nn.Parameter(torch.ones(config.outputs, config.hidden, dtype=torch.float64))
        self._by_layer = by_layer

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for inputs x: (B, inputs) -> (B, outputs)."""
        return self.function({"inner": self.inner, "outer": self.outer}, x)

    def function(self, params: Params, x: Tensor) -> Tensor:
        """Outputs for given parameters `inner` and `outer`, shape (B, outputs)."""
        inner, outer = params["inner"], params["outer"]
        lengths = inner.norm(), outer.norm()
        if not self._by_layer:
            both = (lengths[0].square() + lengths[1].square()).sqrt()
            lengths = both, both
        return 3 * torch.tanh(3 * x @ (inner / lengths[0]).mT) @ (outer / lengths[1]).mT


@final
class Runs(NamedTuple):
    """Trajectories of a network: SGD, SGD with a large batch, SGD with weight decay, gradient descent."""

    sgd: Trajectory
    large: Trajectory
    decayed: Trajectory
    gd: Trajectory


def train(config: Config, net: Net, data: tuple[Tensor, Tensor], start: Params, generator: torch.Generator) -> Runs:
    """Train a network in every way of `Runs`, from the same initial parameters."""

    def example_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return (net.function(params, x) - y).square().sum()

    def noise(params: Params) -> Tensor:
        """Tr Sigma and |grad L|^2 of each layer: rows (inner, outer), shape (2, 2)."""
        gradients = vmap(grad(example_loss), in_dims=(None, 0, 0))(dict(params), *data)
        rows = []
        for name in ("inner", "outer"):
            mean = gradients[name].mean(0)
            variance = (gradients[name] - mean).square().sum() / config.examples
            rows.append(torch.stack([variance, mean.square().sum()]))
        return torch.stack(rows)

    def simulated(dynamics: SGD | GradientDescent, steps: int, every: int) -> Trajectory:
        # `_kicks` sums the noise over all steps. The noise changes fast at first: record every early step.
        early = min(steps, 400)
        return simulate(
            net,
            _loss,
            data,
            dynamics,
            steps=steps,
            start=start,
            symmetries=NORMS,
            observables={"noise": noise},
            record=[*range(early), *range(early, steps, every)],
            generator=generator,
        )

    return Runs(
        sgd=simulated(SGD(config.lr, config.batch_size), config.steps, 5),
        large=simulated(SGD(config.large_lr, config.large_batch_size), config.steps, 5),
        decayed=simulated(SGD(config.lr, config.batch_size, config.weight_decay), config.decay_steps, 20),
        gd=simulated(GradientDescent(config.lr), config.steps, 1),
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of each example, shape (B,)."""
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)


def make_data(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw x of shape (examples, inputs) and y = tanh(T x) + label noise of shape (examples, outputs)."""
    x = normal(config.examples, config.inputs, generator=generator)
    teacher = normal(config.outputs, config.inputs, generator=generator) / config.inputs**0.5
    noise = config.label_noise * normal(config.examples, config.outputs, generator=generator)
    return x, torch.tanh(x @ teacher.mT) + noise


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)

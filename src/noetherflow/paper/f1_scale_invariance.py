r"""F1: gradient flow stays on its circle, SGD leaves it.

The loss $\ell = -z \cdot \theta / |\theta|$ does not depend on the length of $\theta$, so gradient flow conserves
$C = |\theta|^2$. The gradient of every example is tangential and of size $1/|\theta|$, and each SGD step adds its
square: after n steps at the minimum $C^2 = C_0^2 + 2\,\mathrm{lr}^2 s^2 n / S$, where $s^2$ is the variance of z across
its mean. Weight decay brings it to rest at $C^2 = \mathrm{lr}\, s^2 / (2\,\mathrm{wd}\, S)$.

Source: Ziyin et al. (2024), figure 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from noetherflow._optimizers import SGD
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientFlow, Trajectory, simulate
from noetherflow.symmetry import Axis, ScalarSymmetry

TITLE = "Scale invariance: gradient flow stays on its circle, SGD leaves it"
LENGTH = {"length": ScalarSymmetry(plus=(Axis("theta", 0),))}


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

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
        """Reduced sizes, whose verdicts still mean something."""
        return cls(steps=8_000, replicas=48, weight_decay=6e-3, kicks=50_000)


class Direction(nn.Module):
    """A loss that depends on the direction of its parameters alone."""

    def __init__(self) -> None:
        """Start at a point that is replaced by every experiment."""
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """The loss of every example, shape (B,)."""
        return -(z @ self.theta) / self.theta.norm()


@final
class Outcome(NamedTuple):
    """Trajectories of every part of the experiment."""

    sgd: Trajectory
    flow: Trajectory
    decayed: list[Trajectory]
    identity_error: float
    kicks: Tensor


def run(config: Config) -> Outcome:
    """Simulate SGD, gradient flow, SGD with weight decay, and many single steps."""
    generator = torch.Generator().manual_seed(config.seed)
    settings = SGD(config.lr, config.batch_size)
    start = _point(1.0, config.angle)
    common: dict[str, Any] = {"model": Direction(), "loss": _loss, "symmetries": LENGTH, "generator": generator}
    observe = {"theta": lambda params: params["theta"]}
    sgd = simulate(
        dynamics=settings,
        data=_stream(config.mean, config.variances),
        steps=config.steps,
        start=_replicas(start, config.replicas),
        observables=observe,
        # Densely at first, where the path turns.
        record=sorted({int(10**exponent) for exponent in torch.linspace(0, math.log10(config.steps), 400).tolist()}),
        **common,
    )
    flow_steps = 2_000
    flow = simulate(
        dynamics=GradientFlow(dt=config.flow_time / flow_steps),
        data=_two_points(config.mean),
        steps=flow_steps,
        start=_replicas(start, 1),
        observables=observe,
        **common,
    )
    decaying = SGD(config.lr, config.batch_size, config.weight_decay)
    decayed = [
        simulate(
            dynamics=decaying,
            data=_stream(config.mean, config.variances),
            steps=config.steps,
            start=_replicas(_point(length, config.angle), config.replicas),
            **common,
        )
        for length in config.decay_starts
    ]
    kicked = simulate(
        dynamics=SGD(config.lr, config.kick_batch_size),
        data=_stream(config.kick_mean, config.variances),
        steps=1,
        start=_replicas(_point(1.0, math.pi / 2), config.kicks),
        record=1,
        **common,
    ).charges["length"]
    return Outcome(sgd, flow, decayed, _identity_error(config, generator), (kicked[1] - kicked[0]) / config.lr**2)


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    variance, lr, size = config.variances[1], config.lr, config.batch_size
    charge = outcome.sgd.charges["length"]
    growth = (charge[-1].square() - charge[0].square()) / (2 * lr**2 * variance * config.steps / size)
    flow = outcome.flow.charges["length"]
    found = [
        Claim(
            "torch.optim.SGD, one step: error of C' = (1 - 2 lr gamma)^2 C + lr^2 |g|^2",
            predicted=0.0,
            measured=outcome.identity_error,
            high=1e-12,
        ),
        Claim(
            "SGD: growth of C^2 / (2 lr^2 s^2 n / S)",
            predicted=1.0,
            measured=growth.mean().item(),
            low=0.97,
            high=1.06,
            error=standard_error(growth),
            wrong={"sigma^2 twice as large": 0.5, "sigma^2 half as large": 2.0, "gradient descent": 0.001},
        ),
        Claim(
            "gradient flow: relative change of C",
            predicted=0.0,
            measured=(flow / flow[0] - 1).abs().max().item(),
            high=1e-8,
        ),
    ]
    rest = lr * variance / (2 * config.weight_decay * size)
    for length, trajectory in zip(config.decay_starts, outcome.decayed, strict=True):
        ratio = _late(trajectory).square().mean(0) / rest
        found.append(
            Claim(
                f"weight decay from |theta| = {length:g}: late C^2 / (lr s^2 / 2 wd S)",
                predicted=1.0,
                measured=ratio.mean().item(),
                low=0.97,
                high=1.09,
                error=standard_error(ratio),
                wrong={"gamma = weight_decay": 0.5, "sigma^2 twice as large": 0.5},
            )
        )
    # At a right angle to the mean the gradient is along the first axis: variance and mean both count.
    centred, mean = config.variances[0] / config.kick_batch_size, config.kick_mean**2
    error = standard_error(outcome.kicks)
    found.append(
        Claim(
            f"mean kick at S = {config.kick_batch_size}, 90 degrees: Tr Sigma / S + |grad L|^2",
            predicted=centred + mean,
            measured=outcome.kicks.mean().item(),
            low=centred + mean - 5 * error,
            high=centred + mean + 5 * error,
            error=error,
            wrong={
                "uncentred noise": (config.variances[0] + mean) / config.kick_batch_size + mean,
                "noise alone": centred,
            },
        )
    )
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """Paths of SGD leaving the circle of the gradient flow; beside it the charge over the predicted curve."""
    figure = style.panels(3)
    paths, growth, rest = figure.subplots(1, 3)
    _plot_paths(config, outcome, paths)
    steps = outcome.sgd.steps
    growth.plot(steps, outcome.sgd.charges["length"], **(style.MEASURED | {"linewidth": 0.4, "alpha": 0.5}))
    predicted = (1 + 2 * config.lr**2 * config.variances[1] * steps / config.batch_size).sqrt()
    growth.plot(steps, predicted, **style.PREDICTED, label="predicted")
    growth.axhline(1.0, **style.CONTRAST, label="gradient flow")
    growth.set(xlabel="steps", ylabel=r"$C = |\theta|^2$", title=f"SGD, {config.replicas} replicas")
    growth.legend()
    for trajectory, mark in zip(outcome.decayed, ("-", ":"), strict=False):
        charges = trajectory.charges["length"]
        label = rf"from $|\theta|$ = {charges[0, 0].sqrt().item():.2g}"
        rest.plot(trajectory.steps, charges.square().mean(1), **(style.MEASURED | {"linestyle": mark}), label=label)
    rest.axhline(
        config.lr * config.variances[1] / (2 * config.weight_decay * config.batch_size),
        **style.PREDICTED,
        label="predicted rest",
    )
    rest.set(
        xlabel="steps", ylabel=r"mean of $C^2$", title=f"SGD with weight decay {config.weight_decay:g}", yscale="log"
    )
    rest.legend()
    return figure


def _plot_paths(config: Config, outcome: Outcome, axes: Axes) -> None:
    paths, flow = outcome.sgd.observables["theta"], outcome.flow.observables["theta"]
    reach = 1.05 * paths.abs().max().item()
    side = torch.linspace(-reach, reach, 201, dtype=torch.float64)
    x, y = torch.meshgrid(side, side, indexing="xy")
    axes.contour(x, y, -config.mean * x / (x.square() + y.square()).sqrt(), levels=12, colors="0.85", linewidths=0.8)
    for replica in range(min(4, paths.shape[1])):
        axes.plot(*paths[:, replica].T, **(style.MEASURED | {"linewidth": 0.6}), label="SGD" if replica == 0 else None)
    axes.plot(*flow[:, 0].T, **(style.CONTRAST | {"linewidth": 2.0}), label="gradient flow")
    axes.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", title="paths and level lines of the loss", aspect="equal")
    axes.legend(loc="lower left")


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    values: Tensor = model(batch)
    return values


def _stream(mean: float, variances: tuple[float, ...]) -> Callable[[int, torch.Generator], Tensor]:
    centre = torch.tensor([mean, 0.0], dtype=torch.float64)
    scale = torch.tensor(variances, dtype=torch.float64).sqrt()

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return centre + scale * torch.randn(count, 2, generator=generator, dtype=torch.float64)

    return sample


def _two_points(mean: float) -> Tensor:
    """A data set of the same mean: the loss is linear in z, so gradient flow needs no more of it."""
    return torch.tensor([[mean, 1.0], [mean, -1.0]], dtype=torch.float64)


def _point(length: float, angle: float) -> Tensor:
    return length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def _replicas(point: Tensor, count: int) -> dict[str, Tensor]:
    return {"theta": point.expand(count, -1).clone()}


def _identity_error(config: Config, generator: torch.Generator) -> float:
    """The largest relative error of the one-step identity along a run of PyTorch's own SGD with weight decay."""
    model, sample = Direction(), _stream(config.mean, config.variances)
    settings = SGD(config.lr, config.batch_size, config.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    symmetry, params = LENGTH["length"], dict(model.named_parameters())
    worst = 0.0
    for _ in range(config.identity_steps):
        optimizer.zero_grad()
        model(sample(config.batch_size, generator)).mean().backward()
        before = symmetry.charge(params).item()
        kick = symmetry.charge({"theta": model.theta.grad if model.theta.grad is not None else model.theta}).item()
        optimizer.step()
        expected = (1 - 2 * config.lr * settings.gamma) ** 2 * before + config.lr**2 * kick
        worst = max(worst, abs(symmetry.charge(params).item() / expected - 1))
    return worst


def _late(trajectory: Trajectory) -> Tensor:
    """The charges of the last quarter of a run."""
    charges = trajectory.charges["length"]
    return charges[3 * len(charges) // 4 :]

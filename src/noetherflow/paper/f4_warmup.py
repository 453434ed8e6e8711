r"""F4: after a warmup, SGD is at a flat noise equilibrium where a large learning rate does not diverge.

Question: why does a large learning rate diverge from Kaiming initialisation, but not after steps with a small learning
rate?

Setting: V of rank one, one hidden unit, $\Sigma_x = 1$, $\Sigma_\epsilon = 1$. In Kaiming initialisation the variance
of U is 2 / fan_in with fan_in = 1, so that the sharpness Tr H is about 25 times that of the noise equilibrium.

Formula: $\mathrm{Tr}\,H = 2\,(d_y |W|^2 + d_x |U|^2)$. Its value at the noise equilibrium, where
$|U|^2 / |W|^2 = d_y / d_x$, is $4\sqrt{d_x d_y}\,|V|$. Gradient descent conserves $|W|^2 - |U|^2$.

Falsified by: convergence without a warmup; divergence after the warmup; a late sharpness other than that of the
equilibrium; gradient descent that reduces the sharpness; a warmup without noise that prevents the divergence.

Source: Ziyin et al. (2024), figure 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow.linear import TwoLayer, two_layer_equilibrium, two_layer_sharpness
from noetherflow.optimizers import SGD
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.linear_pair import LinearPair, World
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientDescent, Trajectory, simulate

TITLE = "Rank-1 factorisation: warmup reaches the flat equilibrium that makes a large step usable"


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 20
    outputs: int = 30
    lr: float = 0.008
    warmup_lr: float = 0.001
    batch_size: int = 1
    warmup_steps: int = 20_000
    steps: int = 50_000
    inits: int = 16
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(steps=24_000, warmup_steps=18_000, inits=8)

    def world(self) -> World:
        r"""The data distribution: $\Sigma_x = 1$, $\Sigma_\epsilon = 1$, and V with a single non-zero entry 1."""
        target = torch.zeros(self.outputs, self.inputs, dtype=torch.float64)
        target[0, 0] = 1.0
        inputs, outputs = (torch.ones(count, dtype=torch.float64) for count in (self.inputs, self.outputs))
        return World(target, inputs, outputs)

    def equilibrium_sharpness(self) -> float:
        """Tr H of the mean loss at the noise equilibrium."""
        world = self.world()
        weights = two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, 1)
        return two_layer_sharpness(weights, world.input_cov).item()


@final
class Outcome(NamedTuple):
    """A trajectory for each way to train.

    `kaiming`, `warmup`, `ramp` and `xavier` are SGD. `descent` is gradient descent from Kaiming initialisation, and
    `control` is SGD from the end of `descent`: a warmup without noise.
    """

    kaiming: Trajectory
    warmup: Trajectory
    ramp: Trajectory
    xavier: Trajectory
    descent: Trajectory
    control: Trajectory


def run(config: Config) -> Outcome:
    """Simulate SGD with and without warmup, SGD from Xavier, gradient descent, and SGD after a warmup without noise."""
    generator = torch.Generator().manual_seed(config.seed)
    kaiming, xavier = (starts_of(config, scale, generator) for scale in (kaiming_scale, xavier_scale))
    covariance = config.world().input_cov
    common: dict[str, Any] = {
        "model": LinearPair(config.inputs, 1, config.outputs),
        "loss": linear_pair.loss,
        "symmetries": linear_pair.ROTATION,
        "observables": {
            "sharpness": lambda params: two_layer_sharpness(linear_pair.weights_of(params), covariance),
        },
    }
    full = {"data": linear_pair.population(config.inputs, config.outputs)} | common
    warmup_factor = config.warmup_lr / config.lr

    def ramp_factor(step: int) -> float:
        return min(1.0, warmup_factor + (1 - warmup_factor) * step / config.warmup_steps)

    def train(start: dict[str, Tensor], schedule: Callable[[int], float] | None, steps: int) -> Trajectory:
        data = linear_pair.standard_normal(config.inputs, config.outputs)
        return simulate(
            dynamics=SGD(config.lr, config.batch_size),
            data=data,
            steps=steps,
            start=start,
            schedule=schedule,
            generator=generator,
            **common,
        )

    descent = simulate(dynamics=GradientDescent(config.warmup_lr), steps=config.warmup_steps, start=kaiming, **full)
    after = config.steps - config.warmup_steps
    return Outcome(
        kaiming=train(kaiming, None, config.steps // 10),
        warmup=train(kaiming, lambda step: warmup_factor if step < config.warmup_steps else 1.0, config.steps),
        ramp=train(kaiming, ramp_factor, config.steps),
        xavier=train(xavier, None, config.steps),
        descent=descent,
        control=train(descent.params, None, after // 4),
    )


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions; bands on the share of diverged replicas hold for any `inits`."""
    equilibrium = config.equilibrium_sharpness()
    verdicts = [
        _diverged("SGD from Kaiming, no warmup: diverged of all", outcome.kaiming, low=14 / 16),
        _diverged("warmup without noise (GD), then SGD: diverged", outcome.control, low=14 / 16),
    ]
    for name, trajectory in (("a step", outcome.warmup), ("a ramp", outcome.ramp), ("Xavier", outcome.xavier)):
        verdicts.append(_diverged(f"SGD, {name}: diverged", trajectory, high=1 / 16))
        verdicts.append(_late_sharpness(f"SGD, {name}: late sharpness", trajectory, equilibrium, config))
    sharpness = outcome.descent.observables["sharpness"]
    ratio = sharpness[-1] / sharpness[0]
    verdicts.append(
        Claim(
            "GD from Kaiming: late sharpness over first",
            predicted=1.0,
            measured=ratio.mean().item(),
            low=0.75,
            error=standard_error(ratio),
            wrong={"SGD passed off as GD": equilibrium / sharpness[0].mean().item()},
        )
    )
    return verdicts


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the sharpness over the steps for every way to train."""
    figure = style.panels(2)
    noisy, contrast = figure.subplots(1, 2, sharey=True)
    for axes, runs in (
        (noisy, {"Kaiming, warmup": outcome.warmup, "Kaiming, ramp": outcome.ramp, "Xavier": outcome.xavier}),
        (
            contrast,
            {"GD, Kaiming": outcome.descent, "SGD, no warmup": outcome.kaiming, "SGD after GD": outcome.control},
        ),
    ):
        for (label, trajectory), mark in zip(runs.items(), ("-", ":", "-."), strict=True):
            sharpness = trajectory.observables["sharpness"]
            delay = config.warmup_steps if trajectory is outcome.control else 0
            finite = sharpness.where(torch.isfinite(sharpness) & (sharpness < 1e5), torch.nan)
            base = style.MEASURED if axes is noisy else style.CONTRAST
            for replica in range(sharpness.shape[1]):
                look = base | {"linewidth": 0.5, "alpha": 0.5, "linestyle": mark}
                axes.plot(trajectory.steps + delay, finite[:, replica], **look, label=label if replica == 0 else None)
        axes.axhline(config.equilibrium_sharpness(), **style.PREDICTED, label="noise equilibrium")
        axes.axhline(2 / config.lr, color="0.6", linewidth=0.8, label="2 / lr")
        axes.set(xlabel="steps", yscale="log")
        axes.legend(fontsize=7)
    noisy.set(ylabel="sharpness Tr H", title="SGD")
    contrast.set_title("no noise, or no warmup")
    figure.supxlabel(
        "Xavier starts near the equilibrium and ends there; a small constant step ends there too, more slowly.",
        fontsize=7,
    )
    return figure


def starts_of(config: Config, scale: Callable[[int, int], float], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the replicas of an initialisation; `scale` is the standard deviation for (rows, columns)."""
    world = config.world()

    def layer(rows: int, columns: int) -> Tensor:
        return scale(rows, columns) * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    return linear_pair.replicated(
        [(world, TwoLayer(layer(config.outputs, 1), layer(1, config.inputs))) for _ in range(config.inits)]
    )


def kaiming_scale(rows: int, columns: int) -> float:
    """Standard deviation of Kaiming initialisation, sqrt(2 / fan_in)."""
    return (2 / columns) ** 0.5


def xavier_scale(rows: int, columns: int) -> float:
    """Standard deviation of Xavier initialisation, sqrt(2 / (fan_in + fan_out))."""
    return (2 / (rows + columns)) ** 0.5


def _diverged(text: str, trajectory: Trajectory, *, low: float | None = None, high: float | None = None) -> Claim:
    """Claim about the share of replicas that diverged."""
    share = trajectory.diverged.double().mean().item()
    return Claim(text, predicted=1.0 if low else 0.0, measured=share, low=low, high=high)


def _late_sharpness(text: str, trajectory: Trajectory, equilibrium: float, config: Config) -> Claim:
    """Compare the time mean of the sharpness over the last sixth of the records with that of the equilibrium."""
    sharpness = trajectory.observables["sharpness"]
    late = sharpness[5 * len(sharpness) // 6 :].mean(0)
    late = late[torch.isfinite(late)]
    swapped = (config.outputs / config.inputs) ** 0.5
    return Claim(
        text,
        predicted=equilibrium,
        measured=late.mean().item(),
        low=0.96 * equilibrium,
        high=1.04 * equilibrium,
        error=standard_error(late),
        wrong={"trace factors swapped": equilibrium * (swapped**2 + swapped**-2) / 2},
    )

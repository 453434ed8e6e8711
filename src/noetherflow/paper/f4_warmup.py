r"""F4: a warmup takes SGD to the flat equilibrium that makes a large step usable.

A target of rank one, one hidden unit, isotropic data. Kaiming initialisation makes the outer layer far too large: the
sharpness is some twenty-five times that of the noise equilibrium, $S = 4\sqrt{d_x d_y}\,|V|$, and a large step
diverges. While the step is small, noise (and nothing else) moves the layers into balance; then the large step works.

Source: Ziyin et al. (2024), figure 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow._optimizers import SGD
from noetherflow.linear import TwoLayer, two_layer_equilibrium, two_layer_sharpness
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.linear_pair import LinearPair, World
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientDescent, Trajectory, simulate

TITLE = "Rank-1 factorisation: warmup reaches the flat equilibrium that makes a large step usable"


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

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
        """Reduced sizes, whose verdicts still mean something."""
        return cls(steps=24_000, warmup_steps=18_000, inits=8)

    def world(self) -> World:
        """Isotropic data, and a target between the first input and the first output."""
        target = torch.zeros(self.outputs, self.inputs, dtype=torch.float64)
        target[0, 0] = 1.0
        inputs, outputs = (torch.ones(count, dtype=torch.float64) for count in (self.inputs, self.outputs))
        return World(target, inputs, outputs)

    def equilibrium_sharpness(self) -> float:
        """Tr H at the noise equilibrium."""
        world = self.world()
        weights = two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, 1)
        return two_layer_sharpness(weights, world.input_cov).item()


@final
class Outcome(NamedTuple):
    """One trajectory per way to train."""

    kaiming: Trajectory
    warmup: Trajectory
    ramp: Trajectory
    xavier: Trajectory
    descent: Trajectory
    control: Trajectory


def run(config: Config) -> Outcome:
    """SGD with and without warmup from Kaiming, SGD from Xavier, gradient descent, and a warmup without noise."""
    generator = torch.Generator().manual_seed(config.seed)
    kaiming, xavier = (_starts(config, scale, generator) for scale in (_kaiming, _xavier))
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
    slow = config.warmup_lr / config.lr

    def noisy(start: dict[str, Tensor], schedule: Callable[[int], float] | None, steps: int) -> Trajectory:
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

    quiet = simulate(dynamics=GradientDescent(config.warmup_lr), steps=config.warmup_steps, start=kaiming, **full)
    after = config.steps - config.warmup_steps
    return Outcome(
        kaiming=noisy(kaiming, None, config.steps // 10),
        warmup=noisy(kaiming, lambda step: slow if step < config.warmup_steps else 1.0, config.steps),
        ramp=noisy(kaiming, lambda step: min(1.0, slow + (1 - slow) * step / config.warmup_steps), config.steps),
        xavier=noisy(xavier, None, config.steps),
        descent=quiet,
        control=noisy(quiet.params, None, after // 4),
    )


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold; a share of inits says what their number does, whatever it is."""
    rest = config.equilibrium_sharpness()
    found = [
        _diverged("SGD from Kaiming, no warmup: diverged of all", outcome.kaiming, low=14 / 16),
        _diverged("warmup without noise (GD), then SGD: diverged", outcome.control, low=14 / 16),
    ]
    for name, trajectory in (("a step", outcome.warmup), ("a ramp", outcome.ramp), ("Xavier", outcome.xavier)):
        found.append(_diverged(f"SGD, {name}: diverged", trajectory, high=1 / 16))
        found.append(_rests(f"SGD, {name}: late sharpness", trajectory, rest, config))
    sharpness = outcome.descent.observables["sharpness"]
    kept = sharpness[-1] / sharpness[0]
    found.append(
        Claim(
            "GD from Kaiming: late sharpness over first",
            predicted=1.0,
            measured=kept.mean().item(),
            low=0.75,
            error=standard_error(kept),
            wrong={"SGD passed off as GD": rest / sharpness[0].mean().item()},
        )
    )
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """Sharpness over time for every way to train."""
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
            seen = sharpness.where(torch.isfinite(sharpness) & (sharpness < 1e5), torch.nan)
            shade = style.MEASURED if axes is noisy else style.CONTRAST
            for replica in range(sharpness.shape[1]):
                look = shade | {"linewidth": 0.5, "alpha": 0.5, "linestyle": mark}
                axes.plot(trajectory.steps + delay, seen[:, replica], **look, label=label if replica == 0 else None)
        axes.axhline(config.equilibrium_sharpness(), **style.PREDICTED, label="noise equilibrium")
        axes.axhline(2 / config.lr, color="0.6", linewidth=0.8, label="2 / lr")
        axes.set(xlabel="steps", yscale="log")
        axes.legend(fontsize=7)
    noisy.set(ylabel="sharpness Tr H", title="SGD")
    contrast.set_title("no noise, or no warmup")
    figure.supxlabel(
        "Xavier ends at the same point because it starts near it; a small constant step gets there too, more slowly.",
        fontsize=7,
    )
    return figure


def _starts(config: Config, scale: Callable[[int, int], float], generator: torch.Generator) -> dict[str, Tensor]:
    world = config.world()

    def layer(rows: int, columns: int) -> Tensor:
        return scale(rows, columns) * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    return linear_pair.replicated(
        [(world, TwoLayer(layer(config.outputs, 1), layer(1, config.inputs))) for _ in range(config.inits)]
    )


def _kaiming(rows: int, columns: int) -> float:
    return (2 / columns) ** 0.5


def _xavier(rows: int, columns: int) -> float:
    return (2 / (rows + columns)) ** 0.5


def _diverged(text: str, trajectory: Trajectory, *, low: float | None = None, high: float | None = None) -> Claim:
    share = trajectory.diverged.double().mean().item()
    return Claim(text, predicted=1.0 if low else 0.0, measured=share, low=low, high=high)


def _rests(text: str, trajectory: Trajectory, rest: float, config: Config) -> Claim:
    sharpness = trajectory.observables["sharpness"]
    late = sharpness[5 * len(sharpness) // 6 :].mean(0)
    late = late[torch.isfinite(late)]
    swapped = (config.outputs / config.inputs) ** 0.5
    return Claim(
        text,
        predicted=rest,
        measured=late.mean().item(),
        low=0.96 * rest,
        high=1.04 * rest,
        error=standard_error(late),
        wrong={
            "trace factors swapped": rest * (swapped**2 + swapped**-2) / 2,
        },
    )

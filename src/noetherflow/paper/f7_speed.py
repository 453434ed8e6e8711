r"""F7: the rate of convergence to the noise equilibrium, and its dependence on the settings of SGD and the data.

Question: how does the rate of convergence depend on the settings, and do the settings change the equilibrium?

Setting: two linear layers with one hidden unit. Half of the replicas start above the equilibrium and half below, at
points of the minimum; the measured rate is that of the decay of the difference between the mean charges.

Formula: the charge $C = |w|^2 - |u|^2$ decays towards its equilibrium at the rate
$\kappa = 2\,\mathrm{lr}^2 N / (S K)$ per step. At the equilibrium N is the noise of either layer, and
$K = |u|^2 + |w|^2$. Momentum $\mu$ replaces lr by $\mathrm{lr}/(1 - \mu)$. The equilibrium does not change.

Falsified by: a rate off by a factor of two; another power of lr, S or the noise (a slope other than 1 in logarithms);
an equilibrium that depends on the settings; under momentum, the rate of the bare learning rate.

Source: Ziyin et al. (2024), figure 9.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow.linear import TwoLayer, noise_factors, two_layer_equilibrium, two_layer_relaxation
from noetherflow.optimizers import SGD
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.linear_pair import LinearPair
from noetherflow.paper.measure import slope
from noetherflow.simulation import simulate

TITLE = "Convergence speed: learning rate, dimension, batch size, label noise, momentum"


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 10
    outputs: int = 12
    variances: tuple[float, ...] = (0.5, 2.0)
    lr: float = 0.006
    batch_size: int = 4
    displacement: float = 0.3
    replicas: int = 64
    target: float = 0.6
    times: float = 6.0
    lrs: tuple[float, ...] = (0.003, 0.012, 0.024)
    dimensions: tuple[int, ...] = (5, 20, 40)
    batch_sizes: tuple[int, ...] = (1, 2, 8, 16)
    label_noises: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)
    momenta: tuple[float, ...] = (0.5, 0.9)
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(lrs=(0.012, 0.024), dimensions=(5, 40), batch_sizes=(1, 2), label_noises=(0.5, 4.0), momenta=(0.9,))


@final
@dataclass(frozen=True)
class Setting:
    """A point of the figure: the varied setting `vary` with its value, and all settings of the run."""

    vary: str
    value: float
    lr: float
    inputs: int
    batch_size: int
    label_noise: float = 1.0
    momentum: float = 0.0

    @property
    def sgd(self) -> SGD:
        """The settings of the optimizer."""
        return SGD(self.lr, self.batch_size, momentum=self.momentum)


@final
class Measured(NamedTuple):
    """Result for a setting.

    Args:
        setting: The setting.
        rate: Measured rate per step.
        predicted: Predicted rate per step.
        fixed_point_error: |C - C*| / K with the late mean C of the charge and its equilibrium C*.
        steps: Steps of the records, shape (records,).
        departure: Difference between the mean charges of both halves of the replicas, shape (records,).
    """

    setting: Setting
    rate: float
    predicted: float
    fixed_point_error: float
    steps: Tensor
    departure: Tensor


Outcome = list[Measured]


def run(config: Config) -> Outcome:
    """Simulate every setting from both sides of the equilibrium."""
    generator = torch.Generator().manual_seed(config.seed)
    return [_measure(config, setting, generator) for setting in _settings(config)]


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    verdicts = []
    for measured in outcome:
        setting, ratio = measured.setting, measured.rate / measured.predicted
        large = setting.lr / (1 - setting.momentum) > 2.5 * config.lr
        low, high = (0.8, 1.35) if large else (0.88, 1.15)
        wrong = {"sigma^2 twice as large": 0.5, "sigma^2 half as large": 2.0}
        if setting.momentum:
            wrong["bare lr"] = (1 - setting.momentum) ** -2
        text = f"{setting.vary} {setting.value:g}: rate over predicted"
        verdicts.append(Claim(text, 1.0, ratio, low, high, wrong=wrong))
    logs = torch.tensor([[m.predicted, m.rate] for m in outcome], dtype=torch.float64).log().mT
    worst = max(measured.fixed_point_error for measured in outcome)
    return [
        *verdicts,
        Claim(
            "log-log slope of measured against predicted",
            1.0,
            slope(*logs),
            low=0.95,
            high=1.06,
            wrong={"lr instead of lr^2": 0.5},
        ),
        Claim("fixed point: largest |C_fit - C*| / K", 0.0, worst, high=0.05),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw measured over predicted rates, and the decay of every setting in scaled time."""
    figure = style.panels(2)
    rates, decay = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(measured.setting.vary for measured in outcome))
    for kind, mark in zip(kinds, "os^vDP", strict=False):
        points = [measured for measured in outcome if measured.setting.vary == kind]
        rates.plot([m.predicted for m in points], [m.rate for m in points], mark, markersize=5, label=kind)
    ends = [min(m.predicted for m in outcome), max(m.predicted for m in outcome)]
    rates.plot(ends, ends, **style.PREDICTED, label="equal")
    rates.set(xscale="log", yscale="log", xlabel="predicted rate per step", ylabel="measured", title="rates")
    rates.legend(fontsize=7)
    for measured in outcome:
        scaled = measured.steps * measured.predicted
        decay.plot(scaled, measured.departure / measured.departure[0], color="0.5", linewidth=0.6)
    time = torch.linspace(0, config.times, 50)
    decay.plot(time, torch.exp(-time), **style.PREDICTED, label=r"$e^{-\kappa t}$")
    decay.set(xlabel="steps x predicted rate", ylabel="gap between both sides", yscale="log", ylim=(3e-3, 1.5))
    decay.set_title("all settings on one curve")
    decay.legend()
    return figure


def _settings(config: Config) -> list[Setting]:
    """All points of the figure: each varies a single setting of the base point."""

    def setting(vary: str, value: float, **changes: Any) -> Setting:
        base = {"lr": config.lr, "inputs": config.inputs, "batch_size": config.batch_size}
        return Setting(vary, value, **(base | changes))

    return [
        setting("base, lr", config.lr),
        *(setting("lr", lr, lr=lr) for lr in config.lrs),
        *(setting("inputs", inputs, inputs=inputs) for inputs in config.dimensions),
        *(setting("batch size", size, batch_size=size) for size in config.batch_sizes),
        *(setting("label noise", noise, label_noise=noise) for noise in config.label_noises),
        *(setting("momentum", mu, momentum=mu, lr=config.lr * (1 - mu)) for mu in config.momenta),
    ]


def _measure(config: Config, setting: Setting, generator: torch.Generator) -> Measured:
    """Simulate a setting and fit the rate of decay."""
    ends = config.variances
    noise_ends = [setting.label_noise * end for end in ends]
    world = linear_pair.rank_one(
        setting.inputs, config.outputs, length=config.target, input_ends=ends, noise_ends=noise_ends
    )
    equilibrium = two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, 1)
    factors = noise_factors(world.input_cov, world.noise_cov)
    predicted = 1 / two_layer_relaxation(equilibrium, factors, setting.sgd).item()
    half = config.replicas // 2
    above, below = (_displaced(equilibrium, sign * config.displacement) for sign in (1, -1))
    trajectory = simulate(
        LinearPair(setting.inputs, 1, config.outputs),
        linear_pair.loss,
        linear_pair.standard_normal(setting.inputs, config.outputs),
        setting.sgd,
        steps=int(config.times / predicted),
        start=linear_pair.replicated([(world, weights) for weights in [above] * half + [below] * half]),
        symmetries=linear_pair.ROTATION,
        generator=generator,
    )
    charge = trajectory.charges["hidden"].flatten(1)
    gap = (charge[:, :half].mean(1) - charge[:, half:].mean(1)).abs()
    # Fit two e-folds: later the gap is comparable with the statistical error.
    fitted = trajectory.steps <= 2 / predicted
    rate = -slope(trajectory.steps[fitted].double(), gap[fitted].log())
    size = (equilibrium.u.square().sum() + equilibrium.w.square().sum()).item()
    late = charge[trajectory.steps >= 4 / predicted].mean().item()
    target = (equilibrium.w.square().sum() - equilibrium.u.square().sum()).item()
    return Measured(setting, rate, predicted, abs(late - target) / size, trajectory.steps, gap)


def _displaced(weights: TwoLayer, x: float) -> TwoLayer:
    """The point (e^{-x} U, e^x W), which has the same product UW."""
    factor = torch.tensor(x, dtype=torch.float64).exp()
    return TwoLayer(weights.u / factor, weights.w * factor)

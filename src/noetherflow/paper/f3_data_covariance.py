r"""F3: the covariance of the data decides whether SGD balances norms, sharpens or flattens.

Two linear layers fit a target that lies in two inputs of variance $\phi$ and two outputs of label noise $p_e$; all
other variances are 1. With $g = d_y \phi / \mathrm{Tr}\,\Sigma_x$ and $f = d_y p_e / \mathrm{Tr}\,\Sigma_\epsilon$
SGD rests at $|U|^2 / |W|^2 = g / f$, gradient descent from a small start at 1, and the ratio of their sharpness is
$\cosh(\tfrac12 \ln f) / \cosh(\tfrac12 \ln g)$: flatter for isotropic label noise, possibly sharper otherwise.

Source: Ziyin et al. (2024), figure 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow._optimizers import SGD
from noetherflow._types import Params
from noetherflow.linear import TwoLayer, noise_factors, two_layer_sharpness
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.linear_pair import LinearPair, World
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Data covariance: when SGD balances norms, when it sharpens, when it flattens"


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

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
        """Reduced sizes, whose verdicts still mean something."""
        return cls(replicas=4, steps=16_000, phis=(0.2, 0.5, 1.0, 2.0, 5.0, 10.0))

    def world(self, phi: float, label_noise: float, weight_decay: float) -> World:
        """The data of one point of the figure."""
        inputs, outputs = (torch.ones(self.width, dtype=torch.float64) for _ in range(2))
        inputs[: self.hidden], outputs[: self.hidden] = phi, label_noise
        target = torch.zeros(self.width, self.width, dtype=torch.float64)
        target[: self.hidden, : self.hidden] = torch.eye(self.hidden, dtype=torch.float64)
        rate = self.lr_times_trace / inputs.sum().item()
        return World(target, inputs, outputs, rate=rate, gamma=SGD(rate, self.batch_size, weight_decay).gamma)


@final
class Outcome(NamedTuple):
    """Where runs end, shape (label noises, phis, replicas): squared norms ratio |U|^2 / |W|^2, and sharpness."""

    sgd: Tensor
    decayed_sgd: Tensor
    gd: Tensor
    decayed_gd: Tensor
    sgd_sharpness: Tensor
    gd_sharpness: Tensor


def run(config: Config) -> Outcome:
    """All points of the figure at once, by SGD and by gradient descent, with and without weight decay."""
    generator = torch.Generator().manual_seed(config.seed)
    start = {decay: _start(config, decay, generator) for decay in (0.0, config.weight_decay)}
    descent = {decay: _start(config, decay, generator) for decay in (0.0, config.descent_weight_decay)}
    noisy = {name: torch.cat([part[name] for part in start.values()]) for name in start[0.0]}
    quiet = {name: torch.cat([part[name] for part in descent.values()]) for name in descent[0.0]}
    model = LinearPair(config.width, config.hidden, config.width)
    observables: dict[str, Callable[[Params], Tensor]] = {"ratio": _ratio, "sharpness": _sharpness}
    common: dict[str, Any] = {"model": model, "loss": linear_pair.loss, "observables": observables}
    full = {"data": linear_pair.population(config.width, config.width)} | common
    sgd = simulate(
        dynamics=SGD(1.0, config.batch_size),
        data=linear_pair.standard_normal(config.width, config.width),
        steps=config.steps,
        start=noisy,
        generator=generator,
        record=config.steps,
        **common,
    )
    # Cooling conserves the charge, so it must not decay.
    hot = sgd.params | {"gamma": torch.zeros_like(sgd.params["gamma"])}
    cooled = simulate(
        dynamics=GradientDescent(1.0), steps=config.cool_steps, start=hot, record=config.cool_steps, **full
    ).observables
    gd = simulate(
        dynamics=GradientDescent(1.0), steps=config.descent_steps, start=quiet, record=config.descent_steps, **full
    ).observables

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        shape = (2, len(config.label_noises), len(config.phis), config.replicas)
        plain, decayed = values[-1].reshape(shape)
        return plain, decayed

    sharpness = ends(cooled["sharpness"])[0], ends(gd["sharpness"])[0]
    return Outcome(*ends(cooled["ratio"]), *ends(gd["ratio"]), *sharpness)


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    inner = [index for index, phi in enumerate(config.phis) if 0.2 <= phi <= 5]
    found = []
    changes = outcome.sgd_sharpness.mean(-1) / outcome.gd_sharpness.mean(-1)
    for row, (noise, band, sharp_band) in enumerate(zip(config.label_noises, (0.10, 0.20), (0.04, 0.06), strict=False)):
        ratios = _predicted(config, 0.0)[row, inner]
        sharper, isotropic = _sharpening(config, noise)[inner], _sharpening(config, 1.0)[inner]
        found += [
            Claim(
                f"p_e = {noise:g}: SGD's |U|^2/|W|^2, worst error",
                predicted=0.0,
                measured=_worst(outcome.sgd[row, inner].mean(-1), ratios),
                high=band,
                error=_worst_error(outcome.sgd[row, inner], ratios),
                wrong={
                    "gradient descent": _worst(outcome.gd[row, inner].mean(-1), ratios),
                    "trace factors swapped": _worst(_predicted(config, 0.0, swapped=True)[row, inner], ratios),
                },
            ),
            Claim(
                f"p_e = {noise:g}: sharpness SGD/GD, worst error",
                predicted=0.0,
                measured=_worst(changes[row, inner], sharper),
                high=sharp_band,
                wrong={} if noise == 1 else {"isotropic formula": _worst(isotropic, sharper)},
            ),
            Claim(
                f"p_e = {noise:g}: with weight decay, worst error",
                predicted=0.0,
                measured=_worst(
                    outcome.decayed_sgd[row, inner].mean(-1), _predicted(config, config.weight_decay)[row, inner]
                ),
                high=band,
                error=_worst_error(
                    outcome.decayed_sgd[row, inner], _predicted(config, config.weight_decay)[row, inner]
                ),
                # At p_e = 6 the step is too large for a band that tells this mistake.
                wrong={
                    "gamma = weight_decay": _worst(
                        _predicted(config, 2 * config.weight_decay)[row, inner],
                        _predicted(config, config.weight_decay)[row, inner],
                    )
                }
                if noise == 1
                else {},
            ),
        ]
    sharpening = _at(config, 6.0, changes)
    found += [
        Claim(
            f"p_e = 6, phi = {phi:g}: SGD flattens",
            predicted=_at(config, 6.0, None)[phi],
            measured=sharpening[phi],
            high=1.0,
        )
        for phi in (0.2, 10.0)
        if phi in sharpening
    ]
    found += [
        Claim(
            f"p_e = 6, phi = {phi:g}: SGD sharpens",
            predicted=_at(config, 6.0, None)[phi],
            measured=sharpening[phi],
            low=1.0,
        )
        for phi in (0.5, 1.0, 2.0)
        if phi in sharpening
    ]
    gd = outcome.gd.mean(-1)
    return [
        *found,
        Claim("GD's |U|^2/|W|^2 at every phi, lowest", predicted=1.0, measured=gd.min().item(), low=0.9, high=1.1),
        Claim("and highest", predicted=1.0, measured=gd.max().item(), low=0.9, high=1.1),
        Claim(
            "GD with weight decay, largest |ratio - 1|",
            predicted=0.0,
            measured=(outcome.decayed_gd - 1).abs().max().item(),
            high=0.005,
        ),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    """Ratio of norms and sharpness against the variance of the inputs that carry the signal."""
    figure = style.panels(2)
    ratio, sharp = figure.subplots(1, 2)
    phis = torch.logspace(-1.1, 1.1, 60, dtype=torch.float64).tolist()
    for row, noise in enumerate(config.label_noises):
        look = {"marker": "os"[row % 2], "markersize": 4, "linestyle": "none"}
        label = f"label noise {noise:g}"
        shown = dict(style.MEASURED if row == 0 else style.CONTRAST) | look
        _spread(ratio, config, outcome.sgd[row], shown, f"SGD, {label}")
        curve = _predicted(config, 0.0, phis=phis)[row]
        ratio.plot(phis, curve, **style.PREDICTED, label="predicted" if row == 0 else None)
        changes = outcome.sgd_sharpness[row] / outcome.gd_sharpness[row]
        _spread(sharp, config, changes, shown, label)
        sharp.plot(phis, _sharpening(config, noise, phis), **style.PREDICTED)
    _spread(ratio, config, outcome.gd[0], {"color": "0.5", "marker": "^", "markersize": 4, "linestyle": "none"}, "GD")
    ratio.axhline(1, color="0.6", linewidth=0.8)
    ratio.set(xscale="log", yscale="log", xlabel=r"variance $\phi$ of the signal's inputs", ylabel=r"$|U|^2 / |W|^2$")
    ratio.set_title("balance of norms")
    ratio.legend(fontsize=7)
    sharp.axhline(1, color="0.6", linewidth=0.8)
    sharp.set(xscale="log", xlabel=r"variance $\phi$ of the signal's inputs", ylabel="sharpness, SGD over GD")
    sharp.set_title("above 1: SGD sharpens")
    sharp.legend(fontsize=7)
    return figure


def _start(config: Config, weight_decay: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Small random weights in every world, in the order (label noise, phi, replica)."""

    def small(rows: int, columns: int) -> Tensor:
        return config.small * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    return linear_pair.replicated(
        [
            (
                config.world(phi, noise, weight_decay),
                TwoLayer(small(config.width, config.hidden), small(config.hidden, config.width)),
            )
            for noise in config.label_noises
            for phi in config.phis
            for _ in range(config.replicas)
        ]
    )


def _ratio(params: Params) -> Tensor:
    return params["u"].square().sum() / params["w"].square().sum()


def _sharpness(params: Params) -> Tensor:
    return two_layer_sharpness(linear_pair.weights_of(params), params["input_scale"].square().diag())


def _predicted(
    config: Config, weight_decay: float, *, phis: list[float] | None = None, swapped: bool = False
) -> Tensor:
    """|U|^2 / |W|^2 where push and pull are equal, shape (label noises, phis)."""
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


def _sharpening(config: Config, label_noise: float, phis: list[float] | None = None) -> Tensor:
    """Sharpness of the noise equilibrium over that of balanced norms."""
    found = []
    for phi in phis or config.phis:
        world = config.world(phi, label_noise, 0.0)
        g, f = (config.width * v[0] / v.sum() for v in (world.input_variances, world.noise_variances))
        found.append(torch.cosh(f.log() / 2) / torch.cosh(g.log() / 2))
    return torch.stack(found)


def _at(config: Config, label_noise: float, changes: Tensor | None) -> dict[float, float]:
    """Measured (or, for None, predicted) sharpening by phi at one label noise; empty if it was not run."""
    if label_noise not in config.label_noises:
        return {}
    row = config.label_noises.index(label_noise)
    values = _sharpening(config, label_noise) if changes is None else changes[row]
    return dict(zip(config.phis, values.tolist(), strict=True))


def _worst(measured: Tensor, predicted: Tensor) -> float:
    return (measured / predicted - 1).abs().max().item()


def _worst_error(measured: Tensor, predicted: Tensor) -> float:
    return (measured.std(-1) / measured.shape[-1] ** 0.5 / predicted).max().item()


def _spread(axes: Axes, config: Config, values: Tensor, look: dict[str, Any], label: str) -> None:
    axes.errorbar(config.phis, values.mean(-1), values.std(-1), **look, label=label, elinewidth=0.8)

r"""F3: the data covariance determines whether SGD balances norms, sharpens or flattens.

Question: gradient descent from small weights ends with $|U|^2 = |W|^2$. When does SGD end there too, and when is its
end point sharper or flatter?

Setting: two linear layers fit V = diag(1, 1, 0, ...). The two inputs of V have variance $\phi$, the two outputs of V
have label noise of variance $p_e$, and all remaining variances are 1.

Formula: with $g = d_y \phi / \mathrm{Tr}\,\Sigma_x$ and $f = d_y p_e / \mathrm{Tr}\,\Sigma_\epsilon$ the end point of
SGD has $|U|^2 / |W|^2 = g / f$, and the ratio of the sharpness of SGD to that of gradient descent is
$\cosh(\tfrac12 \ln f) / \cosh(\tfrac12 \ln g)$. The ratio is at most 1 for isotropic label noise, $f = 1$.

Falsified by: ratios of norms that follow norm balance instead of g / f; sharpening for isotropic label noise; for
$p_e = 6$ a change of sharpness with the wrong sign; gradient descent whose ratio of norms depends on $\phi$.

Source: Ziyin et al. (2024), figure 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow._types import Params
from noetherflow.linear import TwoLayer, two_layer_sharpness
from noetherflow.optimizers import SGD
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f3_theory import Config, predicted_ratios, predicted_sharpening
from noetherflow.paper.linear_pair import LinearPair
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Data covariance: when SGD balances norms, when it sharpens, when it flattens"


@final
class Outcome(NamedTuple):
    """End points, each of shape (label noises, phis, replicas).

    `sgd`, `decayed_sgd`, `gd` and `decayed_gd` hold |U|^2 / |W|^2 without and with weight decay; `sgd_sharpness` and
    `gd_sharpness` hold Tr H without weight decay.
    """

    sgd: Tensor
    decayed_sgd: Tensor
    gd: Tensor
    decayed_gd: Tensor
    sgd_sharpness: Tensor
    gd_sharpness: Tensor


def run(config: Config) -> Outcome:
    """Simulate SGD and gradient descent for all variances, with and without weight decay, in one batch of replicas."""
    generator = torch.Generator().manual_seed(config.seed)
    start = {decay: small_start(config, decay, generator) for decay in (0.0, config.weight_decay)}
    descent = {decay: small_start(config, decay, generator) for decay in (0.0, config.descent_weight_decay)}
    noisy = {name: torch.cat([part[name] for part in start.values()]) for name in start[0.0]}
    quiet = {name: torch.cat([part[name] for part in descent.values()]) for name in descent[0.0]}
    model = LinearPair(config.width, config.hidden, config.width)
    observables: dict[str, Callable[[Params], Tensor]] = {"ratio": _ratio, "sharpness": sharpness_of}
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
    # Gradient descent damps the fluctuation of UW. Without weight decay it conserves the charge of the end of SGD.
    final = sgd.params | {"gamma": torch.zeros_like(sgd.params["gamma"])}
    cooled = simulate(
        dynamics=GradientDescent(1.0), steps=config.cool_steps, start=final, record=config.cool_steps, **full
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
    """Compare the measurements with the predictions, for 0.2 <= phi <= 5."""
    bands = zip(config.label_noises, (0.10, 0.20), (0.04, 0.06), strict=False)
    verdicts = [
        claim
        for row, (_, ratio_band, sharpness_band) in enumerate(bands)
        for claim in _noise_claims(config, outcome, row, ratio_band, sharpness_band)
    ]
    gd = outcome.gd.mean(-1)
    return [
        *verdicts,
        *_sign_claims(config, outcome),
        Claim("GD's |U|^2/|W|^2 at every phi, lowest", predicted=1.0, measured=gd.min().item(), low=0.9, high=1.1),
        Claim("GD's |U|^2/|W|^2 at every phi, highest", predicted=1.0, measured=gd.max().item(), low=0.9, high=1.1),
        Claim(
            "GD with weight decay, largest |ratio - 1|",
            predicted=0.0,
            measured=(outcome.decayed_gd - 1).abs().max().item(),
            high=0.005,
        ),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    r"""Draw |U|^2 / |W|^2 and the sharpness of SGD over that of gradient descent as functions of $\phi$."""
    figure = style.panels(2)
    ratio, sharp = figure.subplots(1, 2)
    phis = torch.logspace(-1.1, 1.1, 60, dtype=torch.float64).tolist()
    for row, noise in enumerate(config.label_noises):
        markers = {"marker": "os"[row % 2], "markersize": 4, "linestyle": "none"}
        label = f"label noise {noise:g}"
        look = dict(style.MEASURED if row == 0 else style.CONTRAST) | markers
        _spread(ratio, config, outcome.sgd[row], look, f"SGD, {label}")
        curve = predicted_ratios(config, 0.0, phis=phis)[row]
        ratio.plot(phis, curve, **style.PREDICTED, label="predicted" if row == 0 else None)
        changes = outcome.sgd_sharpness[row] / outcome.gd_sharpness[row]
        _spread(sharp, config, changes, look, label)
        sharp.plot(phis, predicted_sharpening(config, noise, phis), **style.PREDICTED)
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


def _noise_claims(config: Config, outcome: Outcome, row: int, ratio_band: float, sharpness_band: float) -> list[Claim]:
    """Compare norms and sharpness with the theory for label noise `config.label_noises[row]`."""
    noise = config.label_noises[row]
    phis = [index for index, phi in enumerate(config.phis) if 0.2 <= phi <= 5]
    ratios, swapped = (predicted_ratios(config, 0.0, swapped=swap)[row, phis] for swap in (False, True))
    decayed, doubled = (predicted_ratios(config, factor * config.weight_decay)[row, phis] for factor in (1, 2))
    sharper, isotropic = (predicted_sharpening(config, level)[phis] for level in (noise, 1.0))
    return [
        Claim(
            f"p_e = {noise:g}: SGD's |U|^2/|W|^2, worst error",
            predicted=0.0,
            measured=_worst(outcome.sgd[row, phis].mean(-1), ratios),
            high=ratio_band,
            error=_worst_error(outcome.sgd[row, phis], ratios),
            wrong={
                "gradient descent": _worst(outcome.gd[row, phis].mean(-1), ratios),
                "trace factors swapped": _worst(swapped, ratios),
            },
        ),
        Claim(
            f"p_e = {noise:g}: sharpness SGD/GD, worst error",
            predicted=0.0,
            measured=_worst(_sharpness_change(outcome)[row, phis], sharper),
            high=sharpness_band,
            wrong={} if noise == 1 else {"isotropic formula": _worst(isotropic, sharper)},
        ),
        Claim(
            f"p_e = {noise:g}: SGD's |U|^2/|W|^2 with weight decay, worst error",
            predicted=0.0,
            measured=_worst(outcome.decayed_sgd[row, phis].mean(-1), decayed),
            high=ratio_band,
            error=_worst_error(outcome.decayed_sgd[row, phis], decayed),
            # At p_e = 6 the error of the finite step is larger than the effect of this mistake.
            wrong={"gamma = weight_decay": _worst(doubled, decayed)} if noise == 1 else {},
        ),
    ]


def _sign_claims(config: Config, outcome: Outcome) -> list[Claim]:
    """For p_e = 6: SGD flattens (change below 1) at phi = 0.2 and 10, and sharpens at 0.5, 1 and 2."""
    measured = _at(config, 6.0, _sharpness_change(outcome))
    predicted = _at(config, 6.0, None)
    verdicts = []
    for phi in (phi for phi in (0.2, 10.0) if phi in measured):
        verdicts.append(Claim(f"p_e = 6, phi = {phi:g}: SGD flattens", predicted[phi], measured[phi], high=1.0))
    for phi in (phi for phi in (0.5, 1.0, 2.0) if phi in measured):
        verdicts.append(Claim(f"p_e = 6, phi = {phi:g}: SGD sharpens", predicted[phi], measured[phi], low=1.0))
    return verdicts


def _sharpness_change(outcome: Outcome) -> Tensor:
    """Mean sharpness of SGD over that of gradient descent, shape (label noises, phis)."""
    return outcome.sgd_sharpness.mean(-1) / outcome.gd_sharpness.mean(-1)


def small_start(config: Config, weight_decay: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw small random weights for every data distribution, in the order (label noise, phi, replica)."""

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
    """|U|^2 / |W|^2, shape ()."""
    return params["u"].square().sum() / params["w"].square().sum()


def sharpness_of(params: Params) -> Tensor:
    """Tr H of the mean loss, shape ()."""
    return two_layer_sharpness(linear_pair.weights_of(params), params["input_scale"].square().diag())


def _at(config: Config, label_noise: float, changes: Tensor | None) -> dict[float, float]:
    """Measured (or, for None, predicted) change of sharpness by phi for a label noise; empty without such a run."""
    if label_noise not in config.label_noises:
        return {}
    row = config.label_noises.index(label_noise)
    values = predicted_sharpening(config, label_noise) if changes is None else changes[row]
    return dict(zip(config.phis, values.tolist(), strict=True))


def _worst(measured: Tensor, predicted: Tensor) -> float:
    """Largest relative deviation from the prediction."""
    return (measured / predicted - 1).abs().max().item()


def _worst_error(measured: Tensor, predicted: Tensor) -> float:
    """Largest standard error over the replicas, relative to the prediction."""
    return (measured.std(-1) / measured.shape[-1] ** 0.5 / predicted).max().item()


def _spread(axes: Axes, config: Config, values: Tensor, look: dict[str, Any], label: str) -> None:
    """Draw mean and standard deviation over the replicas as functions of phi."""
    axes.errorbar(config.phis, values.mean(-1), values.std(-1), **look, label=label, elinewidth=0.8)

r"""F5: the norm of normalised weights grows by gradient noise: one norm for the network, or one norm for each layer.

Question: weights in front of a normalisation have a scaling symmetry. How fast does their norm grow, and which norms
obey the law?

Setting: two-layer networks $f = 3 u \tanh(3 w x)$ with normalised weights u and w. Net-A divides both layers by
their joint norm and has one scaling symmetry. Net-B divides each layer by its norm and has a symmetry for each layer.

Formula: with $\theta$ the parameters of a scaling symmetry, the mean change of $|\theta|^2$ in a step of SGD is
$\mathrm{lr}^2 (\mathrm{Tr}\,\Sigma / S + |\nabla L|^2)$, and $|\theta|^4$ is linear in time. Gradient descent has the
second term alone. With weight decay wd the stationary value is $|\theta|^2 = \mathrm{lr}\,E|g|^2 / (2\,\mathrm{wd})$.

Falsified by: growth that differs from the sum over the steps; a layer of Net-B whose norm decreases; layers of Net-A
whose norms gradient descent conserves, or whose stationary norms obey the formula.

Source: Ziyin et al. (2024), figures 5 and 8.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f5_networks import LAYERS, NETS, Config, Net, Runs, make_data, normal, train
from noetherflow.paper.measure import r_squared, standard_error
from noetherflow.simulation import Trajectory

TITLE = "Scaling symmetry: norms that only noise can change, for a whole net or layer by layer"
Outcome = dict[str, Runs]


def run(config: Config) -> Outcome:
    """Train both networks in every way of `Runs`, from the same initial parameters."""
    generator = torch.Generator().manual_seed(config.seed)
    data = make_data(config, generator)
    start = {
        "inner": normal(config.replicas, config.hidden, config.inputs, generator=generator) / config.inputs**0.5,
        "outer": normal(config.replicas, config.outputs, config.hidden, generator=generator) / config.hidden**0.5,
    }
    return {name: train(config, Net(config, by_layer=name == "Net-B"), data, start, generator) for name in NETS}


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    verdicts: list[Claim] = []
    for name, runs in outcome.items():
        parts = ("total", "inner", "outer") if name == "Net-B" else ("total",)
        for part in parts:
            band = {"Net-A": 0.05, "Net-B": 0.08}[name] if part == "total" else 0.10
            verdicts.append(_growth(config, f"{name}, {part}", runs.sgd, part, config.lr, config.batch_size, band))
            steady = (runs.sgd.charges[part].diff(dim=0) >= 0).double().mean().item()
            verdicts.append(Claim(f"{name}, {part}: share of records at which |theta|^2 grew", 1.0, steady, low=1.0))
        verdicts.append(
            _growth(config, f"{name}, S = 16", runs.large, "total", config.large_lr, config.large_batch_size, 0.08)
        )
        verdicts.append(_without_mean(config, name, runs.large))
        verdicts.append(_linear(name, runs.sgd))
        verdicts += [_stationary(config, f"{name}, {part}", runs.decayed, part) for part in parts]
    for part in ("inner", "outer"):
        verdicts += [
            _descent(config, f"Net-B, {part}", outcome["Net-B"].gd, part, high=0.005),
            _descent(config, f"Net-A, {part}", outcome["Net-A"].gd, part, low=0.10),
            _stationary_mismatch(config, f"Net-A, {part}", outcome["Net-A"].decayed, part),
        ]
    return verdicts


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the squared norms over the steps for both networks, SGD and gradient descent, and |theta|^4 for SGD."""
    figure = style.panels(3)
    axes = figure.subplots(1, 3)
    for panel, (name, runs) in zip(axes, outcome.items(), strict=False):
        for part, mark in (("total", "-"), ("inner", "--"), ("outer", ":")):
            for trajectory, look, label in ((runs.sgd, style.MEASURED, "SGD"), (runs.gd, style.CONTRAST, "GD")):
                thin = look | {"linestyle": mark, "linewidth": 0.6}
                lines = panel.plot(trajectory.steps, trajectory.charges[part], **thin)
                lines[0].set_label(f"{label}, {part}")
        panel.set(xlabel="steps", ylabel="squared norm", title=name)
        panel.legend(fontsize=6)
    fourth = axes[2]
    for (name, runs), mark in zip(outcome.items(), ("-", ":"), strict=True):
        total = runs.sgd.charges["total"].square()
        fourth.plot(runs.sgd.steps, total.mean(1), **(style.MEASURED | {"linestyle": mark}), label=name)
        fourth.plot(runs.sgd.steps[[0, -1]], total.mean(1)[[0, -1]], **(style.PREDICTED | {"linewidth": 0.8}))
    fourth.set(xlabel="steps", ylabel=r"mean of $|\theta|^4$", title="linear in time")
    fourth.legend(fontsize=7)
    return figure


def _kicks(trajectory: Trajectory, part: str, lr: float, batch_size: float, *, mean: float = 1.0) -> Tensor:
    """Sum over the steps of lr^2 (Tr Sigma / S + mean * |grad L|^2), shape (replicas,)."""
    noise = trajectory.observables["noise"][:, :, LAYERS[part]].sum(2)
    per_step = lr**2 * (noise[..., 0] / batch_size + mean * noise[..., 1])
    return (per_step[:-1] * trajectory.steps.diff()[:, None]).sum(0)


def _gain(trajectory: Trajectory, part: str) -> Tensor:
    """Change of the squared norm over the run, shape (replicas,)."""
    charge = trajectory.charges[part]
    return charge[-1] - charge[0]


def _growth(
    config: Config, text: str, trajectory: Trajectory, part: str, lr: float, batch_size: int, band: float
) -> Claim:
    """Compare the change of a squared norm with the sum over the steps."""
    ratio = _gain(trajectory, part) / _kicks(trajectory, part, lr, batch_size)
    return Claim(
        f"{text}: growth over lr^2 sum(Tr Sigma/S + |grad L|^2)",
        predicted=1.0,
        measured=ratio.mean().item(),
        low=1 - band,
        high=1 + band,
        error=standard_error(ratio),
        wrong={"sigma^2 twice as large": 0.5, "sigma^2 half as large": 2.0},
    )


def _without_mean(config: Config, name: str, trajectory: Trajectory) -> Claim:
    """The sum without |grad L|^2 must miss the change at a large batch size."""
    ratio = _gain(trajectory, "total") / _kicks(trajectory, "total", config.large_lr, config.large_batch_size, mean=0.0)
    return Claim(
        f"{name}, S = 16: change over lr^2 sum(Tr Sigma/S), without |grad L|^2",
        predicted=1.1,
        measured=ratio.mean().item(),
        low=1.05,
        error=standard_error(ratio),
        wrong={"a negligible mean gradient": 1.0},
    )


def _linear(name: str, trajectory: Trajectory) -> Claim:
    """Compare the mean |theta|^4 with a straight line."""
    # The second half: during the fit in the first half the noise decreases.
    late = _late(trajectory)
    fourth = trajectory.charges["total"][late].square().mean(1)
    fit = r_squared(trajectory.steps[late].double(), fourth)
    return Claim(f"{name}: R^2 of |theta|^4 linear in time, late half", 1.0, fit, low=0.995)


def _late(trajectory: Trajectory) -> Tensor:
    """Mask of the records in the second half of a run."""
    return trajectory.steps >= trajectory.steps[-1] / 2


def _stationary(config: Config, text: str, trajectory: Trajectory, part: str, band: float = 0.03) -> Claim:
    """Compare the late squared norm under weight decay with its stationary value."""
    ratio = _stationary_ratio(config, trajectory, part)
    return Claim(
        f"{text}: stationary |theta|^2 over lr E|g|^2 / 2 wd",
        predicted=1.0,
        measured=ratio.mean().item(),
        low=1 - band,
        high=1 + band,
        error=standard_error(ratio),
        wrong={"gamma = weight_decay": 0.5},
    )


def _stationary_mismatch(config: Config, text: str, trajectory: Trajectory, part: str) -> Claim:
    """The formula must miss the stationary norm of a layer whose scaling is no symmetry."""
    ratio = _stationary_ratio(config, trajectory, part)
    return Claim(
        f"{text}: relative error of the formula (scaling of the layer is no symmetry)",
        predicted={"inner": 0.24, "outer": 0.38}[part],
        measured=(ratio.mean() - 1).abs().item(),
        low=0.10,
        error=standard_error(ratio),
    )


def _stationary_ratio(config: Config, trajectory: Trajectory, part: str) -> Tensor:
    """Late squared norm over lr E|g|^2 / (2 wd), shape (replicas,)."""
    late = _late(trajectory)
    noise = trajectory.observables["noise"][late][:, :, LAYERS[part]].sum(2).mean(0)
    kick = noise[:, 0] / config.batch_size + noise[:, 1]
    return trajectory.charges[part][late].mean(0) / (config.lr * kick / (2 * config.weight_decay))


def _descent(
    config: Config, text: str, trajectory: Trajectory, part: str, *, low: float | None = None, high: float | None = None
) -> Claim:
    """Relative change of a squared norm under gradient descent, less the finite-step term lr^2 sum |grad L|^2."""
    finite_step = _kicks(trajectory, part, config.lr, float("inf"))
    change = (_gain(trajectory, part) - finite_step).abs() / trajectory.charges[part][0]
    return Claim(
        f"{text}: relative change by GD beyond lr^2 sum |grad L|^2",
        predicted=0.0 if high else 0.2,
        measured=change.mean().item(),
        low=low,
        high=high,
        error=standard_error(change),
    )

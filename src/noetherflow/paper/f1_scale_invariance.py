r"""F1: gradient flow conserves the norm of a scale-invariant parameter, SGD increases the norm.

Question: the loss does not depend on $|\theta|$, so gradient flow conserves $C = |\theta|^2$. Does SGD conserve C?

Setting: $\ell = -z \cdot \theta / |\theta|$ with $\theta$ and z in the plane, z Gaussian with mean (1, 0). Every
gradient is tangential to the circle $|\theta|^2 = C$, and its size is proportional to $1/|\theta|$.

Formula: a step of SGD gives $C' = (1 - 2\,\mathrm{lr}\,\gamma)^2 C + \mathrm{lr}^2 |g_S|^2$ exactly. The mean of the
second term is $\mathrm{lr}^2 (\mathrm{Tr}\,\Sigma/S + |\nabla L|^2)$. After n steps at the minimum
$C^2 = C_0^2 + 2\,\mathrm{lr}^2 s^2 n / S$, where $s^2$ is the variance of z perpendicular to its mean. With weight
decay wd the stationary value is $C^2 = \mathrm{lr}\, s^2 / (2\,\mathrm{wd}\, S)$.

Falsified by: an error of the one-step identity beyond rounding; growth of $C^2$ off by a factor of two, or none;
a stationary value that depends on the initial norm; a mean step without the term $|\nabla L|^2$.

Source: Ziyin et al. (2024), figure 1.
"""

import math
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow.optimizers import SGD
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f1_problem import LENGTH, Config, Direction, loss, point, replicas, stream, two_points
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientFlow, Trajectory, simulate

TITLE = "Scale invariance: gradient flow stays on its circle, SGD leaves it"


@final
class Outcome(NamedTuple):
    """Trajectories of SGD, gradient flow and SGD with weight decay; error of the identity; single-step changes of C.

    `kicks` holds (C' - C) / lr^2 of one step of SGD for each replica, shape (kicks,).
    """

    sgd: Trajectory
    flow: Trajectory
    decayed: list[Trajectory]
    identity_error: float
    kicks: Tensor


def run(config: Config) -> Outcome:
    """Simulate SGD, gradient flow, SGD with weight decay, and many single steps."""
    generator = torch.Generator().manual_seed(config.seed)
    settings = SGD(config.lr, config.batch_size)
    start = point(1.0, config.angle)
    common: dict[str, Any] = {"model": Direction(), "loss": loss, "symmetries": LENGTH, "generator": generator}
    observe = {"theta": lambda params: params["theta"]}
    sgd = simulate(
        dynamics=settings,
        data=stream(config.mean, config.variances),
        steps=config.steps,
        start=replicas(start, config.replicas),
        observables=observe,
        # Record steps on a logarithmic scale: the direction changes fast in the first steps.
        record=sorted({int(10**exponent) for exponent in torch.linspace(0, math.log10(config.steps), 400).tolist()}),
        **common,
    )
    flow_steps = 2_000
    flow = simulate(
        dynamics=GradientFlow(dt=config.flow_time / flow_steps),
        data=two_points(config.mean),
        steps=flow_steps,
        start=replicas(start, 1),
        observables=observe,
        **common,
    )
    decaying = SGD(config.lr, config.batch_size, config.weight_decay)
    decayed = [
        simulate(
            dynamics=decaying,
            data=stream(config.mean, config.variances),
            steps=config.steps,
            start=replicas(point(length, config.angle), config.replicas),
            **common,
        )
        for length in config.decay_starts
    ]
    kicked = simulate(
        dynamics=SGD(config.lr, config.kick_batch_size),
        data=stream(config.kick_mean, config.variances),
        steps=1,
        start=replicas(point(1.0, math.pi / 2), config.kicks),
        record=1,
        **common,
    ).charges["length"]
    return Outcome(sgd, flow, decayed, _identity_error(config, generator), (kicked[1] - kicked[0]) / config.lr**2)


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    charge, flow = outcome.sgd.charges["length"], outcome.flow.charges["length"]
    change = 2 * config.lr**2 * config.variances[1] * config.steps / config.batch_size
    growth = (charge[-1].square() - charge[0].square()) / change
    return [
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
        *(
            _stationary_claim(config, length, trajectory)
            for length, trajectory in zip(config.decay_starts, outcome.decayed, strict=True)
        ),
        _kick_claim(config, outcome.kicks),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw paths of SGD and gradient flow in the plane, C over steps, and C^2 over steps with weight decay."""
    figure = style.panels(3)
    paths, growth, decayed = figure.subplots(1, 3)
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
        decayed.plot(trajectory.steps, charges.square().mean(1), **(style.MEASURED | {"linestyle": mark}), label=label)
    decayed.axhline(_stationary(config), **style.PREDICTED, label="predicted")
    decayed.set(xlabel="steps", ylabel=r"mean of $C^2$", yscale="log")
    decayed.set_title(f"SGD with weight decay {config.weight_decay:g}")
    decayed.legend()
    return figure


def _stationary_claim(config: Config, length: float, trajectory: Trajectory) -> Claim:
    """Compare the late C^2 under weight decay, from the initial norm `length`, with its stationary value."""
    ratio = _late(trajectory).square().mean(0) / _stationary(config)
    return Claim(
        f"weight decay from |theta| = {length:g}: late C^2 / (lr s^2 / 2 wd S)",
        predicted=1.0,
        measured=ratio.mean().item(),
        low=0.97,
        high=1.09,
        error=standard_error(ratio),
        wrong={"gamma = weight_decay": 0.5, "sigma^2 twice as large": 0.5},
    )


def _kick_claim(config: Config, kicks: Tensor) -> Claim:
    """Compare the mean of (C' - C) / lr^2 over single steps with Tr Sigma / S + |grad L|^2."""
    # Theta is perpendicular to the mean of z, so that the gradient is parallel to the mean: both terms contribute.
    centred, mean = config.variances[0] / config.kick_batch_size, config.kick_mean**2
    error = standard_error(kicks)
    return Claim(
        f"mean kick at S = {config.kick_batch_size}, 90 degrees: Tr Sigma / S + |grad L|^2",
        predicted=centred + mean,
        measured=kicks.mean().item(),
        low=centred + mean - 5 * error,
        high=centred + mean + 5 * error,
        error=error,
        wrong={
            "uncentred noise": (config.variances[0] + mean) / config.kick_batch_size + mean,
            "noise alone": centred,
        },
    )


def _plot_paths(config: Config, outcome: Outcome, axes: Axes) -> None:
    """Draw level lines of the mean loss, four paths of SGD and the path of the gradient flow."""
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


def _identity_error(config: Config, generator: torch.Generator) -> float:
    """Largest relative error of the one-step identity over a run of `torch.optim.SGD` with weight decay."""
    model, sample = Direction(), stream(config.mean, config.variances)
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


def _stationary(config: Config) -> float:
    """Stationary value of C^2 under weight decay."""
    return config.lr * config.variances[1] / (2 * config.weight_decay * config.batch_size)


def _late(trajectory: Trajectory) -> Tensor:
    """Charges of the last quarter of the records, shape (records, replicas)."""
    charges = trajectory.charges["length"]
    return charges[3 * len(charges) // 4 :]

r"""F9: gauge drag: the stationary $W^T W$ and $U U^T$ of SGD differ from those of the noise equilibrium.

Question: two linear layers with several hidden units end near the noise equilibrium, but not at it. Does the distance
vanish with the learning rate, and what determines it?

Setting: two linear layers with 2 hidden units and generic covariances, and three controls: covariances aligned with V,
isotropic label noise, a single hidden unit.

Formula: the charge obeys $dC/dt = 2\sigma^2 I$, but C determines a point with UW = V only up to a rotation of the
hidden units. The fluctuation around the minima has the covariance X with $H X + X H = 2\sigma^2 \Sigma$. Averaged over
the fluctuation, SGD drifts along the minima by $v = -\tfrac12 P\,\nabla\,\mathrm{Tr}[H X]$, where P projects on the
kernel of H. If $\Sigma$ and H do not commute, $W^T W$ and $U U^T$ become stationary while the hidden units rotate:
$\dot C = [\Omega, C] \neq 0$, hence $I \neq 0$. The distance to the point with I = 0 does not depend on $\sigma^2$.

Falsified by: SGD at the point with I = 0; a distance that shrinks with the learning rate, or that differs from the
prediction; a distance in one of the controls.

Source: this project. The averaged drift is that of Li, Wang, Arora (2022), *What happens after SGD reaches zero loss?*
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow.linear import TwoLayer, two_layer_equilibrium
from noetherflow.optimizers import SGD
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f9_valley import grams, valley_flow
from noetherflow.paper.linear_pair import LinearPair, World
from noetherflow.paper.measure import geometric, standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Gauge drag: where SGD rests a little off the noise equilibrium"
WORLDS = ("generic", "aligned", "isotropic label noise", "one hidden unit")


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    size: int = 3
    hidden: int = 2
    input_variances: tuple[float, ...] = (0.1, 3.0)
    noise_variances: tuple[float, ...] = (0.05, 2.0)
    lrs: tuple[float, ...] = (0.012, 0.006)
    batch_size: int = 4
    world: int = 5
    steps: int = 40_000
    cool_steps: int = 4_000
    replicas: int = 24
    flow_steps: int = 600
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(lrs=(0.01,), steps=24_000, replicas=16, flow_steps=200)


@final
class Stationary(NamedTuple):
    """Stationary points of a world; `grams` writes W'W and UU' as a vector of length n.

    Args:
        world: The data distribution.
        equilibrium: The noise equilibrium, I = 0.
        dragged: The predicted stationary point, the end of the averaged drift.
        measured: `grams` after SGD by learning rate, shape (replicas, n).
        path: `grams` along the averaged drift, shape (steps + 1, n).
    """

    world: World
    equilibrium: TwoLayer
    dragged: TwoLayer
    measured: dict[float, Tensor]
    path: Tensor

    def distance(self, gram: Tensor) -> Tensor:
        """Relative distance from the noise equilibrium: shape (..., n) -> (...)."""
        origin = grams(self.equilibrium)
        return torch.linalg.norm(gram - origin, dim=-1) / torch.linalg.norm(origin)

    def share(self, gram: Tensor) -> Tensor:
        """Component along the predicted displacement, over the predicted displacement: shape (..., n) -> (...)."""
        origin = grams(self.equilibrium)
        displacement = grams(self.dragged) - origin
        return (gram - origin) @ displacement / displacement.square().sum()


Outcome = dict[str, Stationary]


def run(config: Config) -> Outcome:
    """Follow the averaged drift and SGD to their stationary points, for the generic world and the three controls."""
    generator = torch.Generator().manual_seed(config.seed)
    worlds = _worlds(config)
    hidden = {name: 1 if name == "one hidden unit" else config.hidden for name in WORLDS}
    equilibria = {
        name: two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, hidden[name])
        for name, world in worlds.items()
    }
    flows = {name: valley_flow(worlds[name], equilibria[name], config.flow_steps) for name in WORLDS}
    measured: dict[str, dict[float, Tensor]] = {name: {} for name in WORLDS}
    for lr in config.lrs:
        for size in set(hidden.values()):
            names = [name for name in WORLDS if hidden[name] == size]
            stack = _simulate(config, [(worlds[n], equilibria[n]) for n in names], size, lr, generator)
            for name, gram in zip(names, stack.unflatten(0, (len(names), -1)), strict=True):
                measured[name][lr] = gram
    return {
        name: Stationary(worlds[name], equilibria[name], flows[name][0], measured[name], flows[name][1])
        for name in WORLDS
    }


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    generic = outcome["generic"]
    predicted = generic.distance(grams(generic.dragged)).item()
    verdicts = []
    for lr, gram in generic.measured.items():
        shares = generic.share(gram)
        verdicts.append(
            Claim(
                f"generic, lr {lr:g}: share of the predicted drag",
                predicted=1.0,
                measured=shares.mean().item(),
                low=0.7,
                high=1.3,
                error=standard_error(shares),
                wrong={"rest at I = 0": 0.0, "vanishing with lr": 0.5},
            )
        )
    finest = min(config.lrs)
    miss = torch.linalg.norm(generic.measured[finest].mean(0) - grams(generic.dragged))
    verdicts += [
        Claim("generic: predicted distance from I = 0", 0.089, predicted, low=0.05),
        Claim(
            f"generic, lr {finest:g}: distance from the predicted point",
            predicted=0.0,
            measured=(miss / torch.linalg.norm(grams(generic.equilibrium))).item(),
            high=0.5 * predicted,
            wrong={"rest at I = 0": predicted},
        ),
    ]
    for name in WORLDS[1:]:
        point = outcome[name]
        gram = point.measured[finest]
        verdicts += [
            Claim(f"{name}: predicted distance", 0.0, point.distance(grams(point.dragged)).item(), high=1e-3),
            Claim(
                f"{name}: distance from I = 0",
                predicted=0.0,
                measured=point.distance(gram.mean(0)).item(),
                high=0.4 * predicted,
                error=_error(point, gram),
                wrong={"the generic drag": predicted},
            ),
        ]
    return verdicts


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the distance from I = 0 along the averaged drift, and that of SGD, for every world."""
    figure = style.panels(2)
    path, ends = figure.subplots(1, 2)
    for (name, point), mark in zip(outcome.items(), ("-", "--", ":", "-."), strict=True):
        path.plot(point.distance(point.path), linestyle=mark, color="black", linewidth=1.2, label=name)
    path.set(xlabel="steps of the averaged flow", ylabel="distance from I = 0", title="predicted drag")
    path.legend(fontsize=7)
    for position, point in enumerate(outcome.values()):
        predicted = point.distance(grams(point.dragged)).item()
        ends.plot([position - 0.3, position + 0.3], [predicted] * 2, **style.PREDICTED)
        for (lr, gram), mark in zip(point.measured.items(), "o^s", strict=False):
            label = f"SGD, lr {lr:g}" if position == 0 else None
            ends.plot(position, point.distance(gram.mean(0)), mark, color=style.MEASURED["color"], label=label)
    ends.set_xticks(range(len(outcome)), [name.replace(" ", "\n", 1) for name in outcome], fontsize=7)
    ends.set(ylabel="distance from I = 0", title="SGD; dashed: predicted")
    ends.legend(fontsize=7)
    return figure


def _worlds(config: Config) -> dict[str, World]:
    """The four data distributions, with equal spectra of inputs and V; directions and label noise differ."""
    generator = torch.Generator().manual_seed(config.world)  # a setting, independent of the seed

    def basis(columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(config.size, columns, generator=generator, dtype=torch.float64)).Q

    inputs, noise = (geometric(ends, config.size) for ends in (config.input_variances, config.noise_variances))
    left, right, values = basis(config.hidden), basis(config.hidden), geometric((1.5, 0.7), config.hidden)
    eye = torch.eye(config.size, dtype=torch.float64)[:, : config.hidden]
    target = (left * values) @ right.mT
    return {
        "generic": World(target, inputs, noise),
        "aligned": World((eye * values) @ eye.mT, inputs, noise),
        "isotropic label noise": World(target, inputs, noise.mean().expand(config.size).clone()),
        "one hidden unit": World(1.5 * left[:, :1] @ right[:, :1].mT, inputs, noise),
    }


def _simulate(
    config: Config, starts: list[tuple[World, TwoLayer]], hidden: int, lr: float, generator: torch.Generator
) -> Tensor:
    """`grams` of every replica, averaged over 8 snapshots of the second half of SGD: shape (worlds * replicas, n)."""
    common: dict[str, Any] = {"model": LinearPair(config.size, hidden, config.size), "loss": linear_pair.loss}
    # The drift per step is proportional to the square of the learning rate.
    steps = int(config.steps * (max(config.lrs) / lr) ** 2)
    snapshots = 8
    params = linear_pair.replicated([start for start in starts for _ in range(config.replicas)])
    cooled_grams = []
    for part in range(snapshots + 1):
        # Gradient descent from a snapshot conserves the charge, and the fast fluctuation decays.
        params = simulate(
            dynamics=SGD(lr, config.batch_size),
            data=linear_pair.standard_normal(config.size, config.size),
            steps=steps // 2 if part == 0 else steps // (2 * snapshots),
            start=params,
            generator=generator,
            record=steps,
            **common,
        ).params
        if part:
            cooled = simulate(
                dynamics=GradientDescent(0.02),
                data=linear_pair.population(config.size, config.size),
                steps=config.cool_steps // 4,
                start=params,
                record=steps,
                **common,
            ).params
            cooled_grams.append(grams(linear_pair.weights_of(cooled)))
    return torch.stack(cooled_grams).mean(0)


def _error(point: Stationary, gram: Tensor) -> float:
    """Upper bound on the standard error of the relative distance: the norm of the standard errors of all entries."""
    spread = gram.std(0).norm() / len(gram) ** 0.5
    return (spread / torch.linalg.norm(grams(point.equilibrium))).item()

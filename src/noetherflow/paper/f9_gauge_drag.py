r"""F9: gauge drag, where SGD rests a little off the noise equilibrium.

The charge of two linear layers obeys $dC/dt = 2\sigma^2 I$, but with more than one hidden unit it fixes the point of
the valley only up to a rotation. Averaged over the fast fluctuation around the valley, of covariance X with
$H X + X H = 2\sigma^2 \Sigma$, SGD drifts along it by $v = -\tfrac12 P\,\nabla\,\mathrm{Tr}[H X]$, where P projects
on the valley. Where $\Sigma$ and H do not commute, $W^T W$ and $U U^T$ come to rest while the hidden units keep
rotating: $\dot C = [\Omega, C] \neq 0$, so $I \neq 0$. That point is off the one with $I = 0$ by a distance that does
not shrink with the learning rate.

Source: our own; the drift along a valley is that of Li, Wang, Arora (2022), *What happens after SGD reaches zero loss?*
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad, jacrev

from noetherflow._optimizers import SGD
from noetherflow.linear import TwoLayer, two_layer_equilibrium
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.linear_pair import LinearPair, World
from noetherflow.paper.measure import geometric, standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Gauge drag: where SGD rests a little off the noise equilibrium"
WORLDS = ("generic", "aligned", "isotropic label noise", "one hidden unit")


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

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
        """Reduced sizes, whose verdicts still mean something."""
        return cls(lrs=(0.01,), steps=24_000, replicas=16, flow_steps=200)


@final
class Rest(NamedTuple):
    """Where one world comes to rest, as W'W and UU' in one vector."""

    world: World
    equilibrium: TwoLayer
    dragged: TwoLayer
    measured: dict[float, Tensor]
    path: Tensor

    def distance(self, gram: Tensor) -> Tensor:
        """Relative distance from the noise equilibrium; shape (...)."""
        here = grams(self.equilibrium)
        return torch.linalg.norm(gram - here, dim=-1) / torch.linalg.norm(here)

    def share(self, gram: Tensor) -> Tensor:
        """How much of the predicted way from the noise equilibrium a point has gone; shape (...)."""
        here = grams(self.equilibrium)
        way = grams(self.dragged) - here
        return (gram - here) @ way / way.square().sum()


Outcome = dict[str, Rest]


def run(config: Config) -> Outcome:
    """Follow the drift along the valley to its rest, and SGD to its own, in a generic world and three controls."""
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
            found = _simulate(config, [(worlds[n], equilibria[n]) for n in names], size, lr, generator)
            for name, gram in zip(names, found.unflatten(0, (len(names), -1)), strict=True):
                measured[name][lr] = gram
    return {
        name: Rest(worlds[name], equilibria[name], flows[name][0], measured[name], flows[name][1]) for name in WORLDS
    }


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    generic = outcome["generic"]
    predicted = generic.distance(grams(generic.dragged)).item()
    found = []
    for lr, gram in generic.measured.items():
        shares = generic.share(gram)
        found.append(
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
    found += [
        Claim("generic: predicted distance from I = 0", 0.089, predicted, low=0.05),
        Claim(
            f"generic, lr {finest:g}: distance from the predicted rest",
            predicted=0.0,
            measured=(miss / torch.linalg.norm(grams(generic.equilibrium))).item(),
            high=0.5 * predicted,
            wrong={"rest at I = 0": predicted},
        ),
    ]
    for name in WORLDS[1:]:
        rest = outcome[name]
        gram = rest.measured[finest]
        found += [
            Claim(f"{name}: predicted distance", 0.0, rest.distance(grams(rest.dragged)).item(), high=1e-3),
            Claim(
                f"{name}: distance from I = 0",
                predicted=0.0,
                measured=rest.distance(gram.mean(0)).item(),
                high=0.4 * predicted,
                error=_error(rest, gram),
                wrong={"the generic drag": predicted},
            ),
        ]
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """The predicted way from I = 0 to rest, and where SGD ends, in every world."""
    figure = style.panels(2)
    way, ends = figure.subplots(1, 2)
    for (name, rest), mark in zip(outcome.items(), ("-", "--", ":", "-."), strict=True):
        way.plot(rest.distance(rest.path), linestyle=mark, color="black", linewidth=1.2, label=name)
    way.set(xlabel="steps of the averaged flow", ylabel="distance from I = 0", title="predicted drag")
    way.legend(fontsize=7)
    for position, rest in enumerate(outcome.values()):
        predicted = rest.distance(grams(rest.dragged)).item()
        ends.plot([position - 0.3, position + 0.3], [predicted] * 2, **style.PREDICTED)
        for (lr, gram), mark in zip(rest.measured.items(), "o^s", strict=False):
            label = f"SGD, lr {lr:g}" if position == 0 else None
            ends.plot(position, rest.distance(gram.mean(0)), mark, color=style.MEASURED["color"], label=label)
    ends.set_xticks(range(len(outcome)), [name.replace(" ", "\n", 1) for name in outcome], fontsize=7)
    ends.set(ylabel="distance from I = 0", title="where SGD rests; dashed: predicted")
    ends.legend(fontsize=7)
    return figure


def grams(weights: TwoLayer) -> Tensor:
    """W'W and UU', which no rotation of the hidden units changes, in one vector."""
    inner, outer = weights.w.mT @ weights.w, weights.u @ weights.u.mT
    return torch.cat([inner.flatten(-2), outer.flatten(-2)], dim=-1)


def valley_flow(world: World, start: TwoLayer, steps: int) -> tuple[TwoLayer, Tensor]:
    """Follow the averaged drift from a point of the valley until nothing but rotation is left.

    Args:
        world: The data.
        start: A point with U W = V.
        steps: How many steps, of a tenth of the relaxation time of the slowest charge or less.

    Returns:
        The last point, and W'W and UU' along the way, shape (steps + 1, n).
    """
    theta, shapes = torch.cat([start.u.reshape(-1), start.w.reshape(-1)]), (start.u.shape, start.w.shape)
    path = [grams(start)]
    for _ in range(steps):
        drift, rate = valley_drift(world, theta, shapes)
        theta = _back_to_valley(world, theta + 0.1 / rate * drift, shapes)
        path.append(grams(_split(theta, shapes)))
    return _split(theta, shapes), torch.stack(path)


def valley_drift(world: World, theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, float]:
    r"""The mean velocity along the valley for $2\sigma^2 = 1$, and a rate that bounds how fast it changes.

    Args:
        world: The data.
        theta: U and W flattened, at a point of the valley.
        shapes: Of U and of W.

    Returns:
        $-\tfrac12 P\,\nabla \mathrm{Tr}[H X]$ of the shape of theta, with $HX + XH = \Sigma$; and the rate.
    """
    covariance = world.input_cov

    def mean_loss(theta: Tensor) -> Tensor:
        u, w = _split(theta, shapes)
        error = u @ w - world.target
        return (error @ covariance @ error.mT).trace()

    hessian_of = jacrev(jacrev(mean_loss))
    normals = _normals(theta, shapes)
    hessian = 2 * normals @ torch.kron(torch.eye(len(world.target), dtype=theta.dtype), covariance) @ normals.mT
    noise = 4 * normals @ torch.kron(world.noise_cov, covariance) @ normals.mT
    values, vectors = torch.linalg.eigh(hessian)
    fast = values > 1e-9 * values[-1]
    pairs = values[:, None] + values
    inner = torch.where(fast[:, None] & fast, vectors.mT @ noise @ vectors / pairs, 0.0)
    spread = vectors @ inner @ vectors.mT
    slope = grad(lambda point: (hessian_of(point) * spread).sum())(theta)
    slow = vectors[:, ~fast]
    return -0.5 * slow @ (slow.mT @ slope), (noise.trace() / theta.square().sum()).item()


def _normals(theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
    """The derivatives of every entry of U W, as columns: shape (parameters, entries)."""

    def product(theta: Tensor) -> Tensor:
        u, w = _split(theta, shapes)
        return (u @ w).reshape(-1)

    jacobian: Tensor = jacrev(product)(theta)
    return jacobian.mT


def _back_to_valley(world: World, theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
    for _ in range(4):
        u, w = _split(theta, shapes)
        normals = _normals(theta, shapes)
        theta = theta - torch.linalg.pinv(normals.mT) @ (u @ w - world.target).reshape(-1)
    return theta


def _split(theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> TwoLayer:
    u, w = theta.split([shape.numel() for shape in shapes])
    return TwoLayer(u.reshape(shapes[0]), w.reshape(shapes[1]))


def _worlds(config: Config) -> dict[str, World]:
    """The same spectra throughout; only directions and label noise differ."""
    generator = torch.Generator().manual_seed(config.world)  # a setting, not a draw

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
    """W'W and UU' of every replica, averaged over the late half of a run and cooled; shape (worlds * replicas, n)."""
    common: dict[str, Any] = {"model": LinearPair(config.size, hidden, config.size), "loss": linear_pair.loss}
    # The drift goes with the square of the learning rate.
    steps = int(config.steps * (max(config.lrs) / lr) ** 2)
    late = 8
    params = linear_pair.replicated([start for start in starts for _ in range(config.replicas)])
    found = []
    for part in range(late + 1):
        # A snapshot is cooled by full gradients, which move no charge and let the fast fluctuation die.
        params = simulate(
            dynamics=SGD(lr, config.batch_size),
            data=linear_pair.standard_normal(config.size, config.size),
            steps=steps // 2 if part == 0 else steps // (2 * late),
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
            found.append(grams(linear_pair.weights_of(cooled)))
    return torch.stack(found).mean(0)


def _error(rest: Rest, gram: Tensor) -> float:
    """Standard error of the distance of the mean, along the way out."""
    spread = gram.std(0).norm() / len(gram) ** 0.5
    return (spread / torch.linalg.norm(grams(rest.equilibrium))).item()

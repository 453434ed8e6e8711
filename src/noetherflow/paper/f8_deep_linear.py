r"""F8: deep linear networks end at the closed form, every middle layer a scaled rotation.

At the noise equilibrium of $|W_D \cdots W_1 x - y|^2$ all singular values of every middle layer are one number
k, and those of $W_1 \Sigma_x^{1/2}$ and $\Sigma_\epsilon^{1/2} W_D$ are known too. Where hidden layers are wider than
the target's rank, a middle layer may carry a block that no gradient reaches: it stays as it was.

Source: Ziyin et al. (2024), the equilibrium of deep linear networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from noetherflow._optimizers import SGD
from noetherflow._types import Params
from noetherflow.linear import deep_equilibrium, deep_noise
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.measure import geometric, standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Deep linear networks: the closed form, every middle layer a scaled rotation"


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

    depths: tuple[int, ...] = (3, 4, 5)
    width: int = 4
    condition: float = 5.0
    label_noise: float = 0.5
    lr: float = 0.005
    batch_size: int = 1
    warmup_steps: int = 20_000
    steps: int = 200_000
    cool_steps: int = 4_000
    replicas: int = 8
    spare_rank: int = 2
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes, whose verdicts still mean something."""
        return cls(depths=(3,), lr=0.01, steps=40_000, warmup_steps=8_000, replicas=6)


@final
class Problem(NamedTuple):
    """A target of full rank, covariances in random directions, and their square roots."""

    target: Tensor
    input_root: Tensor
    noise_root: Tensor

    @property
    def covariances(self) -> tuple[Tensor, Tensor]:
        """Of the inputs and of the label noise."""
        return self.input_root @ self.input_root, self.noise_root @ self.noise_root

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh examples."""
        x, noise = torch.randn(2, count, len(self.target), generator=generator, dtype=torch.float64)
        x = x @ self.input_root
        return x, x @ self.target.mT + noise @ self.noise_root

    def population(self) -> tuple[Tensor, Tensor]:
        """A noiseless data set with exactly the input covariance."""
        x = len(self.target) ** 0.5 * self.input_root
        return x, x @ self.target.mT

    def imbalance(self, weights: Sequence[Tensor]) -> Tensor:
        """The worst relative difference between both sides of a balance equation."""
        sides = deep_noise(weights, *self.covariances)
        return torch.stack(
            [torch.linalg.norm(a - b) / (torch.linalg.norm(a) + torch.linalg.norm(b)) for a, b in sides]
        ).max()


@final
class Depth(NamedTuple):
    """What one depth gave: singular values over predicted ones at start and end, and the imbalance at both lrs."""

    depth: int
    closed_form_error: float
    middle_start: Tensor
    middle: Tensor
    ends_start: Tensor
    ends: Tensor
    imbalance_start: Tensor
    imbalance: Tensor
    finer_imbalance: Tensor | None


@final
class Outcome(NamedTuple):
    """Every depth, and how far a spare block moved."""

    depths: list[Depth]
    spare_moved: float
    spare_size: float


def run(config: Config) -> Outcome:
    """Every depth from Kaiming with a ramp; the first once more with a finer step; a target of lower rank."""
    generator = torch.Generator().manual_seed(config.seed)
    problem = _problem(config, generator)
    depths = [_depth(config, problem, depth, generator) for depth in config.depths]
    return Outcome(depths, *_spare_block(config, problem, generator))


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    found = []
    for one in outcome.depths:
        name = f"D = {one.depth}"
        found += [
            Claim(f"{name}: closed form, worst imbalance", 0.0, one.closed_form_error, high=1e-10),
            Claim(
                f"{name}: singular values of middle layers over k",
                predicted=1.0,
                measured=one.middle.mean().item(),
                low=0.9,
                high=1.1,
                error=standard_error(one.middle.flatten(1).mean(1)),
            ),
            Claim(
                f"{name}: of the outer layers, mean error",
                predicted=0.0,
                measured=(one.ends - 1).abs().mean().item(),
                high=0.08,
                wrong={"the start": (one.ends_start - 1).abs().mean().item()},
            ),
            Claim(
                f"{name}: worst balance residual",
                predicted=0.0,
                measured=one.imbalance.mean().item(),
                high=0.15,
                error=standard_error(one.imbalance),
                wrong={"the start": one.imbalance_start.mean().item()},
            ),
        ]
        if one.finer_imbalance is not None:
            ratio = one.finer_imbalance.mean() / one.imbalance.mean()
            found.append(Claim(f"{name}: and at half the lr, over this", 0.7, ratio.item(), high=1.0))
    found.append(
        Claim(
            "spare block of a middle layer, relative motion", 0.0, outcome.spare_moved / outcome.spare_size, high=0.05
        )
    )
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """Singular values over predicted ones, before and after training, for every depth."""
    figure = style.panels(2)
    middle, ends = figure.subplots(1, 2)
    for axes, start, end, title in (
        (middle, "middle_start", "middle", "middle layers: singular values / k"),
        (ends, "ends_start", "ends", "outer layers: singular values / predicted"),
    ):
        for position, one in enumerate(outcome.depths):
            for shift, name, look, mark in ((-0.15, start, style.CONTRAST, "^"), (0.15, end, style.MEASURED, "o")):
                values = getattr(one, name).flatten()
                spread = position + shift + torch.linspace(-0.1, 0.1, len(values))
                label = {start: "start", end: "after SGD"}[name] if position == 0 else None
                axes.plot(spread, values, mark, **(look | {"markersize": 2.5}), label=label)
        axes.axhline(1, **style.PREDICTED)
        axes.set_xticks(range(len(outcome.depths)), [f"D = {one.depth}" for one in outcome.depths])
        axes.set(yscale="log", title=title)
        axes.legend(fontsize=7)
    return figure


def _depth(config: Config, problem: Problem, depth: int, generator: torch.Generator) -> Depth:
    start = _kaiming(config, depth, generator)
    closed = deep_equilibrium(problem.target, *problem.covariances, depth)
    end = _train(config, problem, depth, start, 1.0, generator)
    finer = _train(config, problem, depth, start, 0.5, generator) if depth == config.depths[0] else None
    ends = [_singular(problem, params, closed) for params in (start, end)]
    return Depth(
        depth,
        closed_form_error=problem.imbalance(closed).item(),
        middle_start=ends[0][0],
        middle=ends[1][0],
        ends_start=ends[0][1],
        ends=ends[1][1],
        imbalance_start=_imbalances(problem, start),
        imbalance=_imbalances(problem, end),
        finer_imbalance=None if finer is None else _imbalances(problem, finer),
    )


def _train(
    config: Config, problem: Problem, depth: int, start: Params, factor: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """SGD with a ramp, then cooled by full gradients, at a factor of the lr for the inverse factor of steps."""
    ramp = config.warmup_steps / factor
    hot = simulate(
        _network(config.width, depth),
        _loss,
        problem.sample,
        SGD(factor * config.lr, config.batch_size),
        steps=int(config.steps / factor),
        start=start,
        schedule=lambda step: min(1.0, (step + 1) / ramp),
        generator=generator,
        record=int(config.steps / factor),
    )
    cooled = simulate(
        _network(config.width, depth),
        _loss,
        problem.population(),
        GradientDescent(config.lr),
        steps=config.cool_steps,
        start=hot.params,
        record=config.cool_steps,
    )
    return cooled.params


def _spare_block(config: Config, problem: Problem, generator: torch.Generator) -> tuple[float, float]:
    """How far a block on spare directions moves from equilibrium, for a target of lower rank; and its size."""
    left, values, right = torch.linalg.svd(problem.target)
    rank = config.spare_rank
    low = problem._replace(target=(left[:, :rank] * values[:rank]) @ right[:rank])
    inner, middle, outer = deep_equilibrium(low.target, *low.covariances, 3)
    width, spare = config.width, config.width - rank
    block = _normal(spare, spare, generator=generator)
    weights = (
        torch.cat([inner, torch.zeros(spare, width, dtype=torch.float64)]),
        torch.block_diag(middle, block),
        torch.cat([outer, torch.zeros(width, spare, dtype=torch.float64)], dim=1),
    )
    # A little off, so that staying is no matter of exact zeros.
    start = {
        f"{index}.weight": (weight + 0.01 * _normal(width, width, generator=generator)).unsqueeze(0)
        for index, weight in enumerate(weights)
    }
    end = simulate(
        _network(width, 3),
        _loss,
        low.sample,
        SGD(config.lr, config.batch_size),
        steps=config.steps // 10,
        start=start,
        generator=generator,
        record=config.steps,
    ).params["1.weight"][0]
    return torch.linalg.norm(end[rank:, rank:] - block).item(), torch.linalg.norm(block).item()


def _singular(problem: Problem, params: Params, closed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Singular values over predicted ones: of all middle layers, and of both outer ones; shape (replicas, ...)."""
    layers = list(params.values())
    k = closed[1][0, 0]
    middle = torch.stack([torch.linalg.svdvals(layer) / k for layer in layers[1:-1]], dim=1)

    def whitened(first: Tensor, last: Tensor) -> Tensor:
        return torch.stack(
            [torch.linalg.svdvals(first @ problem.input_root), torch.linalg.svdvals(problem.noise_root @ last)], dim=-2
        )

    return middle, whitened(layers[0], layers[-1]) / whitened(closed[0], closed[-1])


def _imbalances(problem: Problem, params: Params) -> Tensor:
    replicas = len(next(iter(params.values())))
    return torch.stack([problem.imbalance([stack[r] for stack in params.values()]) for r in range(replicas)])


def _problem(config: Config, generator: torch.Generator) -> Problem:
    def root() -> Tensor:
        basis = torch.linalg.qr(_normal(config.width, config.width, generator=generator)).Q
        return (basis * geometric((config.condition**-0.25, config.condition**0.25), config.width)) @ basis.mT

    target = _normal(config.width, config.width, generator=generator) / config.width**0.5
    # A target that is nearly singular would take very long to fit.
    left, values, right = torch.linalg.svd(target)
    target = (left * values.clamp_min(0.4)) @ right
    return Problem(target, root(), config.label_noise * root())


def _kaiming(config: Config, depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    scale = (1 / config.width) ** 0.5
    shape = config.replicas, config.width, config.width
    return {f"{layer}.weight": scale * _normal(*shape, generator=generator) for layer in range(depth)}


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _network(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(depth)))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)

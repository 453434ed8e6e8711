r"""F8: SGD on deep linear networks ends at the closed form, where every middle layer is a scaled rotation.

Question: does SGD on a deep linear network converge to the noise equilibrium that the balance equations give?

Setting: $\ell = |W_D \cdots W_1 x - y|^2$ with $y = V x + \epsilon$, V of full rank, and depths D from 3 to 5. In a
further run V has a lower rank: then a middle layer has a block between unused directions, without gradient at the
minimum.

Formula: with $\Sigma_\epsilon^{1/2} V \Sigma_x^{1/2} = L S R^T$ all singular values of every middle layer are
$k = [(\mathrm{Tr}\,S)^2 / (\mathrm{Tr}\,\Sigma_x\,\mathrm{Tr}\,\Sigma_\epsilon)]^{1/(2D)}$, and those of
$W_1 \Sigma_x^{1/2}$ and $\Sigma_\epsilon^{1/2} W_D$ are multiples of $S^{1/2}$ (`noetherflow.linear.deep_equilibrium`).

Falsified by: a closed form that does not satisfy the balance equations; singular values after SGD that differ from the
predicted values; balance residuals that do not decrease with the learning rate; motion of the block without gradient.

Source: Ziyin et al. (2024), the equilibrium of deep linear networks.
"""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow._types import Params
from noetherflow.linear import deep_equilibrium
from noetherflow.optimizers import SGD
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f8_problem import Config, Problem, kaiming, loss, make_problem, network, normal
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Deep linear networks: the closed form, every middle layer a scaled rotation"


@final
class Depth(NamedTuple):
    """Results for a depth.

    Args:
        depth: D.
        closed_form_error: Imbalance of the closed form, which is zero up to rounding.
        middle_start: Initial singular values of the middle layers over k, shape (replicas, D - 2, width).
        middle: Final singular values of the middle layers over k.
        ends_start: Initial singular values of the first and last layer over their predictions, (replicas, 2, width).
        ends: Final singular values of the first and last layer over their predictions.
        imbalance_start: Initial imbalance, shape (replicas,).
        imbalance: Final imbalance.
        finer_imbalance: Final imbalance at half the learning rate with twice the steps; None if not run.
    """

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
    """Results of every depth; the distance by which the block without gradient moved, and the norm of the block."""

    depths: list[Depth]
    spare_moved: float
    spare_size: float


def run(config: Config) -> Outcome:
    """Simulate every depth from Kaiming initialisation with a linear ramp of the learning rate, and V of lower rank."""
    generator = torch.Generator().manual_seed(config.seed)
    problem = make_problem(config, generator)
    depths = [_depth(config, problem, depth, generator) for depth in config.depths]
    return Outcome(depths, *_spare_block(config, problem, generator))


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    verdicts = []
    for result in outcome.depths:
        name = f"D = {result.depth}"
        verdicts += [
            Claim(f"{name}: closed form, worst imbalance", 0.0, result.closed_form_error, high=1e-10),
            Claim(
                f"{name}: singular values of middle layers over k",
                predicted=1.0,
                measured=result.middle.mean().item(),
                low=0.9,
                high=1.1,
                error=standard_error(result.middle.flatten(1).mean(1)),
            ),
            Claim(
                f"{name}: singular values of outer layers, mean error",
                predicted=0.0,
                measured=(result.ends - 1).abs().mean().item(),
                high=0.08,
                wrong={"the start": (result.ends_start - 1).abs().mean().item()},
            ),
            Claim(
                f"{name}: worst balance residual",
                predicted=0.0,
                measured=result.imbalance.mean().item(),
                high=0.15,
                error=standard_error(result.imbalance),
                wrong={"the start": result.imbalance_start.mean().item()},
            ),
        ]
        if result.finer_imbalance is not None:
            ratio = result.finer_imbalance.mean() / result.imbalance.mean()
            text = f"{name}: worst balance residual, at half the lr over at the lr"
            verdicts.append(Claim(text, 0.7, ratio.item(), high=1.0))
    verdicts.append(
        Claim(
            "spare block of a middle layer, relative motion", 0.0, outcome.spare_moved / outcome.spare_size, high=0.05
        )
    )
    return verdicts


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the singular values over their predictions, before and after training, for every depth."""
    figure = style.panels(2)
    middle, ends = figure.subplots(1, 2)
    for axes, start, end, title in (
        (middle, "middle_start", "middle", "middle layers: singular values / k"),
        (ends, "ends_start", "ends", "outer layers: singular values / predicted"),
    ):
        for position, result in enumerate(outcome.depths):
            for shift, name, look, mark in ((-0.15, start, style.CONTRAST, "^"), (0.15, end, style.MEASURED, "o")):
                values = getattr(result, name).flatten()
                spread = position + shift + torch.linspace(-0.1, 0.1, len(values))
                label = {start: "start", end: "after SGD"}[name] if position == 0 else None
                axes.plot(spread, values, mark, **(look | {"markersize": 2.5}), label=label)
        axes.axhline(1, **style.PREDICTED)
        axes.set_xticks(range(len(outcome.depths)), [f"D = {result.depth}" for result in outcome.depths])
        axes.set(yscale="log", title=title)
        axes.legend(fontsize=7)
    return figure


def _depth(config: Config, problem: Problem, depth: int, generator: torch.Generator) -> Depth:
    """Simulate a depth, the first depth also at half the learning rate, and compare with the closed form."""
    start = kaiming(config, depth, generator)
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
    """Run SGD with a ramp, then gradient descent; `factor` multiplies the learning rate and divides the steps."""
    ramp = config.warmup_steps / factor
    trajectory = simulate(
        network(config.width, depth),
        loss,
        problem.sample,
        SGD(factor * config.lr, config.batch_size),
        steps=int(config.steps / factor),
        start=start,
        schedule=lambda step: min(1.0, (step + 1) / ramp),
        generator=generator,
        record=int(config.steps / factor),
    )
    cooled = simulate(
        network(config.width, depth),
        loss,
        problem.population(),
        GradientDescent(config.lr),
        steps=config.cool_steps,
        start=trajectory.params,
        record=config.cool_steps,
    )
    return cooled.params


def _spare_block(config: Config, problem: Problem, generator: torch.Generator) -> tuple[float, float]:
    """For V of lower rank: the distance that SGD moves the block without gradient, and the norm of the block."""
    left, values, right = torch.linalg.svd(problem.target)
    rank = config.spare_rank
    low = problem._replace(target=(left[:, :rank] * values[:rank]) @ right[:rank])
    inner, middle, outer = deep_equilibrium(low.target, *low.covariances, 3)
    width, spare = config.width, config.width - rank
    block = normal(spare, spare, generator=generator)
    weights = (
        torch.cat([inner, torch.zeros(spare, width, dtype=torch.float64)]),
        torch.block_diag(middle, block),
        torch.cat([outer, torch.zeros(width, spare, dtype=torch.float64)], dim=1),
    )
    # Perturb the equilibrium: with exact zeros the gradient of the block would vanish identically.
    start = {
        f"{index}.weight": (weight + 0.01 * normal(width, width, generator=generator)).unsqueeze(0)
        for index, weight in enumerate(weights)
    }
    end = simulate(
        network(width, 3),
        loss,
        low.sample,
        SGD(config.lr, config.batch_size),
        steps=config.steps // 10,
        start=start,
        generator=generator,
        record=config.steps,
    ).params["1.weight"][0]
    return torch.linalg.norm(end[rank:, rank:] - block).item(), torch.linalg.norm(block).item()


def _singular(problem: Problem, params: Params, closed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Singular values over predictions: middle layers (replicas, D - 2, width), outer layers (replicas, 2, width)."""
    layers = list(params.values())
    k = closed[1][0, 0]
    middle = torch.stack([torch.linalg.svdvals(layer) / k for layer in layers[1:-1]], dim=1)

    def whitened(first: Tensor, last: Tensor) -> Tensor:
        return torch.stack(
            [torch.linalg.svdvals(first @ problem.input_root), torch.linalg.svdvals(problem.noise_root @ last)], dim=-2
        )

    return middle, whitened(layers[0], layers[-1]) / whitened(closed[0], closed[-1])


def _imbalances(problem: Problem, params: Params) -> Tensor:
    """Imbalance of every replica, shape (replicas,)."""
    replicas = len(next(iter(params.values())))
    return torch.stack([problem.imbalance([stack[r] for stack in params.values()]) for r in range(replicas)])

r"""F2: SGD on a matrix factorisation converges exponentially to a noise equilibrium that no initialisation changes.

Question: many pairs (U, W) have the product UW = V. Does SGD converge to the same $W^T W$ and $U U^T$ from every
initialisation, and at which rate?

Setting: $\ell = |U W x - y|^2$ with $y = V x + \epsilon$, x and $\epsilon$ Gaussian. V lies in the inputs of least
variance and in the noisiest outputs, so that the noise equilibrium is far from the balance of norms.

Formula: the charge $C = W W^T - U^T U$ obeys $dC/dt = 2\sigma^2 I$ with $I = U^T \Gamma_U U - W \Gamma_W W^T$.
At the minimum
$\Gamma_U = 4\,\mathrm{Tr}\,\Sigma_x\,\Sigma_\epsilon$, $\Gamma_W = 4\,\mathrm{Tr}\,\Sigma_\epsilon\,\Sigma_x$. The
equilibrium I = 0 has the closed form `noetherflow.linear.two_layer_equilibrium`. Gradient descent conserves C.

Falsified by: final $W^T W$ or $U U^T$ that depend on the initialisation or differ from the closed form; balanced norms
instead of balanced noise; a decay rate off by a factor of two; elements of I with a late time mean other than zero.

Source: Ziyin et al. (2024), figure 2.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noetherflow._types import Params
from noetherflow.linear import TwoLayer, noise_factors, two_layer_equilibrium, two_layer_noise
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import SGD
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f2_problem import (
    INITS,
    INNER,
    OUTER,
    ROTATION,
    Config,
    Problem,
    loss,
    make_problem,
    network,
    starts,
)
from noetherflow.paper.measure import slope, standard_error
from noetherflow.simulation import GradientDescent, NoetherFlow, Trajectory, simulate

TITLE = "Matrix factorisation: exponential convergence to the noise equilibrium from anywhere"
# The Noether flow is smooth: a step of the flow takes the time of this many steps of SGD.
_FLOW_STEP = 20


@final
class Outcome(NamedTuple):
    """Trajectories with 4 * replicas replicas, in the order of `INITS`, and a Noether flow for each initialisation.

    `fit` and `sgd` are the first steps and the remaining steps of SGD. `cooled` is gradient descent from the end of
    SGD: it conserves the charge, and the fluctuation of the product UW decays. `gd` starts where `fit` starts.
    """

    problem: Problem
    fit: Trajectory
    sgd: Trajectory
    cooled: Trajectory
    gd: Trajectory
    flows: list[Trajectory]


def run(config: Config) -> Outcome:
    """Simulate SGD and gradient descent from every initialisation, and the Noether flow from a fit of each."""
    generator = torch.Generator().manual_seed(config.seed)
    problem = make_problem(config, generator)
    start = starts(config, problem, generator)
    sgd = SGD(config.lr, config.batch_size)
    observables: dict[str, Callable[[Params], Tensor]] = {
        "imbalance": problem.imbalance,
        "inner": lambda params: params[INNER].mT @ params[INNER],
        "error": lambda params: problem.error(TwoLayer(params[OUTER], params[INNER])),
    }
    common: dict[str, Any] = {"model": network(config), "loss": loss, "symmetries": ROTATION, "generator": generator}
    online: dict[str, Any] = {"data": problem.sample, "observables": observables}
    full: dict[str, Any] = {"data": problem.population(), "observables": observables}
    fit = simulate(dynamics=sgd, steps=config.fit_steps, start=start, **online, **common)
    late = simulate(dynamics=sgd, steps=config.steps - config.fit_steps, start=fit.params, **online, **common)
    descent = GradientDescent(config.lr)
    cooled = simulate(dynamics=descent, steps=config.cool_steps, start=late.params, **full, **common)
    gd = simulate(dynamics=descent, steps=config.steps // 4, start=start, **full, **common)
    fitted = simulate(dynamics=descent, steps=config.cool_steps, start=fit.params, **full, **common)
    flows = [
        _flow(
            config,
            problem,
            sgd,
            {name: stack[init * config.replicas] for name, stack in fitted.params.items()},
            observables,
        )
        for init in range(len(INITS))
    ]
    return Outcome(problem, fit, late, cooled, gd, flows)


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions, for every initialisation."""
    verdicts: list[Claim] = []
    mistakes = _mistakes(config, outcome.problem)
    for index, init in enumerate(INITS):
        replicas = config.replicas_of(index)
        error = outcome.cooled.observables["error"][-1, replicas]
        descent = outcome.gd.observables["error"][-1, replicas]
        imbalance = torch.cat([leg.observables["imbalance"][:, replicas] for leg in (outcome.fit, outcome.sgd)])
        late = imbalance[3 * len(imbalance) // 4 :].mean(0).abs().max()
        early = imbalance[: len(imbalance) // 2].abs().max()
        verdicts += [
            Claim(
                f"{init}: SGD from predicted W'W, UU'",
                predicted=0.0,
                measured=error.mean().item(),
                high=0.04,
                error=standard_error(error),
                wrong=mistakes,
            ),
            Claim(f"{init}: GD from predicted", predicted=1.0, measured=descent.mean().item(), low=0.8),
            Claim(
                f"{init}: GD over SGD",
                predicted=math.inf,
                measured=(descent.mean() / error.mean()).item(),
                low=20.0,
            ),
            Claim(f"{init}: early max |I_ij|/n", predicted=1.0, measured=early.item(), low=0.3),
            Claim(f"{init}: late |time mean I_ij|/n", predicted=0.0, measured=late.item(), high=0.02),
            Claim(
                f"{init}: decay rate over theory",
                predicted=1.0,
                measured=_rate_ratio(config, outcome, index),
                low=0.85,
                high=1.15,
                wrong={"sigma^2 twice as large": 0.5, "sigma^2 half as large": 2.0},
            ),
        ]
    means = outcome.cooled.observables["inner"][-1].unflatten(0, (len(INITS), -1)).mean(1)
    distance = max(torch.linalg.norm(a - b) / torch.linalg.norm(a) for a, b in itertools.combinations(means, 2))
    verdicts.append(
        Claim(
            "final W'W of two inits, largest distance",
            predicted=0.0,
            measured=float(distance),
            high=0.03,
        )
    )
    return verdicts


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the decay of the charge, the elements of I over steps, and the final distance to the prediction."""
    figure = style.panels(3)
    decay, elements, distance = figure.subplots(1, 3)
    _plot_decay(config, outcome, decay)
    replica = 2 * config.replicas
    steps = torch.cat([outcome.fit.steps, outcome.sgd.steps + config.fit_steps])
    imbalance = torch.cat([leg.observables["imbalance"][:, replica] for leg in (outcome.fit, outcome.sgd)])
    rows, columns = torch.triu_indices(config.hidden, config.hidden)
    elements.plot(steps, imbalance[:, rows, columns], linewidth=0.8)
    elements.axhline(0, color="black", linewidth=0.8)
    elements.set(xlabel="steps", ylabel=r"$I_{ij}\, /\, n$", title=f"the {len(rows)} elements of I, one replica")
    _plot_distance(config, outcome, distance)
    return figure


def _flow(
    config: Config,
    problem: Problem,
    sgd: SGD,
    params: dict[str, Tensor],
    observables: dict[str, Callable[[Params], Tensor]],
) -> Trajectory:
    """Simulate the Noether flow from a point of the minimum; the noise there has a closed form."""
    weights = TwoLayer(params[OUTER], params[INNER])
    zero = torch.zeros((), dtype=torch.float64)
    noise = NoiseMoments(
        count=1,
        mean={name: torch.zeros_like(tensor) for name, tensor in params.items()},
        scatter={"hidden": two_layer_noise(weights, noise_factors(problem.input_cov, problem.noise_cov))},
        square_scatter={},
        total_scatter=zero,
        spreads={},
        symmetries=dict(ROTATION),
    )
    steps = (config.steps - config.fit_steps) // _FLOW_STEP
    start = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
    dynamics = NoetherFlow(sgd, dt=_FLOW_STEP * config.lr, noise=noise)
    return simulate(
        network(config),
        loss,
        problem.population(),
        dynamics,
        steps=steps,
        start=start,
        symmetries=ROTATION,
        observables=observables,
    )


def _rate_ratio(config: Config, outcome: Outcome, index: int) -> float:
    """Decay rate of SGD over that of the flow, fitted while the departure of the flow falls from 90 % to 15 %."""
    flow, flow_time = outcome.flows[index], _FLOW_STEP * outcome.flows[index].steps
    decay = _departure(flow, slice(0, 1))
    ends = [flow_time[int((decay <= fraction * decay[0]).nonzero()[0])] for fraction in (0.9, 0.15)]
    slopes = []
    for times, distances in (
        (outcome.sgd.steps, _departure(outcome.sgd, config.replicas_of(index))),
        (flow_time, decay),
    ):
        inside = (times >= ends[0]) & (times <= ends[1])
        slopes.append(slope(times[inside].double(), distances[inside].log()))
    return slopes[0] / slopes[1]


def _departure(trajectory: Trajectory, replicas: slice) -> Tensor:
    """Distance of the mean |W|^2 - |U|^2 over replicas from its late value, shape (records,)."""
    # |W|^2 - |U|^2 is the trace of the charge. Fast fluctuations of the product UW conserve the charge, and rotations
    # of the hidden units conserve its trace.
    trace = trajectory.charges["hidden"][:, replicas].diagonal(dim1=-2, dim2=-1).sum(-1).mean(1)
    return (trace - trace[3 * len(trace) // 4 :].mean()).abs()


def _mistakes(config: Config, problem: Problem) -> dict[str, float]:
    """For each likely mistake in the theory, the distance of its prediction from the equilibrium."""
    identity_x = torch.eye(config.inputs, dtype=torch.float64)
    identity_e = torch.eye(config.outputs, dtype=torch.float64)
    cov_x, cov_e = problem.input_cov, problem.noise_cov
    equilibrium = problem.equilibrium
    ratio = (cov_x.trace() / cov_e.trace()) ** 0.25
    predictions = {
        "norms balanced": two_layer_equilibrium(
            problem.target, identity_x / config.inputs, identity_e / config.outputs, config.hidden
        ),
        "no trace factors": TwoLayer(equilibrium.u * ratio, equilibrium.w / ratio),
        "traces swapped": TwoLayer(equilibrium.u * ratio**2, equilibrium.w / ratio**2),
        "noise taken as isotropic": two_layer_equilibrium(problem.target, cov_x, identity_e, config.hidden),
    }
    return {name: problem.error(weights, equilibrium).item() for name, weights in predictions.items()}


def _plot_decay(config: Config, outcome: Outcome, axes: Axes) -> None:
    """Draw the departure of the charge trace for the two initialisations on the minimum, and the Noether flow."""
    for index, mark in ((2, "-"), (3, ":")):
        steps = outcome.sgd.steps + config.fit_steps
        axes.plot(
            steps,
            _departure(outcome.sgd, config.replicas_of(index)),
            **(style.MEASURED | {"linestyle": mark}),
            label=f"SGD, {INITS[index]}",
        )
        flow = outcome.flows[index]
        label = "Noether flow" if index == 2 else None
        axes.plot(
            _FLOW_STEP * flow.steps + config.fit_steps, _departure(flow, slice(0, 1)), **style.PREDICTED, label=label
        )
    axes.set(
        xlabel="steps",
        ylabel=r"distance of $|W|^2 - |U|^2$ from its late value",
        yscale="log",
        title="exponential approach",
        ylim=(2e-2, None),
    )
    axes.legend()


def _plot_distance(config: Config, outcome: Outcome, axes: Axes) -> None:
    """Draw the final distance to the prediction of every replica, for SGD and gradient descent."""
    position = torch.arange(len(INITS))
    for trajectory, look, mark, label in (
        (outcome.cooled, style.MEASURED, "o", "SGD"),
        (outcome.gd, style.CONTRAST, "^", "gradient descent"),
    ):
        errors = trajectory.observables["error"][-1].unflatten(0, (len(INITS), -1))
        for replica in range(config.replicas):
            legend = label if replica == 0 else None
            axes.plot(
                position + 0.03 * (replica - config.replicas / 2),
                errors[:, replica],
                mark,
                color=look["color"],
                markersize=4,
                label=legend,
            )
    axes.set(yscale="log", ylabel="distance to the prediction", title="final distance", xticks=position.tolist())
    axes.set_xticklabels([init.replace(", ", ",\n") for init in INITS])
    axes.axhline(0.04, **style.PREDICTED, label="edge of the band")
    axes.legend()

r"""F2: matrix factorisation goes to the same noise equilibrium from everywhere, exponentially.

$\ell = |U W x - y|^2$ with $y = V x + \epsilon$. Gradient descent conserves $C = W W^T - U^T U$ and ends where its
initialisation sends it; SGD moves C by $dC/dt = 2\sigma^2 I$, $I = U^T \Gamma_U U - W \Gamma_W W^T$, until $I = 0$. The
target lies in the weakest inputs and the noisiest outputs, so the equilibrium is far from the balance of norms.

Source: Ziyin et al. (2024), figure 2.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from noetherflow._optimizers import SGD
from noetherflow._types import Params
from noetherflow.linear import TwoLayer, noise_factors, two_layer_equilibrium, two_layer_noise
from noetherflow.noise import NoiseMoments
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.measure import slope, standard_error
from noetherflow.simulation import GradientDescent, NoetherFlow, Trajectory, simulate
from noetherflow.symmetry import Axis, MatrixSymmetry

TITLE = "Matrix factorisation: exponential convergence to the noise equilibrium from anywhere"
INNER, OUTER = "0.weight", "1.weight"
ROTATION = {"hidden": MatrixSymmetry(plus=(Axis(INNER, 0),), minus=(Axis(OUTER, 1),))}
# The flow is smooth: one step of it stands for so many of SGD.
_FLOW_STEP = 20
INITS = ("small", "Kaiming", "2U, W/2", "U/4, 4W")


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

    inputs: int = 32
    outputs: int = 28
    hidden: int = 4
    input_variances: tuple[float, ...] = (0.3, 3.0)
    noise_variances: tuple[float, ...] = (0.1, 4.0)
    singular_values: tuple[float, ...] = (1.5, 0.7)
    corner: int = 12
    lr: float = 0.01
    batch_size: int = 32
    steps: int = 40_000
    fit_steps: int = 2_000
    cool_steps: int = 4_000
    replicas: int = 8
    small: float = 0.02
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes, whose verdicts still mean something."""
        return cls(lr=0.02, steps=10_000, fit_steps=1_000, cool_steps=2_000, replicas=4)

    def own(self, index: int) -> slice:
        """The replicas of an initialisation."""
        return slice(index * self.replicas, (index + 1) * self.replicas)


@final
class Problem(NamedTuple):
    """The data distribution and what theory says about it."""

    target: Tensor
    input_cov: Tensor
    noise_cov: Tensor
    minimum: TwoLayer
    equilibrium: TwoLayer

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh examples."""
        x = self.input_cov.diagonal().sqrt() * torch.randn(
            count, len(self.input_cov), generator=generator, dtype=torch.float64
        )
        noise = torch.randn(count, len(self.noise_cov), generator=generator, dtype=torch.float64)
        return x, x @ self.target.mT + self.noise_cov.diagonal().sqrt() * noise

    def population(self) -> tuple[Tensor, Tensor]:
        """A noiseless data set with exactly the input covariance: its full gradient is that of the population."""
        x = (len(self.input_cov) * self.input_cov).sqrt()
        return x, x @ self.target.mT

    def imbalance(self, params: Params) -> Tensor:
        """I / n with n = |U' Gamma_U U| + |W Gamma_W W'|, shape (hidden, hidden)."""
        weights = TwoLayer(params[OUTER], params[INNER])
        plus, minus = two_layer_noise(
            weights, noise_factors(self.input_cov, self.noise_cov, weights.u @ weights.w - self.target)
        )
        return (plus - minus) / (torch.linalg.norm(plus) + torch.linalg.norm(minus))

    def error(self, weights: TwoLayer, reference: TwoLayer | None = None) -> Tensor:
        """Mean relative distance of W'W and UU' from the predicted ones; blind to rotations of the hidden units."""
        reference = reference or self.equilibrium
        inner, outer = weights.w.mT @ weights.w, weights.u @ weights.u.mT
        inner_0, outer_0 = reference.w.mT @ reference.w, reference.u @ reference.u.mT
        distances = (
            torch.linalg.norm(inner - inner_0) / torch.linalg.norm(inner_0),
            torch.linalg.norm(outer - outer_0) / torch.linalg.norm(outer_0),
        )
        return (distances[0] + distances[1]) / 2


@final
class Outcome(NamedTuple):
    """Trajectories; replicas of the initialisations follow each other."""

    problem: Problem
    fit: Trajectory
    sgd: Trajectory
    cooled: Trajectory
    gd: Trajectory
    flows: list[Trajectory]


def run(config: Config) -> Outcome:
    """SGD from everywhere, cooled; gradient descent from the same points; the Noether flow from the fitted ones."""
    generator = torch.Generator().manual_seed(config.seed)
    problem = make_problem(config, generator)
    start = starts(config, problem, generator)
    sgd = SGD(config.lr, config.batch_size)
    observables: dict[str, Callable[[Params], Tensor]] = {
        "imbalance": problem.imbalance,
        "inner": lambda params: params[INNER].mT @ params[INNER],
        "error": lambda params: problem.error(TwoLayer(params[OUTER], params[INNER])),
    }
    common: dict[str, Any] = {"model": _network(config), "loss": _loss, "symmetries": ROTATION, "generator": generator}
    online: dict[str, Any] = {"data": problem.sample, "observables": observables}
    full: dict[str, Any] = {"data": problem.population(), "observables": observables}
    fit = simulate(dynamics=sgd, steps=config.fit_steps, start=start, **online, **common)
    rest = simulate(dynamics=sgd, steps=config.steps - config.fit_steps, start=fit.params, **online, **common)
    descent = GradientDescent(config.lr)
    cooled = simulate(dynamics=descent, steps=config.cool_steps, start=rest.params, **full, **common)
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
    return Outcome(problem, fit, rest, cooled, gd, flows)


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold, for every initialisation."""
    problem, found = outcome.problem, []
    mistakes = _mistakes(config, problem)
    for index, init in enumerate(INITS):
        own = config.own(index)
        error = outcome.cooled.observables["error"][-1, own]
        descent = outcome.gd.observables["error"][-1, own]
        imbalance = torch.cat([leg.observables["imbalance"][:, own] for leg in (outcome.fit, outcome.sgd)])
        late = imbalance[3 * len(imbalance) // 4 :].mean(0).abs().max()
        early = imbalance[: len(imbalance) // 2].abs().max()
        found += [
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
    apart = max(torch.linalg.norm(a - b) / torch.linalg.norm(a) for a, b in itertools.combinations(means, 2))
    found.append(
        Claim(
            "final W'W of two inits, largest distance",
            predicted=0.0,
            measured=float(apart),
            high=0.03,
        )
    )
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """A trajectory against its exponential; the elements of I going to zero; where each initialisation ends."""
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


def make_problem(config: Config, generator: torch.Generator) -> Problem:
    """Draw a target of full rank inside the weakest inputs and the noisiest outputs."""

    def geometric(ends: tuple[float, ...], count: int) -> Tensor:
        return torch.logspace(math.log10(ends[0]), math.log10(ends[1]), count, dtype=torch.float64)

    def directions(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, config.hidden, generator=generator, dtype=torch.float64)).Q

    left, right = (
        torch.zeros(config.outputs, config.hidden).double(),
        torch.zeros(config.inputs, config.hidden).double(),
    )
    left[-config.corner :], right[: config.corner] = directions(config.corner), directions(config.corner)
    values = geometric(config.singular_values, config.hidden)
    input_cov = geometric(config.input_variances, config.inputs).diag()
    noise_cov = geometric(config.noise_variances, config.outputs).diag()
    target = (left * values) @ right.mT
    minimum = TwoLayer(left * values.sqrt(), values.sqrt()[:, None] * right.mT)
    return Problem(
        target, input_cov, noise_cov, minimum, two_layer_equilibrium(target, input_cov, noise_cov, config.hidden)
    )


def starts(config: Config, problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """Replicas of the four initialisations, stacked: shape (4 * replicas, ...)."""

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(config.replicas, rows, columns, generator=generator, dtype=torch.float64)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.expand(config.replicas, *tensor.shape)

    u, w = problem.minimum
    hidden, inputs, outputs = config.hidden, config.inputs, config.outputs
    kaiming = (2 / inputs) ** 0.5, (2 / hidden) ** 0.5
    inner = draw(hidden, inputs, config.small), draw(hidden, inputs, kaiming[0]), repeated(w / 2), repeated(4 * w)
    outer = draw(outputs, hidden, config.small), draw(outputs, hidden, kaiming[1]), repeated(2 * u), repeated(u / 4)
    return {INNER: torch.cat(inner), OUTER: torch.cat(outer)}


def _flow(
    config: Config,
    problem: Problem,
    sgd: SGD,
    params: dict[str, Tensor],
    observables: dict[str, Callable[[Params], Tensor]],
) -> Trajectory:
    """The Noether flow from a point of the minimum, where the noise is known in closed form."""
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
        _network(config),
        _loss,
        problem.population(),
        dynamics,
        steps=steps,
        start=start,
        symmetries=ROTATION,
        observables=observables,
    )


def _rate_ratio(config: Config, outcome: Outcome, index: int) -> float:
    """How much faster SGD decays than the flow, while the flow goes from 90 % to 15 % of its way."""
    flow, flow_time = outcome.flows[index], _FLOW_STEP * outcome.flows[index].steps
    decay = _departure(flow, slice(0, 1))
    ends = [flow_time[int((decay <= fraction * decay[0]).nonzero()[0])] for fraction in (0.9, 0.15)]
    falls = []
    for times, distances in ((outcome.sgd.steps, _departure(outcome.sgd, config.own(index))), (flow_time, decay)):
        inside = (times >= ends[0]) & (times <= ends[1])
        falls.append(slope(times[inside].double(), distances[inside].log()))
    return falls[0] / falls[1]


def _departure(trajectory: Trajectory, replicas: slice) -> Tensor:
    """How far |W|^2 - |U|^2 is from where it settles."""
    # The trace of the charge is moved neither by the fast fluctuation of the product, which conserves charge, nor by
    # rotations of the hidden units.
    trace = trajectory.charges["hidden"][:, replicas].diagonal(dim1=-2, dim2=-1).sum(-1).mean(1)
    return (trace - trace[3 * len(trace) // 4 :].mean()).abs()


def _mistakes(config: Config, problem: Problem) -> dict[str, float]:
    """Where the nearest wrong theories would put the prediction, as distances from the right one."""
    identity_x = torch.eye(config.inputs, dtype=torch.float64)
    identity_e = torch.eye(config.outputs, dtype=torch.float64)
    cov_x, cov_e = problem.input_cov, problem.noise_cov
    right = problem.equilibrium
    ratio = (cov_x.trace() / cov_e.trace()) ** 0.25
    found = {
        "norms balanced": two_layer_equilibrium(
            problem.target, identity_x / config.inputs, identity_e / config.outputs, config.hidden
        ),
        "no trace factors": TwoLayer(right.u * ratio, right.w / ratio),
        "traces swapped": TwoLayer(right.u * ratio**2, right.w / ratio**2),
        "noise taken as isotropic": two_layer_equilibrium(problem.target, cov_x, identity_e, config.hidden),
    }
    return {name: problem.error(weights, right).item() for name, weights in found.items()}


def _plot_decay(config: Config, outcome: Outcome, axes: Axes) -> None:
    for index, mark in ((2, "-"), (3, ":")):
        steps = outcome.sgd.steps + config.fit_steps
        axes.plot(
            steps,
            _departure(outcome.sgd, config.own(index)),
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
        ylabel=r"$|W|^2 - |U|^2$ from its rest",
        yscale="log",
        title="exponential approach",
        ylim=(2e-2, None),
    )
    axes.legend()


def _plot_distance(config: Config, outcome: Outcome, axes: Axes) -> None:
    position = torch.arange(len(INITS))
    for trajectory, look, mark, label in (
        (outcome.cooled, style.MEASURED, "o", "SGD"),
        (outcome.gd, style.CONTRAST, "^", "gradient descent"),
    ):
        errors = trajectory.observables["error"][-1].unflatten(0, (len(INITS), -1))
        for replica in range(config.replicas):
            shown = label if replica == 0 else None
            axes.plot(
                position + 0.03 * (replica - config.replicas / 2),
                errors[:, replica],
                mark,
                color=look["color"],
                markersize=4,
                label=shown,
            )
    axes.set(yscale="log", ylabel="distance to the prediction", title="where they end", xticks=position.tolist())
    axes.set_xticklabels([init.replace(", ", ",\n") for init in INITS])
    axes.axhline(0.04, **style.PREDICTED, label="edge of the band")
    axes.legend()


def _network(config: Config) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.inputs, config.hidden, bias=False, dtype=torch.float64),
        nn.Linear(config.hidden, config.outputs, bias=False, dtype=torch.float64),
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)

r"""F5: norms that only noise can change: one scale for the whole net, or one per layer.

Two-layer nets whose weights are normalised, in Net-A by the norm of all of them, in Net-B layer by layer. What is
invariant grows by $\mathrm{lr}^2 (\mathrm{Tr}\,\Sigma / S + |\nabla L|^2)$ per step under SGD, so that $|\theta|^4$
is linear in time; gradient descent keeps only the second term. Weight decay brings it to rest at
$|\theta|^2 = \mathrm{lr}\,E|g|^2 / 2\,\mathrm{wd}$.

Source: Ziyin et al. (2024), figures 5 and 8.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import grad, vmap

from noetherflow._optimizers import SGD
from noetherflow._types import Params
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.measure import r_squared, standard_error
from noetherflow.simulation import GradientDescent, Trajectory, simulate
from noetherflow.symmetry import Axis, ScalarSymmetry

TITLE = "Scaling symmetry: norms that only noise can change, for a whole net or layer by layer"
NETS = ("Net-A", "Net-B")
# For Net-A only the whole is a symmetry; the layers' norms are watched all the same.
INNER, OUTER = Axis("inner", 0), Axis("outer", 0)
NORMS = {
    "whole": ScalarSymmetry(plus=(INNER, OUTER)),
    "inner": ScalarSymmetry(plus=(INNER,)),
    "outer": ScalarSymmetry(plus=(OUTER,)),
}
# How the recorded noise is laid out.
_PARTS = {"inner": slice(0, 1), "outer": slice(1, 2), "whole": slice(0, 2)}


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

    inputs: int = 8
    hidden: int = 16
    outputs: int = 2
    examples: int = 64
    label_noise: float = 0.5
    lr: float = 0.05
    batch_size: int = 1
    large_lr: float = 0.1
    large_batch_size: int = 16
    weight_decay: float = 0.01
    steps: int = 4_000
    decay_steps: int = 12_000
    replicas: int = 8
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes, whose verdicts still mean something."""
        return cls(steps=2_500, weight_decay=0.03, decay_steps=4_000)


@final
class Net(nn.Module):
    """f(x) = 3 u tanh(3 w x) with normalised weights u and w."""

    def __init__(self, config: Config, *, by_layer: bool) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.ones(config.hidden, config.inputs, dtype=torch.float64))
        self.outer = nn.Parameter(torch.ones(config.outputs, config.hidden, dtype=torch.float64))
        self._by_layer = by_layer

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape (B, outputs)."""
        return self.function({"inner": self.inner, "outer": self.outer}, x)

    def function(self, params: Params, x: Tensor) -> Tensor:
        """The same, of given parameters."""
        inner, outer = params["inner"], params["outer"]
        lengths = inner.norm(), outer.norm()
        if not self._by_layer:
            both = (lengths[0].square() + lengths[1].square()).sqrt()
            lengths = both, both
        return 3 * torch.tanh(3 * x @ (inner / lengths[0]).mT) @ (outer / lengths[1]).mT


@final
class Runs(NamedTuple):
    """One net in every way to train."""

    sgd: Trajectory
    large: Trajectory
    decayed: Trajectory
    gd: Trajectory


Outcome = dict[str, Runs]


def run(config: Config) -> Outcome:
    """Both nets by SGD at two batch sizes, by SGD with weight decay, and by gradient descent, from the same starts."""
    generator = torch.Generator().manual_seed(config.seed)
    data = _data(config, generator)
    start = {
        "inner": _normal(config.replicas, config.hidden, config.inputs, generator=generator) / config.inputs**0.5,
        "outer": _normal(config.replicas, config.outputs, config.hidden, generator=generator) / config.hidden**0.5,
    }
    return {name: _train(config, Net(config, by_layer=name == "Net-B"), data, start, generator) for name in NETS}


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    found: list[Claim] = []
    for name, runs in outcome.items():
        parts = ("whole", "inner", "outer") if name == "Net-B" else ("whole",)
        for part in parts:
            band = {"Net-A": 0.05, "Net-B": 0.08}[name] if part == "whole" else 0.10
            found.append(_growth(config, f"{name}, {part}", runs.sgd, part, config.lr, config.batch_size, band))
            steady = (runs.sgd.charges[part].diff(dim=0) >= 0).double().mean().item()
            found.append(Claim(f"{name}, {part}: share of records at which it grew", 1.0, steady, low=1.0))
        found.append(
            _growth(config, f"{name}, S = 16", runs.large, "whole", config.large_lr, config.large_batch_size, 0.08)
        )
        found.append(_without_mean(config, name, runs.large))
        found.append(_linear(name, runs.sgd))
        found += [_rest(config, f"{name}, {part}", runs.decayed, part) for part in parts]
    for part in ("inner", "outer"):
        found += [
            _descent(config, f"Net-B, {part}", outcome["Net-B"].gd, part, high=0.005),
            _descent(config, f"Net-A, {part}", outcome["Net-A"].gd, part, low=0.10),
            _no_rest(config, f"Net-A, {part}", outcome["Net-A"].decayed, part),
        ]
    return found


def plot(config: Config, outcome: Outcome) -> Figure:
    """Squared norms over time, of the whole and of the layers, for both nets by SGD and by gradient descent."""
    figure = style.panels(3)
    axes = figure.subplots(1, 3)
    for panel, (name, runs) in zip(axes, outcome.items(), strict=False):
        for part, mark in (("whole", "-"), ("inner", "--"), ("outer", ":")):
            for trajectory, look, label in ((runs.sgd, style.MEASURED, "SGD"), (runs.gd, style.CONTRAST, "GD")):
                shown = look | {"linestyle": mark, "linewidth": 0.6}
                lines = panel.plot(trajectory.steps, trajectory.charges[part], **shown)
                lines[0].set_label(f"{label}, {part}")
        panel.set(xlabel="steps", ylabel="squared norm", title=name)
        panel.legend(fontsize=6)
    fourth = axes[2]
    for (name, runs), mark in zip(outcome.items(), ("-", ":"), strict=True):
        whole = runs.sgd.charges["whole"].square()
        fourth.plot(runs.sgd.steps, whole.mean(1), **(style.MEASURED | {"linestyle": mark}), label=name)
        fourth.plot(runs.sgd.steps[[0, -1]], whole.mean(1)[[0, -1]], **(style.PREDICTED | {"linewidth": 0.8}))
    fourth.set(xlabel="steps", ylabel=r"mean of $|\theta|^4$", title="linear in time")
    fourth.legend(fontsize=7)
    return figure


def _train(config: Config, net: Net, data: tuple[Tensor, Tensor], start: Params, generator: torch.Generator) -> Runs:
    def of_one(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return (net.function(params, x) - y).square().sum()

    def noise(params: Params) -> Tensor:
        """Per layer Tr Sigma and |grad L|^2, shape (2, 2)."""
        gradients = vmap(grad(of_one), in_dims=(None, 0, 0))(dict(params), *data)
        rows = []
        for name in ("inner", "outer"):
            mean = gradients[name].mean(0)
            variance = (gradients[name] - mean).square().sum() / config.examples
            rows.append(torch.stack([variance, mean.square().sum()]))
        return torch.stack(rows)

    def go(dynamics: SGD | GradientDescent, steps: int, every: int) -> Trajectory:
        # What is summed over all steps is recorded at every step while it changes fast.
        early = min(steps, 400)
        return simulate(
            net,
            _loss,
            data,
            dynamics,
            steps=steps,
            start=start,
            symmetries=NORMS,
            observables={"noise": noise},
            record=[*range(early), *range(early, steps, every)],
            generator=generator,
        )

    return Runs(
        sgd=go(SGD(config.lr, config.batch_size), config.steps, 5),
        large=go(SGD(config.large_lr, config.large_batch_size), config.steps, 5),
        decayed=go(SGD(config.lr, config.batch_size, config.weight_decay), config.decay_steps, 20),
        gd=go(GradientDescent(config.lr), config.steps, 1),
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().sum(-1)


def _data(config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = _normal(config.examples, config.inputs, generator=generator)
    teacher = _normal(config.outputs, config.inputs, generator=generator) / config.inputs**0.5
    noise = config.label_noise * _normal(config.examples, config.outputs, generator=generator)
    return x, torch.tanh(x @ teacher.mT) + noise


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _kicks(trajectory: Trajectory, part: str, lr: float, batch_size: float, *, mean: float = 1.0) -> Tensor:
    """The sum over steps of lr^2 (Tr Sigma / S + |grad L|^2), shape (R,)."""
    noise = trajectory.observables["noise"][:, :, _PARTS[part]].sum(2)
    per_step = lr**2 * (noise[..., 0] / batch_size + mean * noise[..., 1])
    return (per_step[:-1] * trajectory.steps.diff()[:, None]).sum(0)


def _gain(trajectory: Trajectory, part: str) -> Tensor:
    charge = trajectory.charges[part]
    return charge[-1] - charge[0]


def _growth(
    config: Config, text: str, trajectory: Trajectory, part: str, lr: float, batch_size: int, band: float
) -> Claim:
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
    ratio = _gain(trajectory, "whole") / _kicks(trajectory, "whole", config.large_lr, config.large_batch_size, mean=0.0)
    return Claim(
        f"{name}, S = 16: the same without |grad L|^2",
        predicted=1.1,
        measured=ratio.mean().item(),
        low=1.05,
        error=standard_error(ratio),
        wrong={"a negligible mean gradient": 1.0},
    )


def _linear(name: str, trajectory: Trajectory) -> Claim:
    # While the data are being fitted the noise still falls.
    late = _late(trajectory)
    fourth = trajectory.charges["whole"][late].square().mean(1)
    straight = r_squared(trajectory.steps[late].double(), fourth)
    return Claim(f"{name}: R^2 of |theta|^4 linear in time, late half", 1.0, straight, low=0.995)


def _late(trajectory: Trajectory) -> Tensor:
    """The records of the second half."""
    return trajectory.steps >= trajectory.steps[-1] / 2


def _rest(config: Config, text: str, trajectory: Trajectory, part: str, band: float = 0.03) -> Claim:
    ratio = _at_rest(config, trajectory, part)
    return Claim(
        f"{text}: |theta|^2 at rest over lr E|g|^2 / 2 wd",
        predicted=1.0,
        measured=ratio.mean().item(),
        low=1 - band,
        high=1 + band,
        error=standard_error(ratio),
        wrong={"gamma = weight_decay": 0.5},
    )


def _no_rest(config: Config, text: str, trajectory: Trajectory, part: str) -> Claim:
    """The formula must not hold for a layer that has no symmetry of its own."""
    ratio = _at_rest(config, trajectory, part)
    return Claim(
        f"{text}: formula misses by (no symmetry of its own)",
        predicted={"inner": 0.24, "outer": 0.38}[part],
        measured=(ratio.mean() - 1).abs().item(),
        low=0.10,
        error=standard_error(ratio),
    )


def _at_rest(config: Config, trajectory: Trajectory, part: str) -> Tensor:
    late = _late(trajectory)
    noise = trajectory.observables["noise"][late][:, :, _PARTS[part]].sum(2).mean(0)
    kick = noise[:, 0] / config.batch_size + noise[:, 1]
    return trajectory.charges[part][late].mean(0) / (config.lr * kick / (2 * config.weight_decay))


def _descent(
    config: Config, text: str, trajectory: Trajectory, part: str, *, low: float | None = None, high: float | None = None
) -> Claim:
    finite_step = _kicks(trajectory, part, config.lr, float("inf"))
    change = (_gain(trajectory, part) - finite_step).abs() / trajectory.charges[part][0]
    return Claim(
        f"{text}: GD changes it by, beyond the finite step",
        predicted=0.0 if high else 0.2,
        measured=change.mean().item(),
        low=low,
        high=high,
        error=standard_error(change),
    )

"""F10: ReLU networks of three hidden layers under AdamW, and what is left per neuron to the joint equilibrium."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from noetherflow._types import Params
from noetherflow.optimizers import AdamW
from noetherflow.paper.f10_problem import formula_of_sgd, regression_loss, shift
from noetherflow.simulation import Trajectory, simulate
from noetherflow.simulation.stream import Sampler
from noetherflow.symmetry import Axis, DiagonalSymmetry, Symmetry

HIDDEN = ("0", "2", "4")
NEURONS: dict[str, Symmetry] = {
    name: DiagonalSymmetry(
        plus=(Axis(f"{name}.weight", 0), Axis(f"{name}.bias", 0)), minus=(Axis(f"{int(name) + 2}.weight", 1),)
    )
    for name in HIDDEN
}
# A neuron is live if the second moments of its incoming weights never fell below this share of their average. Those of
# a neuron that does not fire any more fall by a factor beta2 per step.
LIVE = 0.1
WARMUP = 1_000
# Parts of a training after which its end is predicted.
PREDICTED_AT = (0.04, 0.1, 0.2, 0.35)


@final
@dataclass(frozen=True)
class Task:
    """A student that learns a teacher of equal shape, with label noise.

    Args:
        inputs: Number of inputs.
        width: Neurons of each hidden layer.
        outputs: Number of outputs.
        noise: Standard deviation of the label noise.
        gain: Factor on the weights of the teacher.
    """

    inputs: int
    width: int
    outputs: int
    noise: float = 0.5
    gain: float = 1.8

    def net(self, seed: int) -> nn.Sequential:
        """A network with the initial weights of PyTorch, drawn with a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [self.inputs, *3 * [self.width], self.outputs]
            pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
            return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1]).double()

    def sampler(self) -> Sampler:
        """The distribution of examples (x, y)."""
        teacher = self.net(seed=99)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(self.gain)

        def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            both = torch.randn(count, self.inputs + self.outputs, generator=generator, dtype=torch.float64)
            x = both[:, : self.inputs]
            with torch.no_grad():
                return x, teacher(x) + self.noise * both[:, self.inputs :]

        return sample


@final
class Left(NamedTuple):
    """What is left to the equilibrium, per live neuron of all replicas, in the coordinate of the neuron.

    Args:
        adamw: From late averages of parameters and second moments, with the formula of AdamW; shape (neurons,).
        sgd: From these averages with the formula of SGD; shape (neurons,).
        steps: The steps from which the end is predicted, shape (K,).
        joint: Where the equilibrium predicted from the parameters and v of a step differs from the late averages, in
            (1/4) log(|in|^2 / |out|^2); shape (K, neurons).
        layers: The difference of a prediction layer by layer; shape (K, neurons).
        expected: The difference of a joint prediction with the formula of SGD; shape (K, neurons).
        still: The difference of the parameters of that step, without a prediction; shape (K, neurons).
        neurons: Number of all neurons.
    """

    adamw: Tensor
    sgd: Tensor
    steps: Tensor
    joint: Tensor
    layers: Tensor
    expected: Tensor
    still: Tensor
    neurons: int


def train(task: Task, adamw: AdamW, replicas: int, steps: int, unbalance: float, seed: int) -> Left:
    """Train replicas with different initial weights, and solve for the equilibrium at the late averages.

    Args:
        task: The data, and the shape of the networks.
        adamw: The settings.
        replicas: The number of networks.
        steps: The number of steps; the second half is averaged.
        unbalance: Every neuron starts with the weights of PyTorch, rescaled by e^x; x is normal with this standard
            deviation.
        seed: Of the initial weights and of the data.

    Returns:
        What is left, per live neuron of all networks.
    """
    generator = torch.Generator().manual_seed(seed)
    nets = []
    for replica in range(replicas):
        net: Params = {n: p.detach() for n, p in task.net(1_000 * (seed + 1) + replica).named_parameters()}
        drawn = {n: torch.randn(task.width, generator=generator, dtype=torch.float64) for n in HIDDEN}
        nets.append(_moved(net, {name: unbalance * x for name, x in drawn.items()}))
    names = list(nets[0])
    trajectory = simulate(
        task.net(seed=0),
        regression_loss,
        task.sampler(),
        adamw,
        steps=steps,
        start={name: torch.stack([net[name] for net in nets]) for name in names},
        observables={f"theta/{name}": lambda state, name=name: state[name] for name in names}
        | {f"v/{name}": lambda state, name=name: state.second_moments[name] for name in names},
        record=100,
        schedule=lambda step: min(1.0, (step + 1) / WARMUP),
        generator=generator,
    )
    parts = [_left(trajectory, names, adamw, replica) for replica in range(replicas)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=-1)

    return Left(
        adamw=joined("adamw"),
        sgd=joined("sgd"),
        steps=parts[0].steps,
        joint=joined("joint"),
        layers=joined("layers"),
        expected=joined("expected"),
        still=joined("still"),
        neurons=sum(part.neurons for part in parts),
    )


def _left(trajectory: Trajectory, names: list[str], adamw: AdamW, replica: int) -> Left:
    """What is left of a replica."""
    theta, v = (
        {name: trajectory.observables[f"{kind}/{name}"][:, replica] for name in names} for kind in ("theta", "v")
    )
    half = len(trajectory.steps) // 2
    late, late_v = ({name: stack[half:].mean(0) for name, stack in stacks.items()} for stacks in (theta, v))
    activity = {name: v[f"{name}.weight"][half:].sum(2) for name in HIDDEN}
    live = torch.cat([active.amin(0) > LIVE * active.mean(0) for active in activity.values()])

    def apart(params: Params) -> Tensor:
        return (_ratios(params) - _ratios(late))[live]

    apart_of: dict[str, list[Tensor]] = {"joint": [], "layers": [], "expected": [], "still": []}
    records = [int(share * len(trajectory.steps)) for share in PREDICTED_AT]
    for record in records:
        now, now_v = ({name: stack[record] for name, stack in stacks.items()} for stacks in (theta, v))
        joint = shift(now_v, NEURONS, adamw, now)
        single = {name: shift(now_v, {name: NEURONS[name]}, adamw, now)[name] for name in HIDDEN}
        expected = shift(now_v, NEURONS, formula_of_sgd(adamw), now)
        for kind, x in (("joint", joint), ("layers", single), ("expected", expected), ("still", {})):
            apart_of[kind].append(apart(_moved(now, x)))
    return Left(
        adamw=torch.cat([*shift(late_v, NEURONS, adamw, late).values()])[live],
        sgd=torch.cat([*shift(late_v, NEURONS, formula_of_sgd(adamw), late).values()])[live],
        steps=trajectory.steps[records],
        **{kind: torch.stack(values) for kind, values in apart_of.items()},
        neurons=len(live),
    )


def _moved(params: Params, x: Mapping[str, Tensor]) -> Params:
    """The parameters, with the neurons of every layer rescaled."""
    for name, coordinate in x.items():
        params = NEURONS[name].act(coordinate, params)
    return params


def _ratios(params: Params) -> Tensor:
    """(1/4) log(|in|^2 / |out|^2) of every neuron, shape (neurons,)."""
    sides = [NEURONS[name].grams(params) for name in HIDDEN]
    return torch.cat([0.25 * (side.plus / side.minus).log() for side in sides])

"""F10: the rank-one regression and the scale-invariant loss, their simulations, and the points of rest that follow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from noetherflow._second_moments import SecondMoments
from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium, solve_equilibrium
from noetherflow.optimizers import SGD, AdamW
from noetherflow.paper.measure import geometric, standard_error
from noetherflow.simulation import Trajectory, simulate
from noetherflow.simulation.record import Observable
from noetherflow.simulation.stream import Sampler
from noetherflow.symmetry import Axis, ScalarSymmetry, Symmetry

SCALE = {"scale": ScalarSymmetry(plus=(Axis("w", 0),), minus=(Axis("u", 0),))}
RECORDS = 400
_SOLVES = 100
LENGTH = {"length": ScalarSymmetry(plus=(Axis("theta", 0),))}


@final
@dataclass(frozen=True)
class World:
    r"""The regression $y = V x + \epsilon$ with a matrix V of rank one, fitted by $u\,(w \cdot x)$.

    All rows and columns of V are equal. Inputs and label noise are Gaussian with diagonal covariances.

    Args:
        input_variances: Shape (inputs,).
        noise_variances: Shape (outputs,).
        length: The Frobenius norm of V, which is |u| |w| at the minimum.
    """

    input_variances: Tensor
    noise_variances: Tensor
    length: float

    @classmethod
    def of(cls, inputs: int, outputs: int, length: float, spread: float = 1.0) -> "World":
        """Geometric variances, the largest of which is `spread` times the smallest, with the geometric mean 1."""
        ends = spread**-0.5, spread**0.5
        return cls(geometric(ends, inputs), geometric(ends, outputs), length)

    def minimum(self, x: float) -> dict[str, Tensor]:
        r"""The minimum with the coordinate $x = \tfrac14 \log(|w|^2 / |u|^2)$."""
        shapes = {"w": len(self.input_variances), "u": len(self.noise_variances)}
        sizes = {"w": math.sqrt(self.length) * math.exp(x), "u": math.sqrt(self.length) * math.exp(-x)}
        return {key: torch.full((n,), sizes[key] / n**0.5, dtype=torch.float64) for key, n in shapes.items()}

    def second_moments(self, params: Params, batch_size: int) -> dict[str, Tensor]:
        r"""$E\,g_S^2$ at a minimum, where the residual is the label noise: the mean gradient is zero."""
        of_noise, of_inputs = params["u"].square() @ self.noise_variances, params["w"].square() @ self.input_variances
        factor = 4 / batch_size
        return {"w": factor * of_noise * self.input_variances, "u": factor * of_inputs * self.noise_variances}

    def rest(self, settings: SGD | AdamW, batch_size: int) -> float:
        """The coordinate x at which an optimizer rests, from the second moments of the label noise.

        The first move from x = 0 is exact, unless `eps` or a penalty has a part in the formula. Further moves, each
        with the second moments of the new point, make it exact there too.

        Args:
            settings: The settings of the optimizer.
            batch_size: Examples per step.

        Returns:
            The coordinate.
        """
        x = 0.0
        for _ in range(_SOLVES):
            params = self.minimum(x)
            left = shift(self.second_moments(params, batch_size), SCALE, settings, params)["scale"].item()
            x += left
            if abs(left) < 1e-9:
                break
        return x

    def relaxation(self, settings: SGD | AdamW, batch_size: int) -> float:
        """Steps of relaxation with v frozen, at the point of rest."""
        params = self.minimum(self.rest(settings, batch_size))
        return solved(self.second_moments(params, batch_size), SCALE, settings, params).relaxation_steps["scale"].item()

    def sampler(self) -> Sampler:
        """The distribution of examples (x, y)."""
        inputs, outputs = len(self.input_variances), len(self.noise_variances)
        target = self.length / (inputs * outputs) ** 0.5
        scales = torch.cat([self.input_variances, self.noise_variances]).sqrt()

        def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            both = scales * torch.randn(count, inputs + outputs, generator=generator, dtype=torch.float64)
            x, noise = both[:, :inputs], both[:, inputs:]
            return x, target * x.sum(1, keepdim=True) + noise

        return sample


@final
class RankOne(nn.Module):
    r"""The function $u\,(w \cdot x)$."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Create w, shape (inputs,), and u, shape (outputs,); every simulation replaces the initial values."""
        super().__init__()
        self.w = nn.Parameter(torch.ones(inputs, dtype=torch.float64))
        self.u = nn.Parameter(torch.ones(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shapes (B, inputs) -> (B, outputs)."""
        return (x @ self.w)[:, None] * self.u


@final
class Direction(nn.Module):
    r"""The loss $-z \cdot \theta / |\theta|$, which depends only on the direction of $\theta$."""

    def __init__(self, entries: int) -> None:
        """Create theta, shape (entries,); every simulation replaces the initial value."""
        super().__init__()
        self.theta = nn.Parameter(torch.ones(entries, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """Loss of each example z, shapes (B, entries) -> (B,)."""
        return -(z @ self.theta) / self.theta.norm()


@final
class Rest(NamedTuple):
    """A coordinate along a simulation, averaged over its second half.

    Args:
        steps: The recorded steps, shape (T,).
        x: The coordinate, shape (T, starts, replicas).
        charge: The charge of the symmetry, shape (T, starts, replicas).
        left: What is left to the equilibrium by the formula of AdamW, from averages of parameters and second moments
            over the second half of all replicas, shape (starts,); empty under SGD.
    """

    steps: Tensor
    x: Tensor
    charge: Tensor
    left: Tensor

    @property
    def late(self) -> Tensor:
        """Averages over the second half of the records, shape (starts, replicas)."""
        return self.x[len(self.x) // 2 :].mean(0)

    @property
    def error(self) -> float:
        """Standard error of the mean over replicas, of the start with the larger error."""
        return max(standard_error(replicas) for replicas in self.late)

    def farthest(self, from_value: float) -> float:
        """The mean over replicas that is farthest from a value, over all starts."""
        means = self.late.mean(1)
        return means[(means - from_value).abs().argmax()].item()

    @property
    def relaxation(self) -> float:
        """Steps in which the difference of two starts falls by a factor e, on its way from 0.5 to 0.1."""
        apart = self.x.mean(2)[:, -1] - self.x.mean(2)[:, 0]
        ends = [int((apart < bound).int().argmax()) if (apart < bound).any() else -1 for bound in (0.5, 0.1)]
        if min(ends) < 0:
            return math.inf
        return (self.steps[ends[1]] - self.steps[ends[0]]).item() / math.log(5)


def simulate_pair(
    world: World, dynamics: SGD | AdamW, starts: Sequence[float], replicas: int, steps: int, seed: int
) -> Rest:
    """Simulate the rank-one regression from minima with the given coordinates."""
    minima = [world.minimum(x) for x in starts for _ in range(replicas)]
    trajectory = simulate(
        RankOne(len(world.input_variances), len(world.noise_variances)),
        regression_loss,
        world.sampler(),
        dynamics,
        steps=steps,
        start={name: torch.stack([params[name] for params in minima]) for name in ("w", "u")},
        symmetries=SCALE,
        observables=_averaged(dynamics, ("w", "u"))
        | {"x": lambda params: 0.25 * (params["w"].square().sum() / params["u"].square().sum()).log()},
        record=max(1, steps // RECORDS),
        generator=torch.Generator().manual_seed(seed),
    )
    return _rest(trajectory, dynamics, SCALE, len(starts))


def simulate_direction(
    dynamics: SGD | AdamW, entries: int, starts: Sequence[float], replicas: int, steps: int, seed: int
) -> Rest:
    r"""Simulate the scale-invariant loss from random directions with the given $\log|\theta|$."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(starts), replicas, entries, generator=generator, dtype=torch.float64)
    lengths = torch.tensor(starts, dtype=torch.float64).exp()[:, None, None]
    trajectory = simulate(
        Direction(entries),
        direction_loss,
        lambda count, source: entries**-0.5 + torch.randn(count, entries, generator=source, dtype=torch.float64),
        dynamics,
        steps=steps,
        start={"theta": (lengths * directions / directions.norm(dim=-1, keepdim=True)).flatten(0, 1)},
        symmetries=LENGTH,
        observables={"x": lambda params: params["theta"].norm().log()},
        record=max(1, steps // RECORDS),
        generator=generator,
    )
    return _rest(trajectory, dynamics, {}, len(starts))


def solved(
    moments: Mapping[str, Tensor], symmetries: Mapping[str, Symmetry], settings: SGD | AdamW, params: Params
) -> Equilibrium:
    """The equilibrium for given second moments of gradients of minibatches."""
    # Second moments that without eps have the force of the noise with eps; exact if there is no weight decay.
    eps = settings.eps if isinstance(settings, AdamW) else 0.0
    forcing = {name: torch.where(v > 0, (v / (v.sqrt() + eps)).square(), 0.0) for name, v in moments.items()}
    return solve_equilibrium(SecondMoments(forcing, dict.fromkeys(moments, 1), dict(symmetries)), settings, params)


def shift(
    moments: Mapping[str, Tensor], symmetries: Mapping[str, Symmetry], settings: SGD | AdamW, params: Params
) -> dict[str, Tensor]:
    """The coordinates of the equilibrium for given second moments of gradients of minibatches."""
    return solved(moments, symmetries, settings, params).coordinates


def formula_of_sgd(adamw: AdamW) -> SGD:
    """The settings whose equilibrium somebody would expect who takes AdamW for SGD."""
    lr, decay = adamw.lr_of(""), adamw.decay_of("")
    return SGD(lr, adamw.batch_size or 1, weight_decay=decay, finite_step=True)


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of each example, shape (B,)."""
    outputs: Tensor = model(batch[0])
    return (outputs - batch[1]).square().sum(1)


def direction_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Loss of each example: the model computes the loss itself."""
    values: Tensor = model(batch)
    return values


def _averaged(dynamics: SGD | AdamW, names: Sequence[str]) -> dict[str, Observable]:
    """Observables of squares of parameters and of second moments, which are averaged later; none under SGD."""
    if isinstance(dynamics, SGD):
        return {}

    def square(key: str) -> Observable:
        return lambda state: state[key].square()

    def moment(key: str) -> Observable:
        return lambda state: state.second_moments[key]

    return {f"square/{key}": square(key) for key in names} | {f"v/{key}": moment(key) for key in names}


def _rest(trajectory: Trajectory, dynamics: SGD | AdamW, symmetries: Mapping[str, Symmetry], starts: int) -> Rest:
    """The records, with a dimension for the starts."""
    split = {name: values.unflatten(1, (starts, -1)) for name, values in trajectory.observables.items()}
    (charge,) = trajectory.charges.values()
    left = []
    for start in range(starts if isinstance(dynamics, AdamW) and symmetries else 0):
        late = {name: values[len(values) // 2 :, start].mean((0, 1)) for name, values in split.items() if "/" in name}
        square, v = ({key: late[f"{kind}/{key}"] for key in trajectory.params} for kind in ("square", "v"))
        params = {key: values.sqrt() for key, values in square.items()}
        left.append(torch.stack([*shift(v, symmetries, dynamics, params).values()]).sum())
    return Rest(
        trajectory.steps, split["x"], charge.unflatten(1, (starts, -1)), torch.stack(left) if left else torch.zeros(0)
    )

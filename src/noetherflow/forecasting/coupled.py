r"""The drift along the orbit in time, where coordinates move each other: double rotations, and neighbouring layers.

The noise at the start is carried along the orbit, which is exact. A step of time h is linearly implicit: with the slope
of the charge, K, and that of the drift, -J, the displacement x solves $(K + h J)\,x = h\,\dot C$. A step and two half
steps give an error, and together the order two; a long step is a Newton step to the equilibrium.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._forces import charge_weighted, forces
from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.forecasting.along_orbit import coordinates_of, generated
from noetherflow.symmetry import Symmetry

# Largest difference between a step and two half steps, in exponents, and in shares of the largest distance.
_ERROR, _SHARE = 0.02, 0.005
# Steps, at most.
_STEPS = 400


@final
@dataclass(frozen=True)
class Course:
    """Coordinates at times.

    Args:
        times: In steps of the optimizer, ascending from 0, shape (T,).
        coordinates: By symmetry, shape (T, *coordinates).
    """

    times: Tensor
    coordinates: dict[str, Tensor]

    def at(self, steps: float) -> dict[str, Tensor]:
        """The coordinates after a number of steps: straight lines between the times, constant after the last."""
        after = int(
            torch.searchsorted(self.times, torch.tensor(steps, dtype=torch.float64)).clamp(1, len(self.times) - 1)
        )
        first, last = float(self.times[after - 1]), float(self.times[after])
        share = min(max((steps - first) / (last - first), 0.0), 1.0)
        return {name: (1 - share) * x[after - 1] + share * x[after] for name, x in self.coordinates.items()}


class Mover(ABC):
    """A point of an orbit that moves with the drift."""

    @property
    @abstractmethod
    def coordinates(self) -> dict[str, Tensor]:
        """Where the point is, from the start."""

    @abstractmethod
    def displacement(self, time: float) -> dict[str, Tensor]:
        """The displacement in a linearly implicit step."""

    @abstractmethod
    def moved(self, displacement: Mapping[str, Tensor]) -> "Mover":
        """The point after a displacement."""


@final
class Rotating(Mover):
    r"""The orbit of a double rotation: with $g = e^{x}$, forces and Grams of the weights are carried by congruences.

    Args:
        name: The symmetry.
        params: The parameters at the start.
        gradients: The second moments of minibatches there.
    """

    def __init__(self, name: str, params: Params, gradients: Minibatches) -> None:
        self._name = name
        push, pull = forces(name, params, gradients)
        plus, minus = charge_weighted(gradients.symmetries[name], params, gradients)
        # The first two grow with g, the last two fall.
        self._grows, self._falls = torch.stack([pull, plus]), torch.stack([push, minus])
        self._element = torch.eye(len(push), dtype=push.dtype)

    @property
    def coordinates(self) -> dict[str, Tensor]:
        """The polar part of the group element."""
        return {self._name: _spd.symmetric(_spd.logm(_spd.symmetric(self._element.mT @ self._element)) / 2)}

    def displacement(self, time: float) -> dict[str, Tensor]:
        """The solution of a Lyapunov equation."""
        (pull, plus), (push, minus) = self._grows, self._falls
        values, vectors = torch.linalg.eigh(_spd.symmetric(plus + minus + time * (push + pull)))
        inner = vectors.mT @ (time * (push - pull)) @ vectors
        x = vectors @ (inner / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT
        return {self._name: _spd.symmetric(x)}

    def moved(self, displacement: Mapping[str, Tensor]) -> "Rotating":
        """Everything carried to the new point."""
        x = displacement[self._name]
        values, vectors = torch.linalg.eigh(x)
        grow, shrink = ((vectors * (sign * values).exp()) @ vectors.mT for sign in (1, -1))
        result = object.__new__(Rotating)
        result._name, result._element = self._name, grow @ self._element
        result._grows, result._falls = grow @ self._grows @ grow, shrink @ self._falls @ shrink
        return result


@final
class Scaling(Mover):
    """The joint orbit of symmetries that scale entries.

    Args:
        symmetries: The symmetries.
        params: The parameters at the start.
        gradients: The second moments of minibatches there.
        free: The coordinates that have an equilibrium; all others rest.
    """

    def __init__(
        self, symmetries: dict[str, Symmetry], params: Params, gradients: Minibatches, free: Mapping[str, Tensor]
    ) -> None:
        self._symmetries, self._free, self._exponents = symmetries, free, gradients.optimizer.exponents
        self._terms = {
            name: tuple(gradients.terms(name, params[name]))
            for name in dict.fromkeys(name for symmetry in symmetries.values() for name in symmetry.names)
        }
        self._units = {name: torch.ones_like(terms[0]) for name, terms in self._terms.items()}
        self._x = {name: symmetry.identity(self._units) for name, symmetry in symmetries.items()}

    @property
    def coordinates(self) -> dict[str, Tensor]:
        """The sum of all displacements."""
        return self._x

    def displacement(self, time: float) -> dict[str, Tensor]:
        """The solution for all symmetries together, by conjugate gradients."""
        grow, fall, _ = self._exponents
        root, push = {}, {}
        for name, (decay, noise, charge) in self._terms.items():
            root[name] = (2 * charge + time * (grow**2 * decay + fall**2 * noise)).sqrt()
            force = time * (fall * noise - grow * decay)
            push[name] = torch.where(root[name] > 0, force / root[name], 0.0)
        return coordinates_of(self._symmetries, root, push, self._free)

    def moved(self, displacement: Mapping[str, Tensor]) -> "Scaling":
        """Every term times an exponential of the exponents of its entries."""
        exponents = generated(self._symmetries, self._units, displacement)
        grow, fall, kept = self._exponents
        result = object.__new__(Scaling)
        result._symmetries, result._free, result._exponents = self._symmetries, self._free, self._exponents
        result._units = self._units
        result._terms = {
            name: tuple(
                term * torch.exp(power * exponents[name])
                for term, power in zip(terms, (grow, -fall, kept), strict=True)
            )
            for name, terms in self._terms.items()
        }
        result._x = {name: x + displacement[name] for name, x in self._x.items()}
        return result


def course_of(mover: Mover, first: float, last: float, distance: float) -> Course:
    """The way of a point.

    Args:
        mover: The point at the start.
        first: The first step of time.
        last: The time at which the way ends.
        distance: The largest distance from the equilibrium, in exponents.

    Returns:
        The way.
    """
    allowed = min(_ERROR, _SHARE * distance)
    times, points, step = [0.0], [mover.coordinates], first
    for _ in range(_STEPS):
        if times[-1] >= last:
            break
        step = min(step, last - times[-1])
        once = mover.displacement(step)
        half = mover.displacement(step / 2)
        further = mover.moved(half).displacement(step / 2)
        twice = {name: half[name] + further[name] for name in half}
        error = max(float((twice[name] - x).abs().max()) for name, x in once.items())
        factor = 0.9 * math.sqrt(allowed / error) if error > 0 else 5.0
        if error <= allowed:
            mover = mover.moved({name: 2 * x - once[name] for name, x in twice.items()})
            times.append(times[-1] + step)
            points.append(mover.coordinates)
        step *= min(max(factor, 0.2), 5.0)
    stacked = {name: torch.stack([point[name] for point in points]) for name in points[0]}
    return Course(torch.tensor(times, dtype=torch.float64), stacked)

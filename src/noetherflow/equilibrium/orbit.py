"""Orbits: sets of symmetries that must be solved together, because they share entries of a tensor."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from noetherflow import _spd
from noetherflow.equilibrium.result import OrbitMinimum


class Residual(NamedTuple):
    """The drift of a symmetry at a point of its orbit.

    `drift` is that of every coordinate. `rate` is the drift along the directions that have an equilibrium, coordinate
    by coordinate or, for a matrix, as a norm; `size` is the sum of both forces, of the shape of `rate`.
    """

    drift: Tensor
    rate: Tensor
    size: Tensor

    @property
    def imbalance(self) -> float:
        """|P - R| / |P + R| over the directions that have an equilibrium; 0 without forces, NaN without a drift."""
        if bool(self.drift.isnan().all()):
            return math.nan
        size = float(_spd.norm(self.size))
        return float(_spd.norm(self.rate)) / size if size else 0.0


class Orbit(ABC):
    """The points that a set of symmetries reaches from the parameters, and the potential on them."""

    @abstractmethod
    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The noise of the entries that this orbit moves, at a point of it; shape ()."""

    @abstractmethod
    def value(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The part of the potential that this orbit changes, at a point of it; shape ()."""

    @abstractmethod
    def residuals(self) -> dict[str, Residual]:
        """The drift of every symmetry where the noise was measured."""

    @abstractmethod
    def minimise(self) -> OrbitMinimum:
        """The point where all drifts are zero together: the minimum of the convex potential."""

    @abstractmethod
    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the minimum under small additional forces on the coordinates, to first order.

        At the minimum the Hessian of half the potential, H, maps a displacement to the drift that it causes with the
        sign changed, so the displacement solves H x = force. Directions without an equilibrium do not respond.
        """

"""Orbits: sets of symmetries that must be solved together, because they share entries of a tensor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from noetherflow.equilibrium.result import OrbitMinimum


class Orbit(ABC):
    """The points that a set of symmetries reaches from the parameters, and the potential on them."""

    @abstractmethod
    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Tr Sigma over the entries that this orbit moves, at a point of it; shape ()."""

    @abstractmethod
    def minimise(self) -> OrbitMinimum:
        """The point where all drifts are zero together: the minimum of the convex potential."""

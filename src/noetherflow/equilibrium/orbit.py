"""Orbits: sets of symmetries that must be solved together, because they share entries of a tensor."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.equilibrium.result import OrbitMinimum
from noetherflow.symmetry import Symmetry


class Orbit(ABC):
    """The points that a set of symmetries reaches from the parameters, and the potential on them."""

    @abstractmethod
    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Tr Sigma over the entries that this orbit moves, at a point of it; shape ()."""

    @abstractmethod
    def minimise(self) -> OrbitMinimum:
        """The point where all drifts are zero together: the minimum of the convex potential."""


def entangled(symmetries: Mapping[str, Symmetry], params: Params) -> tuple[list[list[str]], set[str]]:
    """Group symmetries by the entries they share.

    Returns:
        The groups, and the names of the symmetries that act on some entry in two roles.
    """
    names = list(symmetries)
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    owner: dict[str, Tensor] = {}
    doubled = set()
    for index, symmetry in enumerate(symmetries.values()):
        for axis in symmetry.regions(params):
            tensor = params[axis.name]
            if axis.name not in owner:
                owner[axis.name] = torch.full(tensor.shape, -1, dtype=torch.int32, device=tensor.device)
            rows = axis.rows(owner[axis.name])
            for other in rows.unique().tolist():
                if other == index:
                    doubled.add(names[index])
                elif other >= 0:
                    parent[root(other)] = root(index)
            owner[axis.name] = axis.replace(owner[axis.name], torch.full_like(rows, index))
    groups: dict[int, list[str]] = {}
    for index, name in enumerate(names):
        groups.setdefault(root(index), []).append(name)
    return list(groups.values()), doubled

"""Blocks: sets of symmetries that a measurement of the noise at a single point brings to rest in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from noetherflow._optimizers import SGD
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.dense import DenseOrbit
from noetherflow.equilibrium.matrix import MatrixOrbit
from noetherflow.equilibrium.orbit import Orbit
from noetherflow.equilibrium.result import OrbitMinimum
from noetherflow.noise import NoiseMoments
from noetherflow.symmetry import Action, Symmetry, along_axes


@final
@dataclass(frozen=True)
class Blocks:
    """The symmetries of a model in blocks, with the noise at the present parameters.

    Args:
        orbits: The solver of each block.
        coupled: The names of symmetries of different blocks that share entries of a tensor, or that act on an entry
            twice: the noise at the present parameters does not determine the noise elsewhere on their joint orbit.
        names: All symmetries, in the order of the noise.
    """

    orbits: tuple[Orbit, ...]
    coupled: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, params: Params, noise: NoiseMoments, sgd: SGD) -> "Blocks":
        """Symmetries that scale entries are solved jointly where they share tensors, every other symmetry by itself."""
        symmetries = noise.symmetries
        groups, doubled = entangled(symmetries, params)
        orbits: list[Orbit] = []
        coupled: list[str] = []
        for group in groups:
            scaling = {n: symmetries[n] for n in group if symmetries[n].action is Action.SCALES_ENTRIES}
            others = [name for name in group if name not in scaling]
            if scaling:
                orbits.append(CommutingOrbit(along_axes(scaling), params, noise.variance, sgd))
            for name in others:
                kind = MatrixOrbit if symmetries[name].action is Action.MIXES_ROWS else DenseOrbit
                orbits.append(kind(name, symmetries[name], params, noise.grams[name], sgd))
            if others and (len(group) > 1 or doubled.intersection(others)):
                coupled += group
        return cls(tuple(orbits), tuple(coupled), tuple(symmetries))

    def minimise(self) -> OrbitMinimum:
        """The minimum of every block, the other blocks held where they are."""
        minima = [orbit.minimise() for orbit in self.orbits]
        columns = []
        for column in ("coordinates", "drift", "relaxation", "outcomes"):
            values = {name: value for minimum in minima for name, value in getattr(minimum, column).items()}
            columns.append({name: values[name] for name in self.names})
        coordinates, drift, relaxation, outcomes = columns
        iterations = max((minimum.iterations for minimum in minima), default=0)
        return OrbitMinimum(coordinates, drift, relaxation, outcomes, iterations)


def moved(symmetries: Mapping[str, Symmetry], params: Params, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters at a point of the orbit."""
    tensors = dict(params)
    for name, x in coordinates.items():
        tensors = symmetries[name].act(x, tensors)
    return tensors

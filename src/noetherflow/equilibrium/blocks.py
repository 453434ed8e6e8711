"""Blocks: sets of symmetries that a measurement of the noise at a single point brings to rest in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._optimizers import SGD
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.dense import DenseOrbit
from noetherflow.equilibrium.matrix import MatrixOrbit
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import zero_side
from noetherflow.equilibrium.result import OrbitMinimum
from noetherflow.noise import NoiseMoments
from noetherflow.symmetry import Action, AxisSymmetry, Symmetry, along_axes


@final
@dataclass(frozen=True)
class Blocks:
    """The symmetries of a model in blocks, with the noise at the present parameters.

    Args:
        orbits: The solver of each block.
        coupled: The names of symmetries of different blocks that share entries of a tensor, or that act on an entry
            twice: the noise at the present parameters does not determine the noise elsewhere on their joint orbit.
        names: All symmetries, in the order of the noise.
        degenerate: The symmetries of which the parameters of a complete side are zero. They stay where they are.
    """

    orbits: tuple[Orbit, ...]
    coupled: tuple[str, ...]
    names: tuple[str, ...]
    degenerate: OrbitMinimum

    @classmethod
    def of(
        cls, params: Params, noise: NoiseMoments, sgd: SGD, *, groups: tuple[list[list[str]], set[str]] | None = None
    ) -> "Blocks":
        """Symmetries that scale entries are solved jointly where they share tensors, every other symmetry by itself.

        Args:
            params: The parameters at which the noise was measured.
            noise: The noise.
            sgd: The settings of the optimizer.
            groups: From `entangled`, which is equal at all points of an orbit; None determines it.

        Returns:
            The blocks.
        """
        still = _degenerate(params, noise.symmetries)
        symmetries = noise.symmetries
        sharing, doubled = groups or entangled(symmetries, params)
        grams = noise.grams
        orbits: list[Orbit] = []
        coupled: list[str] = []
        for names in sharing:
            group = [name for name in names if name not in still.outcomes]
            scaling = {n: symmetries[n] for n in group if symmetries[n].action is Action.SCALES_ENTRIES}
            others = [name for name in group if name not in scaling]
            if scaling:
                moves = {name for symmetry in scaling.values() for name in symmetry.names}
                variance = {name: noise.square_scatter[name] / noise.count for name in moves}
                orbits.append(CommutingOrbit(along_axes(scaling), params, variance, sgd))
            for name in others:
                kind = MatrixOrbit if symmetries[name].action is Action.MIXES_ROWS else DenseOrbit
                orbits.append(kind(name, symmetries[name], params, grams[name], sgd))
            if others and (len(group) > 1 or doubled.intersection(others)):
                coupled += group
        return cls(tuple(orbits), tuple(coupled), tuple(noise.symmetries), still)

    def minimise(self) -> OrbitMinimum:
        """The minimum of every block, the other blocks held where they are."""
        minima = [self.degenerate, *(orbit.minimise() for orbit in self.orbits)]
        columns = []
        for column in ("coordinates", "drift", "relaxation", "outcomes"):
            values = {name: value for minimum in minima for name, value in getattr(minimum, column).items()}
            columns.append({name: values[name] for name in self.names})
        coordinates, drift, relaxation, outcomes = columns
        return OrbitMinimum(coordinates, drift, relaxation, outcomes, max(minimum.iterations for minimum in minima))

    def residuals(self) -> dict[str, Residual]:
        """The drift of every symmetry at the present parameters; no force of a degenerate symmetry counts."""
        values = {name: residual for orbit in self.orbits for name, residual in orbit.residuals().items()}
        for name, drift in self.degenerate.drift.items():
            values[name] = Residual(drift, torch.zeros_like(drift), torch.zeros_like(drift))
        return {name: values[name] for name in self.names}

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the minimum of every block under small additional forces, the other blocks held."""
        values = dict(self.degenerate.coordinates)
        for orbit in self.orbits:
            values |= orbit.respond(forces)
        return {name: values[name] for name in self.names}


def _degenerate(params: Params, symmetries: Mapping[str, Symmetry]) -> OrbitMinimum:
    """The symmetries with two sides of which a side is zero, held where they are."""
    still = OrbitMinimum({}, {}, {}, {}, 0)
    for name, symmetry in symmetries.items():
        if not isinstance(symmetry, AxisSymmetry) or not (symmetry.plus and symmetry.minus):
            continue
        squares = symmetry.grams(params)
        for side, gram, axes in zip(("plus", "minus"), squares, (symmetry.plus, symmetry.minus), strict=True):
            if not gram.any() and name not in still.outcomes:
                x = symmetry.identity(params)
                still.coordinates[name], still.drift[name] = x, torch.zeros_like(x)
                still.relaxation[name] = torch.full_like(x if x.ndim < 2 else x[0, 0], torch.inf)
                still.outcomes[name] = zero_side(side, tuple(dict.fromkeys(axis.name for axis in axes)))
    return still


def potential_of(params: Params, trace: Tensor, noise: NoiseMoments, sgd: SGD) -> Tensor:
    r"""The potential $\Phi = 2\sum_p \gamma_p\,\theta_p^2 + \sigma^2\,\mathrm{Tr}\,\Sigma$, shape ().

    Args:
        params: The parameters.
        trace: Tr Sigma at these parameters.
        noise: The moments, whose parameters are counted; those without a weight decay do not move, and add a constant.
        sgd: The settings.

    Returns:
        The potential.
    """
    decay = sgd.weight_decay
    names = [name for name in noise.mean if not isinstance(decay, Mapping) or name in decay]
    norms = [sgd.gamma_of(name) * params[name].square().sum().to(trace) for name in names]
    return 2 * (torch.stack(norms).sum() if norms else torch.zeros_like(trace)) + sgd.temperature * trace


def moved(symmetries: Mapping[str, Symmetry], params: Params, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters at a point of the orbit."""
    tensors = dict(params)
    for name, x in coordinates.items():
        # The identity would copy every tensor on which it acts.
        if x.any():
            tensors = symmetries[name].act(x, tensors)
    return tensors

"""Blocks: sets of symmetries that a measurement of the noise at a single point brings to rest in closed form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._forces import has_charge
from noetherflow._minibatch import Minibatches
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.dense import DenseOrbit
from noetherflow.equilibrium.matrix import MatrixOrbit
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import without_charge, zero_side
from noetherflow.equilibrium.result import OrbitMinimum, Outcome
from noetherflow.optimizers import SGD
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
        still: The symmetries that stay where they are: those of which the parameters of a complete side are zero, and
            those of which the optimizer conserves no charge.
    """

    orbits: tuple[Orbit, ...]
    coupled: tuple[str, ...]
    names: tuple[str, ...]
    still: OrbitMinimum

    @classmethod
    def of(
        cls, params: Params, gradients: Minibatches, *, groups: tuple[list[list[str]], set[str]] | None = None
    ) -> "Blocks":
        """Symmetries that scale entries are solved jointly where they share tensors, every other symmetry by itself.

        Args:
            params: The parameters at which the gradients were measured.
            gradients: The second moments of minibatches.
            groups: From `entangled`, which is equal at all points of an orbit; None determines it.

        Returns:
            The blocks.
        """
        symmetries = gradients.symmetries
        still = _still(params, gradients)
        sharing, doubled = groups or entangled(symmetries, params)
        orbits: list[Orbit] = []
        coupled: list[str] = []
        for names in sharing:
            group = [name for name in names if name not in still.outcomes]
            scaling = {n: symmetries[n] for n in group if symmetries[n].action is Action.SCALES_ENTRIES}
            others = [name for name in group if name not in scaling]
            if scaling:
                orbits.append(CommutingOrbit(along_axes(scaling), params, gradients))
            for name in others:
                kind = MatrixOrbit if symmetries[name].action is Action.MIXES_ROWS else DenseOrbit
                orbits.append(kind(name, params, gradients))
            if others and (len(group) > 1 or doubled.intersection(others)):
                coupled += group
        return cls(tuple(orbits), tuple(coupled), tuple(symmetries), still)

    def minimise(self) -> OrbitMinimum:
        """The minimum of every block, the other blocks held where they are."""
        minima = [self.still, *(orbit.minimise() for orbit in self.orbits)]
        columns = []
        for column in ("coordinates", "drift", "relaxation", "outcomes"):
            values = {name: value for minimum in minima for name, value in getattr(minimum, column).items()}
            columns.append({name: values[name] for name in self.names})
        coordinates, drift, relaxation, outcomes = columns
        return OrbitMinimum(coordinates, drift, relaxation, outcomes, max(minimum.iterations for minimum in minima))

    def residuals(self) -> dict[str, Residual]:
        """The drift of every symmetry at the present parameters; no force counts on those that stay where they are."""
        values = {name: residual for orbit in self.orbits for name, residual in orbit.residuals().items()}
        for name, drift in self.still.drift.items():
            values[name] = Residual(drift, torch.zeros_like(drift), torch.zeros_like(drift))
        return {name: values[name] for name in self.names}

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the minimum of every block under small additional forces, the other blocks held."""
        values = dict(self.still.coordinates)
        for orbit in self.orbits:
            values |= orbit.respond(forces)
        return {name: values[name] for name in self.names}


def _still(params: Params, gradients: Minibatches) -> OrbitMinimum:
    """The symmetries without a charge, and those with two sides of which a side is zero, held where they are."""
    still = OrbitMinimum({}, {}, {}, {}, 0)
    for name, symmetry in gradients.symmetries.items():
        charged = has_charge(symmetry, gradients.optimizer)
        outcome = _zero_side(symmetry, params) if charged else without_charge(gradients.optimizer)
        if outcome is not None:
            x = symmetry.identity(params)
            still.coordinates[name], still.drift[name] = x, torch.full_like(x, 0.0 if charged else torch.nan)
            still.relaxation[name] = torch.full_like(x if x.ndim < 2 else x[0, 0], torch.inf)
            still.outcomes[name] = outcome
    return still


def _zero_side(symmetry: Symmetry, params: Params) -> Outcome | None:
    """The outcome of a symmetry with two sides of which a side is zero; None for any other."""
    if not isinstance(symmetry, AxisSymmetry) or not (symmetry.plus and symmetry.minus):
        return None
    squares = symmetry.grams(params)
    for side, gram, axes in zip(("plus", "minus"), squares, (symmetry.plus, symmetry.minus), strict=True):
        if not gram.any():
            return zero_side(side, tuple(dict.fromkeys(axis.name for axis in axes)))
    return None


def potential_of(params: Params, gradients: Minibatches, blocks: Blocks) -> Tensor:
    r"""The potential at the parameters where the gradients were measured, shape ().

    For SGD with a single learning rate it is $2\sum_p \gamma_p\,\theta_p^2 + \sigma^2\,\mathrm{Tr}\,\Sigma$ over all
    trained parameters (a parameter without a weight decay does not move, and adds a constant). Otherwise it is the sum
    of the terms that the symmetries move.

    Args:
        params: The parameters.
        gradients: The second moments of minibatches.
        blocks: The symmetries in blocks.

    Returns:
        The potential.
    """
    optimizer = gradients.optimizer
    if isinstance(optimizer, SGD) and not isinstance(optimizer.lr, Mapping):
        total = gradients.total()
        norms = [
            optimizer.gamma_of(name) * params[name].square().sum().to(total)
            for name in gradients.names
            if optimizer.trains(name)
        ]
        return 2 * sum(norms, torch.zeros_like(total)) + optimizer.effective_lr / 2 * total
    return sum((orbit.value({}) for orbit in blocks.orbits), torch.zeros((), dtype=torch.float64))


def moved(symmetries: Mapping[str, Symmetry], params: Params, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters at a point of the orbit."""
    tensors = dict(params)
    for name, x in coordinates.items():
        # The identity would copy every tensor on which it acts.
        if x.any():
            tensors = symmetries[name].act(x, tensors)
    return tensors

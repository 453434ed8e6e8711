r"""Equations for coordinates of symmetries: the part of a displacement along the orbit.

The part of u along the orbit is $Q_x\theta$ with the coordinates x for which the rest is orthogonal to the orbit: for
all y, $\langle Q_y\theta, Q_x\theta\rangle = \langle Q_y\theta, u\rangle$. Products with generators come from the
charge at two arguments, $\langle Q_y\theta, u\rangle = y\cdot\tfrac14(C(\theta + u) - C(\theta - u))$. Conjugate
gradients solve the equations of all symmetries together: no matrix is formed, whatever the number of coordinates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Action, Symmetry

Coordinates = dict[str, Tensor]

# Steps of conjugate gradients, at most, and the share of the residual at which they end.
_STEPS = 300
_SHARE = 1e-7


def along_orbit(symmetries: Mapping[str, Symmetry], theta: Params, vector: Params) -> dict[str, Tensor]:
    """The part of a vector along the orbit, for the Euclidean product.

    Args:
        symmetries: The symmetries.
        theta: The parameters on which they act.
        vector: The vector, by parameter.

    Returns:
        The part, of the names and shapes of the parameters.
    """
    return generated(symmetries, theta, coordinates_of(symmetries, theta, vector))


def coordinates_of(
    symmetries: Mapping[str, Symmetry], theta: Params, vector: Params, free: Mapping[str, Tensor] | None = None
) -> Coordinates:
    """The coordinates of the part of a vector along the orbit, by conjugate gradients with a diagonal preconditioner.

    Args:
        symmetries: The symmetries.
        theta: The parameters on which they act.
        vector: The vector, by parameter.
        free: The coordinates that may differ from 0; by default all.

    Returns:
        The coordinates by symmetry.
    """
    scale = {name: _stretch(symmetry, theta) for name, symmetry in symmetries.items()}

    def products(of: Params) -> Coordinates:
        result = _products(symmetries, theta, of)
        return result if free is None else {name: part * free[name] for name, part in result.items()}

    residual = products(vector)
    x = {name: torch.zeros_like(part) for name, part in residual.items()}
    direction = {name: part / scale[name] for name, part in residual.items()}
    energy = start = _dot(residual, direction)
    for _ in range(_STEPS):
        if not energy > _SHARE**2 * start:
            break
        image = products(generated(symmetries, theta, direction))
        curvature = _dot(direction, image)
        if not curvature > 0:
            break
        x = _plus(x, energy / curvature, direction)
        residual = _plus(residual, -energy / curvature, image)
        scaled = {name: part / scale[name] for name, part in residual.items()}
        energy, before = _dot(residual, scaled), energy
        direction = _plus(scaled, energy / before, direction)
    return x


def generated(symmetries: Mapping[str, Symmetry], theta: Params, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The displacement of all symmetries together."""
    result = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for key, symmetry in symmetries.items():
        moved = symmetry.generate(x[key], {name: theta[name] for name in symmetry.names})
        for name, part in moved.items():
            result[name] = result[name] + part
    return result


def _products(symmetries: Mapping[str, Symmetry], theta: Params, vector: Params) -> Coordinates:
    """The products of a vector with all generators at the parameters."""
    result = {}
    for key, symmetry in symmetries.items():
        plus, minus = ({n: theta[n] + sign * vector[n] for n in symmetry.names} for sign in (1, -1))
        result[key] = (symmetry.charge(plus) - symmetry.charge(minus)) / 4
    return result


def _stretch(symmetry: Symmetry, theta: Params) -> Tensor:
    """The squared length of the displacement by each coordinate, roughly; 1 where there is none."""
    plus, minus = symmetry.grams(theta)
    if symmetry.action is Action.SCALES_EIGENSPACES:
        return torch.ones(())
    size = plus + minus
    if symmetry.action is Action.MIXES_ROWS:
        diagonal = size.diagonal()
        size = (diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2)) / 2
    return torch.where(size > 0, size, 1.0)


def _plus(first: Mapping[str, Tensor], factor: float, second: Mapping[str, Tensor]) -> Coordinates:
    return {name: part + factor * second[name] for name, part in first.items()}


def _dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return sum(float((part * second[name]).sum()) for name, part in first.items())

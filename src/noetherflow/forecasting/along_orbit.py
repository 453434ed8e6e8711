r"""The part of a displacement along the orbit of symmetries, in the metric of an optimizer.

The part is $Q_x\theta$ with the coordinates x for which the rest is orthogonal to the orbit: for all y,
$\langle Q_y\theta, Q_x\theta\rangle = \langle Q_y\theta, u\rangle$. Products with generators come from the charge at
two arguments, $\langle Q_y\theta, u\rangle = y\cdot\tfrac14(C(\theta + u) - C(\theta - u))$, and the equations of all
symmetries together are solved by conjugate gradients: no matrix is formed, whatever the number of coordinates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Symmetry

# Steps of conjugate gradients, at most, and the share of the residual at which they end.
_STEPS = 300
_SHARE = 1e-9


def along_orbit(symmetries: Mapping[str, Symmetry], theta: Params, vector: Params) -> dict[str, Tensor]:
    """The part of a vector along the orbit, for the Euclidean product.

    Args:
        symmetries: The symmetries.
        theta: The parameters on which they act.
        vector: The vector, by parameter.

    Returns:
        The part, of the names and shapes of the parameters.
    """
    residual = _products(symmetries, theta, vector)
    x = {name: torch.zeros_like(part) for name, part in residual.items()}
    direction, energy = dict(residual), _dot(residual, residual)
    start = energy
    for _ in range(_STEPS):
        if not energy > _SHARE**2 * start:
            break
        image = _products(symmetries, theta, _generated(symmetries, theta, direction))
        curvature = _dot(direction, image)
        if not curvature > 0:
            break
        length = energy / curvature
        x = {name: part + length * direction[name] for name, part in x.items()}
        residual = {name: part - length * image[name] for name, part in residual.items()}
        energy, before = _dot(residual, residual), energy
        direction = {name: part + energy / before * direction[name] for name, part in residual.items()}
    return _generated(symmetries, theta, x)


def _generated(symmetries: Mapping[str, Symmetry], theta: Params, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The displacement of all symmetries together."""
    result = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for key, symmetry in symmetries.items():
        moved = symmetry.generate(x[key], {name: theta[name] for name in symmetry.names})
        for name, part in moved.items():
            result[name] = result[name] + part
    return result


def _products(symmetries: Mapping[str, Symmetry], theta: Params, vector: Params) -> dict[str, Tensor]:
    """The products of a vector with all generators at the parameters."""
    result = {}
    for key, symmetry in symmetries.items():
        plus, minus = ({n: theta[n] + sign * vector[n] for n in symmetry.names} for sign in (1, -1))
        result[key] = (symmetry.charge(plus) - symmetry.charge(minus)) / 4
    return result


def _dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return sum(float((part * second[name]).sum()) for name, part in first.items())

"""A double rotation: the geometric mean."""

import functools
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._forces import charge_weighted, forces
from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import not_finite, of_directions
from noetherflow.equilibrium.result import OrbitMinimum, Outcome, Status


@final
class MatrixOrbit(Orbit):
    r"""The orbit of a matrix symmetry that shares no entry with another symmetry.

    With $R = 4\gamma C_+(\theta) + 2\sigma^2 N_-$ and $P = 4\gamma C_-(\theta) + 2\sigma^2 N_+$ the drift at $e^{x}$ is
    $e^{-x} P e^{-x} - e^{x} R e^{x}$; it vanishes at $e^{2x} = R^{-1} \# P$.
    """

    def __init__(self, name: str, params: Params, gradients: Minibatches) -> None:
        self._name = name
        self._noise = gradients.noise(name)
        self._charge = charge_weighted(gradients.symmetries[name], params, gradients)
        self._push, self._pull = forces(name, params, gradients)

    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Tr Sigma over the entries that this orbit moves, at a point of it; shape ()."""
        square = _spd.expm(2 * _spd.symmetric(self._coordinate(coordinates)))
        return (torch.linalg.inv(square) * self._noise.plus).sum() + (square * self._noise.minus).sum()

    def value(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The part of the potential that this orbit changes, at a point of it; shape ()."""
        square = _spd.expm(2 * _spd.symmetric(self._coordinate(coordinates)))
        return ((torch.linalg.inv(square) * self._push).sum() + (square * self._pull).sum()) / 2

    def residuals(self) -> dict[str, Residual]:
        """The drift where the noise was measured, on the directions that have something on both sides."""
        drift = self._push - self._pull
        if not (torch.isfinite(drift).all() and (self._push.any() or self._pull.any())):
            return {self._name: Residual(drift, _spd.norm(drift), torch.zeros_like(drift[0, 0]))}
        basis = self._ranges.both
        inner, size = basis.mT @ drift @ basis, _spd.norm(self._push + self._pull)
        return {self._name: Residual(drift, _spd.norm(inner), size)}

    def minimise(self) -> OrbitMinimum:
        """Where the drift is zero, on the directions that have something on both sides."""
        push, pull = self._push, self._pull
        if not (torch.isfinite(push).all() and torch.isfinite(pull).all()):
            return self._result(torch.zeros_like(push), not_finite())
        if not (push.any() or pull.any()):
            return self._result(torch.zeros_like(push), of_directions(len(push), 0, 0))
        split = self._ranges
        # Factors in front of the forces shift x, and are left out, so that no force is too large or too small.
        (push, pull), shift = (_spd.unit(push), _spd.unit(pull)), (_log(push) - _log(pull)) / 4
        basis = split.both
        x = torch.zeros_like(push)
        if basis.shape[1]:
            square = _spd.riccati(_spd.symmetric(basis.mT @ pull @ basis), _spd.symmetric(basis.mT @ push @ basis))
            inner = _spd.logm(square) / 2 + shift * torch.eye(basis.shape[1]).to(square)
            x = _spd.symmetric(basis @ inner @ basis.mT)
        held = (split.neither.shape[1], split.only_left.shape[1], split.only_right.shape[1])
        return self._result(x, of_directions(*held))

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement x with x (P + R) + (P + R) x = force, on the directions that have an equilibrium."""
        force = forces[self._name]
        if not (self._push.any() or self._pull.any()):
            return {self._name: torch.zeros_like(force)}
        values, vectors = self._stiffness
        force = force / (self._push + self._pull).abs().max()
        inner = (vectors.mT @ force @ vectors) / (values.unsqueeze(-1) + values.unsqueeze(-2))
        return {self._name: _spd.symmetric(vectors @ inner @ vectors.mT)}

    def _coordinate(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        return torch.as_tensor(coordinates.get(self._name, torch.zeros_like(self._push))).to(self._push)

    @functools.cached_property
    def _ranges(self) -> _spd.Ranges:
        """The directions by the sides that have a force."""
        return _spd.ranges(_spd.unit(self._push), _spd.unit(self._pull))

    @functools.cached_property
    def _stiffness(self) -> tuple[Tensor, Tensor]:
        """P + R over its largest entry, on the directions that have an equilibrium: eigenvalues, and eigenvectors.

        Returns:
            The eigenvalues, shape (k,), and the eigenvectors, shape (n, k).
        """
        basis = self._ranges.both
        values, vectors = torch.linalg.eigh(_spd.symmetric(basis.mT @ _spd.unit(self._push + self._pull) @ basis))
        return values, basis @ vectors

    def _result(self, x: Tensor, outcome: Outcome) -> OrbitMinimum:
        grow, shrink = _spd.expm(x), _spd.expm(-x)
        push, pull = shrink @ self._push @ shrink, grow @ self._pull @ grow
        charge = grow @ self._charge.plus @ grow + shrink @ self._charge.minus @ shrink
        drift = push - pull
        # d(drift)/dx and d(charge)/dx are the anticommutators with P + R and C+ + C-; their slowest ratio is that of
        # the pencil.
        relaxation = torch.tensor(torch.inf, dtype=x.dtype)
        if outcome.status is Status.CONVERGED:
            both = push + pull
            relaxation = charge.abs().max() / both.abs().max() / _spd.pencil(_spd.unit(both), _spd.unit(charge))[0]
        name = self._name
        return OrbitMinimum({name: x}, {name: drift}, {name: relaxation}, {name: outcome}, 0)


def _log(matrix: Tensor) -> Tensor:
    """The logarithm of the largest entry, shape (); 0 for a matrix of zeros."""
    largest = matrix.abs().max()
    return largest.log() if largest > 0 else largest

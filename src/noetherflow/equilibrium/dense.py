"""A single generator with any eigenvalues: a root on a line."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from noetherflow._forces import charge_weighted, half_forces
from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import not_finite, of_generator
from noetherflow.equilibrium.result import OrbitMinimum, Outcome, Status

_MOST_STEPS = 200


@final
class DenseOrbit(Orbit):
    r"""The orbit of a single generator with eigenvalues $q_i$.

    The potential on it, $\Phi(x) = \sum_i a_i e^{2 q_i x} + b_i e^{-2 q_i x}$, is strictly convex.
    """

    def __init__(self, name: str, params: Params, gradients: Minibatches) -> None:
        symmetry = gradients.symmetries[name]
        self._name = name
        self._eigenvalues = torch.cat(symmetry.eigenvalues)
        self._variances = torch.cat(gradients.noise(name))
        self._charge = torch.cat(charge_weighted(symmetry, params, gradients))
        decay, noise_terms = half_forces(name, params, gradients)
        self._decay, self._noise = torch.cat(decay) / 2, torch.cat(noise_terms) / 2
        # Noise in the directions that the generator does not scale stays as it is, and is not counted.

    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Tr Sigma over the directions that the generator scales, at a point of the orbit; shape ()."""
        return (self._variances * torch.exp(-2 * self._coordinate(coordinates) * self._eigenvalues)).sum()

    def value(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The part of the potential that this orbit changes, at a point of it; shape ()."""
        exponent = 2 * self._coordinate(coordinates) * self._eigenvalues
        return (self._decay * torch.exp(exponent) + self._noise * torch.exp(-exponent)).sum()

    def _coordinate(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        return torch.as_tensor(coordinates.get(self._name, 0.0)).to(self._eigenvalues)

    def residuals(self) -> dict[str, Residual]:
        """The drift where the noise was measured, zero if the generator has no equilibrium."""
        drift = -self._slope(torch.zeros_like(self._eigenvalues.sum()))
        size = (2 * self._eigenvalues.abs() * (self._decay + self._noise)).sum()
        return {self._name: Residual(drift, drift if all(self._bounds()) else torch.zeros_like(drift), size)}

    def _bounds(self) -> tuple[bool, bool]:
        """Whether the potential grows without bound as x -> +infinity, and as x -> -infinity."""
        q, decay, noise = self._eigenvalues, self._decay, self._noise
        ceiling = bool((decay[q > 0] > 0).any() or (noise[q < 0] > 0).any())
        floor = bool((decay[q < 0] > 0).any() or (noise[q > 0] > 0).any())
        return ceiling, floor

    def minimise(self) -> OrbitMinimum:
        """Where the drift is zero."""
        q, decay, noise = self._eigenvalues, self._decay, self._noise
        if not (torch.isfinite(decay).all() and torch.isfinite(noise).all()):
            return self._result(torch.zeros_like(q.sum()), not_finite(), 0)
        ceiling, floor = self._bounds()
        if not (ceiling and floor):
            return self._result(torch.zeros_like(q.sum()), of_generator(ceiling, floor), 0)
        low = high = torch.zeros_like(q.sum())
        width = 1 / q.abs().max()
        while self._slope(high) < 0:
            high, width = high + width, 2 * width
        width = 1 / q.abs().max()
        while self._slope(low) > 0:
            low, width = low - width, 2 * width
        # Newton where it stays inside the bracket, bisection where it does not.
        x = (low + high) / 2
        steps = 0
        while steps < _MOST_STEPS:
            steps += 1
            slope = self._slope(x)
            low, high = (x, high) if slope < 0 else (low, x)
            newton = x - slope / self._curvature(x)
            moved = newton if low < newton < high else (low + high) / 2
            if (moved - x).abs() <= 4 * torch.finfo(x.dtype).eps * (x.abs() + 1 / q.abs().max()):
                x = moved
                break
            x = moved
        return self._result(x, Outcome(Status.CONVERGED), steps)

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the minimum under an additional force."""
        force = forces[self._name]
        curvature = self._curvature(torch.zeros_like(force))
        return {self._name: force / curvature if all(self._bounds()) else torch.zeros_like(force)}

    def _slope(self, x: Tensor) -> Tensor:
        q = self._eigenvalues
        return (2 * q * (self._decay * torch.exp(2 * q * x) - self._noise * torch.exp(-2 * q * x))).sum()

    def _curvature(self, x: Tensor) -> Tensor:
        q = self._eigenvalues
        return (4 * q.square() * (self._decay * torch.exp(2 * q * x) + self._noise * torch.exp(-2 * q * x))).sum()

    def _result(self, x: Tensor, outcome: Outcome, steps: int) -> OrbitMinimum:
        q = self._eigenvalues
        stretch = (2 * q.square() * torch.exp(2 * q * x) * self._charge).sum()
        settled = outcome.status is Status.CONVERGED
        relaxation = stretch / self._curvature(x) if settled else torch.full_like(stretch, torch.inf)
        name = self._name
        return OrbitMinimum({name: x}, {name: -self._slope(x)}, {name: relaxation}, {name: outcome}, steps)

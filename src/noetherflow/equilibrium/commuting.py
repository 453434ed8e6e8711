"""Scalings and rescalings together: damped Newton on a sum of exponentials."""

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.equilibrium.entries import Curvature, Parts, Place, entries_of
from noetherflow.equilibrium.free import Free
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import of_rows
from noetherflow.equilibrium.result import OrbitMinimum, Status
from noetherflow.equilibrium.roles import unused_dims
from noetherflow.symmetry import AxisSymmetry

# A relative imbalance |P - R| / (P + R) below this is a drift of zero: a hundred times float64 rounding.
_BALANCED = 1e-13
_MOST_STEPS = 100
# Closed-form sweeps before Newton. They are exact where nothing is shared, and elsewhere bring Newton into its
# quadratic range.
_SWEEPS = 4
# What float64 leaves of a zero in sums of this kind.
_ROUNDING = 1e-13
# Accuracy of the linear response; conjugate gradients stop at its square.
_RESPONSE = 1e-4
# A coordinate beyond this scales weights by more than e^30: it is on its way to infinity.
_FAR = 30.0
# The last Newton step is below e^0.05 wherever there is a minimum.
_LONG = 0.05


@final
class CommutingOrbit(Orbit):
    r"""The orbit of commuting diagonal generators, with joint coordinates x.

    Every entry p of a parameter is scaled by $e^{s_p(x)}$ with $s_p$ linear, so the potential is
    $\Phi(x) = \sum_p a_p e^{k s_p(x)} + b_p e^{-k' s_p(x)}$: smooth and convex. For SGD $a_p = 2\gamma_p\theta_p^2$,
    $b_p = \sigma^2 \Sigma_{pp}$ and both exponents are 2; for AdamW $a_p = 2\lambda\sqrt{v_p}\,\theta_p^2$,
    $b_p = \eta\sqrt{v_p}$ and both are 1.
    """

    def __init__(self, symmetries: Mapping[str, AxisSymmetry], params: Params, gradients: Minibatches) -> None:
        self._symmetries, self._exponents = dict(symmetries), gradients.optimizer.exponents
        self._decayed = {name: gradients.have_decay(symmetry.names) for name, symmetry in symmetries.items()}
        axes = [axis for symmetry in symmetries.values() for axis in symmetry.regions(params)]
        self._decay, self._noise, self._charge, self._shares = {}, {}, {}, {}
        for name in dict.fromkeys(axis.name for axis in axes):
            # Entries along a dimension of no axis have equal exponents, so that only their sums count.
            dims = unused_dims(params[name], [axis for axis in axes if axis.name == name])
            terms = gradients.terms(name, params[name])
            self._decay[name], self._noise[name], self._charge[name] = (_total(term, dims) for term in terms)
            self._shares[name] = _total(gradients.shares(name), dims)
        unit = {name: torch.ones_like(tensor) for name, tensor in self._charge.items()}
        identities = {name: symmetry.identity(unit) for name, symmetry in symmetries.items()}
        self._origin = torch.cat([identity.reshape(-1) for identity in identities.values()])
        starts = itertools.accumulate((x.numel() for x in identities.values()), initial=0)
        self._places = {n: Place(start, x.shape) for (n, x), start in zip(identities.items(), starts, strict=False)}
        # Every tensor gets only the symmetries that act on it: a deep model has as many symmetries as tensors.
        acting: dict[str, dict[str, AxisSymmetry]] = {name: {} for name in unit}
        for key, symmetry in symmetries.items():
            for name in symmetry.names:
                acting[name][key] = symmetry
        self._entries = {name: entries_of(name, unit, acting[name], self._places) for name in unit}

    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The noise of the entries that this orbit moves, at a point of it; shape ()."""
        x, entries = self._flatten(coordinates), self._entries.items()
        return torch.stack([part.terms(self._shares[n], -2, part.exponents(x))[0].sum() for n, part in entries]).sum()

    def value(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The part of the potential that this orbit changes, at a point of it; shape ()."""
        return self._value(self._flatten(coordinates))

    def residuals(self) -> dict[str, Residual]:
        """The drift of every symmetry where the noise was measured."""
        push, pull = self._forces(self._origin)
        drift, rate, size = map(self._unflatten, (push - pull, self._minimum[1].project(push - pull), push + pull))
        return {name: Residual(drift[name], rate[name], size[name]) for name in self._symmetries}

    def minimise(self) -> OrbitMinimum:
        """Where all drifts are zero together."""
        return self._result(*self._minimum)

    @functools.cached_property
    def _minimum(self) -> tuple[Tensor, Free, Status, int]:
        """The minimum, the directions that have an equilibrium, how the search ended, and the Newton steps."""
        origin = self._origin
        none = origin.new_zeros(0, len(origin))
        if not all(torch.isfinite(t).all() for part in (self._decay, self._noise) for t in part.values()):
            return origin, Free(torch.zeros_like(origin, dtype=torch.bool), none), Status.NON_FINITE, 0
        push, pull = self._forces(origin)
        free = Free((push > 0) & (pull > 0), none)
        steps = 0
        for _ in range(len(origin) + 1):
            x, status, taken, last = self._descend(free)
            steps += taken
            # At a minimum Newton steps shrink quadratically. A step that does not is along a joint runaway: all forces
            # die out on the way, so that the drift alone would call it rest. The model is held in that direction.
            if not last.abs().max() > _LONG:
                break
            free = free.without(last)
        return x, free, status, steps

    def _descend(self, free: Free) -> tuple[Tensor, Status, int, Tensor]:
        """Damped Newton: the last point, how the search ended, the number of steps, and the last step."""
        x = self._sweep(self._origin, free)
        status, last = Status.NOT_CONVERGED, torch.zeros_like(x)
        for step in range(_MOST_STEPS + 1):
            local = self._local(x)
            imbalance = torch.where(free.mask, free.project(local.gradient).abs() / local.size, 0.0)
            if imbalance.max() <= _BALANCED:
                status = Status.CONVERGED
                break
            if (x.abs() > _FAR).any() or step == _MOST_STEPS:
                break
            direction = self._newton_direction(
                local.gradient, self._curvature(x), local.stiffness, free, forcing=float(imbalance.max().clamp_max(0.1))
            )
            moved = self._line_search(x, direction, local.gradient)
            if torch.equal(moved, x):
                # No step along the direction lowers the potential any more: what is left is rounding.
                status = Status.CONVERGED if imbalance.max() <= 1e3 * _BALANCED else Status.NOT_CONVERGED
                break
            x, last = moved, moved - x
        return x, status, step, last

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the joint minimum under additional forces, by conjugate gradients."""
        curvature, stiffness = self._curvature_here
        # The gradient of the potential is minus the drift.
        gradient = -self._flatten(forces)
        free = self._minimum[1]
        return self._unflatten(self._newton_direction(gradient, curvature, stiffness, free, forcing=_RESPONSE))

    @functools.cached_property
    def _curvature_here(self) -> tuple[dict[str, Curvature], Tensor]:
        """Where the noise was measured: the curvature of every entry, and its sums with squared coefficients."""
        return self._curvature(self._origin), self._local(self._origin).stiffness

    # Terms of the potential, their sums over sides, and their derivatives.

    def _terms(self, name: str, x: Tensor) -> tuple[Parts, Parts]:
        """Both terms of the potential of a tensor: weight decay and noise."""
        entries, (grow, fall, _) = self._entries[name], self._exponents
        exponents = entries.exponents(x)
        return entries.terms(self._decay[name], grow, exponents), entries.terms(self._noise[name], -fall, exponents)

    def _value(self, x: Tensor) -> Tensor:
        return torch.stack([self._value_of(name, x) for name in self._entries]).sum()

    def _value_of(self, name: str, x: Tensor) -> Tensor:
        decay, noise = self._terms(name, x)
        return decay[0].sum() + noise[0].sum()

    def _forces(self, x: Tensor, names: Iterable[str] | None = None) -> tuple[Tensor, Tensor]:
        """P, which drives a coordinate up, and R, which drives it down; of these tensors, by default of all."""
        decayed, noisy = (x.new_zeros(2, len(x)) for _ in range(2))
        for name in self._entries if names is None else names:
            decay, noise = self._terms(name, x)
            self._entries[name].add(decay, decayed)
            self._entries[name].add(noise, noisy)
        grow, fall, _ = self._exponents
        return grow * decayed[1] + fall * noisy[0], grow * decayed[0] + fall * noisy[1]

    def _local(self, x: Tensor) -> "_Local":
        """The first derivatives of the potential at a point, and the diagonal of the second."""
        grow, fall, _ = self._exponents
        slopes, sizes, stiffness = (x.new_zeros(2, len(x)) for _ in range(3))
        for name, entries in self._entries.items():
            terms = list(zip(*self._terms(name, x), strict=True))
            entries.add(tuple(grow * decay - fall * noise for decay, noise in terms), slopes)
            entries.add(tuple(grow * decay + fall * noise for decay, noise in terms), sizes, 2)
            entries.add(tuple(grow**2 * decay + fall**2 * noise for decay, noise in terms), stiffness, 2)
        return _Local(slopes[0] - slopes[1], sizes.sum(0), stiffness.sum(0))

    def _curvature(self, x: Tensor) -> dict[str, Curvature]:
        """The second derivative of the potential with respect to the exponent of every entry."""
        grow, fall, _ = self._exponents
        return {
            name: entries.curvature(
                [(grow**2, self._decay[name], grow), (fall**2, self._noise[name], -fall)], entries.exponents(x)
            )
            for name, entries in self._entries.items()
        }

    # The search.

    def _sweep(self, x: Tensor, free: Free) -> Tensor:
        """Each symmetry in turn to its closed form, as long as that lowers the potential."""
        # With equal exponents k of decay and noise, x moves by log(P / R) / 2k.
        power = self._exponents.decay + self._exponents.noise
        values = {name: self._value_of(name, x) for name in self._entries}
        for _ in range(_SWEEPS):
            for key, place in self._places.items():
                # Only the tensors of a symmetry change with it.
                names = self._symmetries[key].names
                push, pull = (place.of(force) for force in self._forces(x, names))
                step = torch.zeros_like(x)
                place.of(step).copy_(torch.where(place.of(free.mask), (push.log() - pull.log()) / power, 0.0))
                moved = x + free.project(step)
                touched = self._entries if free.held else names
                lowered = {name: self._value_of(name, moved) for name in touched}
                if sum(lowered.values()) < sum(values[name] for name in touched):
                    x = moved
                    values |= lowered
        return x

    def _newton_direction(
        self, gradient: Tensor, curvatures: Mapping[str, Curvature], stiffness: Tensor, free: Free, forcing: float
    ) -> Tensor:
        """Conjugate gradients on the Newton equation; preconditioned, so that every coordinate counts alike."""

        def hessian(direction: Tensor) -> Tensor:
            sides = direction.new_zeros(2, len(direction))
            for name, entries in self._entries.items():
                entries.add(entries.bend(curvatures[name], entries.exponents(direction)), sides)
            return free.project(sides[0] - sides[1])

        diagonal = torch.where(free.mask, stiffness, 1.0)
        x = torch.zeros_like(gradient)
        residual = free.project(-gradient)
        scaled = free.project(residual / diagonal)
        target = max(forcing * forcing, _ROUNDING) * float(scaled.abs().max())
        direction, energy = scaled.clone(), residual @ scaled
        for _ in range(10 * len(gradient) + 100):
            curved = hessian(direction)
            curvature = direction @ curved
            # Symmetries that contain each other leave directions in which nothing changes.
            if not curvature > _ROUNDING * (direction * diagonal) @ direction:
                break
            length = energy / curvature
            x = torch.addcmul(x, length, direction)
            residual = torch.addcmul(residual, length, curved, value=-1)
            scaled = free.project(residual / diagonal)
            if scaled.abs().max() <= target:
                break
            energy, previous = residual @ scaled, energy
            direction = torch.addcmul(scaled, energy / previous, direction)
        return x

    def _line_search(self, x: Tensor, direction: Tensor, gradient: Tensor) -> Tensor:
        value, slope = self._value(x), gradient @ direction
        # Below this, differences of the potential are rounding, and the convex model is better than they are.
        slack = 1e-13 * value
        length = 1.0
        while length > 1e-6:
            moved = x + length * direction
            if self._value(moved) <= value + 1e-4 * length * slope + slack:
                return moved
            length /= 2
        return x

    # Reporting.

    def _result(self, x: Tensor, free: Free, status: Status, steps: int) -> OrbitMinimum:
        push, pull = self._forces(x)
        charged = x.new_zeros(2, len(x))
        for name, entries in self._entries.items():
            entries.add(entries.terms(self._charge[name], self._exponents.charge, entries.exponents(x)), charged, 2)
        # Both the drift and the charge change with the coordinate, the charge as twice its entries while the step sizes
        # stay; their ratio is the rate at which a departure decays.
        rate = self._local(x).stiffness / (2 * charged.sum(0))
        relaxation = torch.where(free.coordinates, 1 / rate, torch.inf)
        coordinates, drift, times = (self._unflatten(t) for t in (x, push - pull, relaxation))
        pushes, pulls, frees = (self._unflatten(t) for t in (push, pull, free.coordinates))
        outcomes = {n: of_rows(frees[n], pushes[n], pulls[n], status, decays=has) for n, has in self._decayed.items()}
        return OrbitMinimum(coordinates, drift, times, outcomes, steps)

    def _flatten(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        flat = torch.zeros_like(self._origin)
        for name, value in coordinates.items():
            if name in self._places:
                place = self._places[name]
                place.of(flat).copy_(torch.as_tensor(value).expand(place.shape).reshape(place.shape or (1,)))
        return flat

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: place.of(flat).reshape(place.shape) for name, place in self._places.items()}


class _Local(NamedTuple):
    """The gradient of the potential, the sum of the sizes of all forces, and the diagonal of the Hessian: (n,) each."""

    gradient: Tensor
    size: Tensor
    stiffness: Tensor


def _total(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over some dimensions, which stay with size 1."""
    return tensor.sum(dims, keepdim=True) if dims else tensor

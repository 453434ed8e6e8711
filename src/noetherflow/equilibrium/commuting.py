"""Scalings and rescalings together: damped Newton on a sum of exponentials."""

import functools
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.equilibrium.free import Free
from noetherflow.equilibrium.orbit import Orbit, Residual
from noetherflow.equilibrium.outcomes import of_rows
from noetherflow.equilibrium.result import OrbitMinimum, Status
from noetherflow.equilibrium.roles import roles_of, unused_dims
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
        axes = [axis for symmetry in symmetries.values() for axis in symmetry.regions(params)]
        self._decay, self._noise, self._charge, self._shares = {}, {}, {}, {}
        here = []
        for name in dict.fromkeys(axis.name for axis in axes):
            # Entries along a dimension of no axis have equal exponents, so that only their sums count.
            dims = unused_dims(params[name], [axis for axis in axes if axis.name == name])
            terms = gradients.terms(name, params[name])
            self._decay[name], self._noise[name], self._charge[name] = (_total(term, dims) for term in terms[:3])
            here.append(terms.potential.sum())
            self._shares[name] = _total(gradients.shares(name), dims)
        self._unit = {name: torch.ones_like(tensor) for name, tensor in self._charge.items()}
        # Every symmetry gets only what it acts on: a deep model has as many symmetries as tensors.
        self._units = {name: {n: self._unit[n] for n in symmetry.names} for name, symmetry in symmetries.items()}
        self._roles = {name: roles_of(symmetry, self._unit) for name, symmetry in symmetries.items()}
        identities = {name: symmetry.identity(self._unit) for name, symmetry in symmetries.items()}
        self._shapes = {name: identity.shape for name, identity in identities.items()}
        self._origin = torch.cat([identity.reshape(-1) for identity in identities.values()])
        self._here = torch.stack(here).sum()

    def trace(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The noise of the entries that this orbit moves, at a point of it; shape ()."""
        scales = self._scales(self._flatten(coordinates))
        return torch.stack([(self._shares[name] * torch.exp(-2 * s)).sum() for name, s in scales.items()]).sum()

    def value(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The part of the potential that this orbit changes, at a point of it; shape ()."""
        return self._here + self._value(self._flatten(coordinates)) - self._value(self._origin)

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
            gradient, weight = self._gradient(x), self._weight(x)
            stiffness = self._sides(weight, 2).sum(0)
            size = self._sides(self._slopes(x), 2).sum(0)
            imbalance = torch.where(free.mask, free.project(gradient).abs() / size, 0.0)
            if imbalance.max() <= _BALANCED:
                status = Status.CONVERGED
                break
            if (x.abs() > _FAR).any() or step == _MOST_STEPS:
                break
            direction = self._newton_direction(
                gradient, weight, stiffness, free, forcing=float(imbalance.max().clamp_max(0.1))
            )
            moved = self._line_search(x, direction, gradient)
            if torch.equal(moved, x):
                # No step along the direction lowers the potential any more: what is left is rounding.
                status = Status.CONVERGED if imbalance.max() <= 1e3 * _BALANCED else Status.NOT_CONVERGED
                break
            x, last = moved, moved - x
        return x, status, step, last

    def respond(self, forces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The displacement of the joint minimum under additional forces, by conjugate gradients."""
        weight, stiffness = self._curvature
        # The gradient of the potential is minus the drift.
        gradient = -self._flatten(forces)
        free = self._minimum[1]
        return self._unflatten(self._newton_direction(gradient, weight, stiffness, free, forcing=_RESPONSE))

    @functools.cached_property
    def _curvature(self) -> tuple[dict[str, Tensor], Tensor]:
        """Where the noise was measured: the curvature of every entry, and its sums with squared coefficients."""
        weight = self._weight(self._origin)
        return weight, self._sides(weight, 2).sum(0)

    # Exponents, sums over sides, terms of the potential and their derivatives.

    def _scales(self, x: Tensor) -> dict[str, Tensor]:
        """The exponents s_p(x), by parameter."""
        total = {name: torch.zeros_like(tensor) for name, tensor in self._unit.items()}
        for name, coordinate in self._unflatten(x).items():
            for parameter, part in self._symmetries[name].generate(coordinate, self._units[name]).items():
                total[parameter] = total[parameter] + part
        return total

    def _sides(self, values: Params, power: int = 1) -> Tensor:
        """Sums of entries over the plus and over the minus side of every coordinate, shape (2, n)."""
        # Entries count by a power of their coefficient: the first for slopes, the second for curvatures.
        sides: list[list[Tensor]] = [[], []]
        for name, symmetry in self._symmetries.items():
            for side, sign in zip(sides, (1, -1), strict=True):
                total = self._origin.new_zeros(self._shapes[name])
                for axis, coefficient in self._roles[name]:
                    share = (sign * coefficient).clamp_min(0).pow(power)
                    if coefficient.ndim:
                        total = total + symmetry.reduce(axis.rows(share * values[axis.name]))
                    elif share > 0:
                        total = total + symmetry.reduce(axis.rows(values[axis.name]))
                side.append(total.reshape(-1))
        return torch.stack([torch.cat(side) for side in sides])

    def _terms(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Both terms of the potential, entry by entry: weight decay and noise."""
        scales = self._scales(x)
        grow, fall = self._exponents.decay, -self._exponents.noise
        decay = {name: self._decay[name] * torch.exp(grow * s) for name, s in scales.items()}
        noise = {name: self._noise[name] * torch.exp(fall * s) for name, s in scales.items()}
        return decay, noise

    def _value(self, x: Tensor) -> Tensor:
        decay, noise = self._terms(x)
        return torch.stack([(decay[name] + noise[name]).sum() for name in decay]).sum()

    def _gradient(self, x: Tensor) -> Tensor:
        grow, fall, _ = self._exponents
        decay, noise = self._terms(x)
        plus, minus = self._sides({name: grow * decay[name] - fall * noise[name] for name in decay})
        return plus - minus

    def _slopes(self, x: Tensor) -> dict[str, Tensor]:
        """The sum of both forces on every entry."""
        grow, fall, _ = self._exponents
        decay, noise = self._terms(x)
        return {name: grow * decay[name] + fall * noise[name] for name in decay}

    def _weight(self, x: Tensor) -> dict[str, Tensor]:
        """The second derivative of the potential with respect to the exponent of every entry."""
        grow, fall, _ = self._exponents
        decay, noise = self._terms(x)
        return {name: grow**2 * decay[name] + fall**2 * noise[name] for name in decay}

    def _forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P, which drives a coordinate up, and R, which drives it down."""
        decay, noise = self._terms(x)
        (decay_plus, decay_minus), (noise_plus, noise_minus) = self._sides(decay), self._sides(noise)
        grow, fall, _ = self._exponents
        return grow * decay_minus + fall * noise_plus, grow * decay_plus + fall * noise_minus

    # The search.

    def _sweep(self, x: Tensor, free: Free) -> Tensor:
        """Each symmetry in turn to its closed form, as long as that lowers the potential."""
        # With equal exponents k of decay and noise, x moves by log(P / R) / 2k.
        value, power = self._value(x), self._exponents.decay + self._exponents.noise
        for _ in range(_SWEEPS):
            for index in self._blocks():
                push, pull = self._forces(x)
                moved = x + free.project(torch.where(free.mask & index, (push.log() - pull.log()) / power, 0.0))
                if (lowered := self._value(moved)) < value:
                    x, value = moved, lowered
        return x

    def _blocks(self) -> list[Tensor]:
        sizes = [shape.numel() for shape in self._shapes.values()]
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(self._origin.device)
        return [labels == label for label in range(len(sizes))]

    def _newton_direction(
        self, gradient: Tensor, weight: Params, stiffness: Tensor, free: Free, forcing: float
    ) -> Tensor:
        """Conjugate gradients on the Newton equation; preconditioned, so that every coordinate counts alike."""

        def hessian(direction: Tensor) -> Tensor:
            scales = self._scales(direction)
            plus, minus = self._sides({name: weight[name] * s for name, s in scales.items()})
            return free.project(plus - minus)

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
            x = x + length * direction
            residual = residual - length * curved
            scaled = free.project(residual / diagonal)
            if scaled.abs().max() <= target:
                break
            energy, previous = residual @ scaled, energy
            direction = scaled + (energy / previous) * direction
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
        power = self._exponents.charge
        charge = {name: self._charge[name] * torch.exp(power * s) for name, s in self._scales(x).items()}
        # Both the drift and the charge change with the coordinate, the charge as twice its entries while the step sizes
        # stay; their ratio is the rate at which a departure decays.
        rate = self._sides(self._weight(x), 2).sum(0) / (2 * self._sides(charge, 2).sum(0))
        relaxation = torch.where(free.coordinates, 1 / rate, torch.inf)
        parts = (self._unflatten(t) for t in (x, push - pull, relaxation))
        coordinates, drift, times = parts
        pushes, pulls, frees = (self._unflatten(t) for t in (push, pull, free.coordinates))
        outcomes = {name: of_rows(frees[name], pushes[name], pulls[name], status) for name in self._symmetries}
        return OrbitMinimum(coordinates, drift, times, outcomes, steps)

    def _flatten(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        pieces = [
            torch.as_tensor(coordinates.get(name, torch.zeros(shape))).expand(shape)
            for name, shape in self._shapes.items()
        ]
        return torch.cat([piece.to(self._origin).reshape(-1) for piece in pieces])

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


def _total(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over some dimensions, which stay with size 1."""
    return tensor.sum(dims, keepdim=True) if dims else tensor

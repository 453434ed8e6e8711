r"""Motion along the orbit at a share f of the learning rate: gradient noise moves with $f^2$, weight decay with f.

Of a coordinate with the distance $y = x^* - x$ from the equilibrium of the full learning rate (f = 1), let p and m be
the Grams of both sides there, $p + m = 1$, $\tau$ the relaxation time, $F = 1/(k\tau)$, and D the share of a squared
norm that weight decay removes in a step. Both forces on the charge are F at the equilibrium: $F = N_+ + D m =
N_- + D p$ with the parts $N_\pm$ of the noise. At the share f

$$\frac{dy}{dn} = -\frac{\alpha\,e^{ky} - \beta\,e^{-ky}}{2\,(p\,e^{-ky} + m\,e^{ky})} , \qquad
\alpha = f^2 N_+ + f D m , \quad \beta = f^2 N_- + f D p .$$

So the coordinate tends to $y_f = \ln(\beta/\alpha)/2k$, which is 0 without weight decay, and the way there is that of
`path` with the Grams at $y_f$ and $1/\tau_f = k\sqrt{\alpha\beta}\,/\,(p\,e^{-ky_f} + m\,e^{ky_f})$. A scale-invariant
weight under SGD (k = 2, m = 0) obeys $d|\theta|^4/dn = 2 f^2\mathrm{lr}^2 s - 4 f\,\mathrm{lr}\,w\,|\theta|^4$.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow.equilibrium import Equilibrium
from noetherflow.forecasting.metric import shrinkage
from noetherflow.forecasting.path import Path
from noetherflow.optimizers import Optimizer

# A way that is shorter than this, as a change of a coordinate, is no way.
_SHORT = 0.02
# Share of the way to the point of rest that is walked where that point is nearer than the end of a walk.
_NEARLY = 0.95
_TINY = 1e-300


@final
class Walk(NamedTuple):
    """A number of steps at a constant share, and the coordinates that are left after these."""

    steps: float
    left: dict[str, Tensor]


@final
@dataclass(frozen=True)
class Motion:
    """How coordinates move at a share of the learning rate.

    Args:
        path: The way at the full learning rate.
        decay: D of every symmetry.
    """

    path: Path
    decay: Mapping[str, float]

    @property
    def start(self) -> dict[str, Tensor]:
        """The distances now: for a matrix those of its eigenvalues."""
        return dict(self.path.ends)

    def coordinates(self, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coordinates at given distances, in the form that the symmetries take."""
        result = {}
        for name, end in self.path.ends.items():
            x, frame = end - left[name], self.path.frames.get(name)
            result[name] = x if frame is None else (frame * x) @ frame.mT
        return result

    def walk(self, left: Mapping[str, Tensor], share: float, distance: float) -> Walk | None:
        """The steps at a share of the learning rate until the fastest coordinate has moved by a distance.

        Args:
            left: The distances at the start.
            share: f.
            distance: The change of a coordinate.

        Returns:
            The walk; almost to the point of rest where this is nearer; None where nothing is left to walk.
        """
        rest = {name: self._rest(name, share) for name in left}
        onward = self._onward(left, rest, share)
        reach = max((float(end.abs().max()) for end in onward.ends.values() if end.numel()), default=0.0)
        if not onward.longest or reach < _SHORT:
            return None
        steps = onward.earliest(min(distance, _NEARLY * reach))
        return Walk(steps, {name: left[name] - moved for name, moved in onward.at(steps).items()})

    def _forces(self, name: str, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p, m, alpha and beta of every coordinate."""
        k, lean = self.path.exponent, self.path.lean[name]
        p, m = (1 - lean) / 2, (1 + lean) / 2
        force = 1 / (k * self.path.times[name])
        # Where other symmetries move too, the decay alone may exceed the force: noise is never negative.
        decay = torch.minimum(torch.full_like(force, self.decay[name]), force / torch.maximum(p, m))
        plus, minus = force - decay * m, force - decay * p
        return p, m, share**2 * plus + share * decay * m, share**2 * minus + share * decay * p

    def _rest(self, name: str, share: float) -> Tensor:
        """The distance at which a coordinate rests."""
        _, _, alpha, beta = self._forces(name, share)
        both = (alpha > 0) & (beta > 0)
        return torch.where(both, (beta.clamp_min(_TINY) / alpha.clamp_min(_TINY)).log() / (2 * self.path.exponent), 0.0)

    def _onward(self, left: Mapping[str, Tensor], rest: Mapping[str, Tensor], share: float) -> Path:
        """The way from given distances to the points of rest."""
        k = self.path.exponent
        ends, times, lean = {}, {}, {}
        for name, place in rest.items():
            p, m, alpha, beta = self._forces(name, share)
            plus, minus = p * torch.exp(-k * place), m * torch.exp(k * place)
            times[name] = (plus + minus) / (k * (alpha * beta).sqrt()).clamp_min(_TINY)
            times[name] = torch.where((alpha > 0) & (beta > 0), times[name], math.inf)
            ends[name] = torch.where(torch.isfinite(times[name]), left[name] - place, 0.0)
            lean[name] = (minus - plus) / (plus + minus)
        return Path(ends, {}, times, lean, k, {}, ())


def motion_of(path: Path, equilibrium: Equilibrium, settings: Optimizer) -> Motion:
    """The motion along a path, for the slowest weight decay of the parameters of each symmetry."""
    return Motion(path, {n: min(shrinkage(settings, p) for p in s.names) for n, s in equilibrium.symmetries.items()})

r"""How far a model still learns: what the mean gradient alone, without noise, makes of Tr H.

A forecast moves the parameters along the orbit of the symmetries, which no loss notices. Learning moves the parameters
across, along the mean gradient. It is followed for the half time of the forecast, as the gradient flow of the mean loss
of the given batches, so that directions that come to rest within that time count with where they rest. The part of the
weight decay along the orbit is taken out: the forecast has that part.

At a minimum of the loss of the source of the data, the loss of a sample still has a gradient. So the loss counts as
falling if its fall per step, $\mathrm{lr}\,|\nabla L|^2_m$ without bias from products of gradients of different
batches, is beyond two errors of what independent gradients without a mean would give.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import scipy.stats
import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.forecasting.along_orbit import along_orbit
from noetherflow.forecasting.estimate import Estimate, spread_of
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.gradient_flow import flow, reach, stages
from noetherflow.forecasting.learning import Learning, no_learning
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import Metric, lr_of, memory_of, reference_lr
from noetherflow.forecasting.traces import by_batch
from noetherflow.optimizers import SGD, AdamW, Optimizer
from noetherflow.symmetry import Symmetry

# Groups of batches that are left out in turn, at most.
_GROUPS = 8
# Random vectors for Tr H where the trace is not exact.
_VECTORS = 8
# The largest curvature on the way is taken as this multiple of that at the start, and doubled if the loss rises.
_ROOM, _DOUBLINGS = 4.0, 2


class _Seen(NamedTuple):
    """The end of a flow: the change of the loss, and of Tr H by random vector."""

    loss: float
    traces: Tensor


@final
@dataclass(frozen=True)
class Learner:
    """The gradient flow of the mean loss, across the orbit.

    Args:
        mean_loss: The mean loss.
        exact: The exact diagonal of the Hessian; None for random vectors.
        settings: The settings of the optimizer.
        metric: The metric of the optimizer where the model is.
        symmetries: The symmetries of which the optimizer conserves a charge.
        curvature: The largest eigenvalue of H in the metric.
        seed: The seed of the random vectors.
    """

    mean_loss: MeanLoss
    exact: Exact | None
    settings: Optimizer
    metric: Metric
    symmetries: dict[str, Symmetry]
    curvature: float
    seed: int

    def horizon(self, steps: float) -> float:
        """The number of steps for which learning is followed, of given steps."""
        return min(steps, reach(_ROOM * self._steepest) / self._pace)

    def after(self, steps: float, orbit: float) -> Learning:
        """The changes by learning alone.

        Args:
            steps: The number of steps, at most `horizon`.
            orbit: The change of Tr H along the orbit in that time.

        Returns:
            The changes; `error` is from random vectors, `sampling` from leaving out batches.
        """
        given, slope = self.mean_loss, self._slope()
        start = by_batch(given, self.exact, given.params, _VECTORS, self.seed)
        everything = [*range(len(given.batches))]
        seen = self._run(everything, steps, start)
        if seen is None:
            return no_learning("gradient descent without noise is not stable from here on")
        value, error = float(seen.traces.mean()), 0.0 if self.exact else spread_of(seen.traces)
        result = Learning(steps, slope, seen.loss, Estimate(value, error), orbit)
        # Further runs cost as much as the first, and only near a verdict they decide.
        far = abs(value) >= abs(orbit) if result.falls else abs(value) < abs(orbit) / 2
        if len(everything) == 1 or far:
            return result
        groups = [everything[first::_GROUPS] for first in range(min(_GROUPS, len(everything)))]
        without = []
        for group in groups:
            part = self._run([k for k in everything if k not in group], steps, start)
            if part is None:
                return no_learning("gradient descent without noise is not stable on a part of the batches")
            without.append(float(part.traces.mean()))
        unbiased, sampling = jackknife(value, without, [float(given.weights[group].sum()) for group in groups])
        return result._replace(trace=Estimate(value if result.falls else unbiased, error, sampling))

    def _slope(self) -> Estimate:
        r"""The change of the loss per step, $-\mathrm{lr}\,|\nabla L|^2_m$, from products of different batches.

        Returns:
            The change; its error is the root mean square over all signs of the gradients of the batches, which is that
            of gradients without a mean.
        """
        given, (pull, shift) = self.mean_loss, self._decay
        weights, parts = given.weights, [gradient for _, gradient in given.gradients(given.params)]
        products = torch.zeros(len(parts), len(parts), dtype=torch.float64)
        for name, multiplier in self.metric.multipliers.items():
            rows = torch.stack([part[name] for part in parts])
            if pull:
                rows = rows + pull[name] * given.params[name] - shift[name]
            scaled = (rows * multiplier.sqrt()).flatten(1).double()
            products += (scaled @ scaled.mT).cpu()
        pairs = weights[:, None] * weights * products
        pairs.fill_diagonal_(0)
        among = 1 - float(weights.square().sum())
        if len(parts) < 3:
            return Estimate(-self._pace * float((weights[:, None] * weights * products).sum()))
        error = (2 * pairs.square().sum()).sqrt()
        return Estimate(-self._pace * float(pairs.sum()) / among, 0.0, self._pace * float(error) / among)

    @property
    def _pace(self) -> float:
        """The time of the flow per step."""
        lr, memory = (of(self.settings, self.mean_loss.names) for of in (reference_lr, memory_of))
        return lr / (1 - memory) if isinstance(self.settings, SGD) else lr

    @functools.cached_property
    def _steepest(self) -> float:
        """The largest curvature in the metric, with weight decay."""
        decays = [float((part * self.metric.multipliers[name]).max()) for name, part in self._decay[0].items()]
        return max(self.curvature, 0.0) + max(decays, default=0.0)

    @functools.cached_property
    def _decay(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""Weight decay as a part of the gradient, $c_p\theta_p - o_p$: c, and o, the part along the orbit now.

        Returns:
            Both by parameter; empty without weight decay.
        """
        given, multipliers = self.mean_loss, self.metric.multipliers
        pull = {}
        for name, tensor in given.params.items():
            if isinstance(self.settings, AdamW) and self.settings.decoupled:
                share = self.settings.decay_of(name) * lr_of(self.settings, name) / self._reference
                # An entry without a multiplier has no gradient, and its decay changes no loss.
                pull[name] = torch.where(multipliers[name] > 0, share / multipliers[name], 0.0)
            else:
                pull[name] = torch.full_like(tensor, _decay_of(self.settings, name))
        if not any(bool(part.any()) for part in pull.values()):
            return {}, {}
        names = {name for symmetry in self.symmetries.values() for name in symmetry.names}
        root = {n: multipliers[n].double().cpu().sqrt() for n in given.names if n in names}
        wide = {n: given.function.params[n].double().cpu() for n in names}
        root |= {n: torch.ones_like(wide[n]) for n in names - root.keys()}
        theta = {n: torch.where(r > 0, wide[n] / r, 0.0) for n, r in root.items()}
        decayed = {
            n: root[n].square() * pull[n].double().cpu() * theta[n] if n in pull else torch.zeros_like(t)
            for n, t in theta.items()
        }
        along = along_orbit(self.symmetries, theta, decayed)
        shift = {}
        for name, tensor in given.params.items():
            part = torch.where(root[name] > 0, along[name] / root[name], 0.0) if name in along else None
            shift[name] = torch.zeros_like(tensor) if part is None else part.to(tensor.device, tensor.dtype)
        return pull, shift

    @property
    def _reference(self) -> float:
        return reference_lr(self.settings, self.mean_loss.names)

    def _run(self, numbers: Sequence[int], steps: float, start: Tensor) -> _Seen | None:
        """Learning from some of the batches; None if the loss rises however small the steps are."""
        given, time = self.mean_loss, self._pace * steps
        weights = given.weights[[*numbers]] / given.weights[[*numbers]].sum()

        def force(params: Params) -> dict[str, Tensor]:
            gradient = self._gradient(params, numbers, weights)[1]
            return {name: self.metric.multipliers[name] * g for name, g in gradient.items()}

        before = self._gradient(given.params, numbers, weights)[0]
        for doubling in range(_DOUBLINGS + 1):
            end = flow(force, given.params, time, stages(time, _ROOM * 2**doubling * self._steepest))
            after = self._gradient(end, numbers, weights)[0]
            # A flow along a gradient lowers its function: where it does not, a step was unstable.
            if after <= before:
                traces = by_batch(given, self.exact, end, _VECTORS, self.seed)
                return _Seen(after - before, weights @ (traces - start)[[*numbers]])
        return None

    def _gradient(self, params: Params, numbers: Sequence[int], weights: Tensor) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of batches and its gradient, with the weight decay across the orbit."""
        parts = self.mean_loss.gradients(params, numbers)
        value = sum(w * part for w, (part, _) in zip(weights.tolist(), parts, strict=True))
        pull, shift = self._decay
        total = {}
        for name in self.mean_loss.names:
            terms = [w * g[name] for w, (_, g) in zip(weights.tolist(), parts, strict=True)]
            total[name] = sum(terms[1:], terms[0])
            if pull:
                decayed = pull[name] * params[name]
                value += float((params[name] * (decayed / 2 - shift[name])).double().sum())
                total[name] = total[name] + decayed - shift[name]
        return value, total


def jackknife(value: float, without: Sequence[float], shares: Sequence[float]) -> tuple[float, float]:
    """A statistic without its bias to first order, and its error, from leaving out a group of the data at a time.

    Args:
        value: The statistic of all data.
        without: The statistic without each group, two groups or more.
        shares: The share of each group in the data.

    Returns:
        The statistic, and an error of which two make an interval of 95 %, however few the groups are.

    Source: Busing, Meijer and van der Leeden (1999), for groups of different sizes.
    """
    pseudo = [(value - (1 - share) * part) / share for share, part in zip(shares, without, strict=True)]
    mean = sum(share * part for share, part in zip(shares, pseudo, strict=True))
    terms = [(part - mean) ** 2 * share / (1 - share) for share, part in zip(shares, pseudo, strict=True)]
    wider = float(scipy.stats.t.ppf(0.975, len(pseudo) - 1)) / 2
    return mean, wider * math.sqrt(sum(terms) / len(terms))


def _decay_of(settings: Optimizer, name: str) -> float:
    """The factor of a parameter that weight decay adds to its gradient."""
    if isinstance(settings, SGD):
        return 2 * settings.gamma_of(name)
    assert isinstance(settings, AdamW)
    return settings.decay_of(name)

"""What the gradients of a single step say: their scatter about their mean, and that mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._device import joined
from noetherflow._types import Params
from noetherflow.noise.buffers import Buffers
from noetherflow.noise.pooling import all_grams
from noetherflow.symmetry import AxisSymmetry, Grams


@final
@dataclass(frozen=True, eq=False)
class StepNoise:
    r"""The noise and the mean gradient in a step of training, parameter by parameter.

    With k gradients $g_j$ (of examples or of microbatches) of $b_j$ examples each, N in all, and their mean $\bar g$,
    $\hat\Sigma = \frac{1}{k-1}\sum_j b_j (g_j-\bar g)(g_j-\bar g)^T$ is an unbiased estimate of the covariance of an
    example's gradient, and $|\bar g|^2 - \mathrm{Tr}\,\hat\Sigma / N$ of the squared norm of the mean gradient.

    Args:
        scatter: Squares of the gradients about their mean, up to a factor.
        of_scatter: The factor which makes them squares of $\hat\Sigma$.
        mean: Squares of the mean gradient, up to a factor.
        of_mean: That factor.
        examples: Their number N.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Linear(4, 2)
        >>> meter, seen = nf.NoiseMeter(net, {}), []
        >>> meter.observers.append(lambda step: seen.append((step.names, step.trace(), step.examples)))
        >>> batch = torch.randn(8, 4)
        >>> with meter.step(batch):
        ...     net(batch).square().sum(1).mean().backward()
        >>> names, trace, examples = seen[0]
        >>> names, examples, torch.allclose(trace.sum(), meter.noise.trace)
        (('weight', 'bias'), 8, True)

    Source: McCandlish, Kaplan, Amodei et al. (2018), appendix A.1, for the unbiased pair.
    """

    scatter: Buffers
    of_scatter: float
    mean: Buffers
    of_mean: float
    examples: int

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of `trace` and `norm_sq`."""
        return tuple(self.scatter.model_layout.layouts)

    def trace(self, metric: Params | None = None) -> Tensor:
        r"""$\mathrm{Tr}\,\hat\Sigma$ of every parameter, per example, shape (P,), float64, on the CPU.

        Args:
            metric: Weights $p_i$ of the entries of each parameter, for $\mathrm{Tr}[P\hat\Sigma]$; the squares of all
                entries have to be measured.

        Returns:
            Traces.
        """
        return self.of_scatter * _totals(self.scatter, metric)

    def norm_sq(self, metric: Params | None = None) -> Tensor:
        """The unbiased squared norm of the mean gradient of every parameter, shape (P,): it may be negative."""
        return self.pairs(metric)[:, 1]

    def pairs(self, metric: Params | None = None) -> Tensor:
        """Trace and unbiased squared norm of every parameter, shape (P, 2): each sum over entries is taken once."""
        trace = self.trace(metric)
        return torch.stack([trace, self.of_mean * _totals(self.mean, metric) - trace / self.examples], -1)

    def grams(
        self, symmetries: Mapping[str, AxisSymmetry], like: Params, factors: Mapping[str, float]
    ) -> dict[str, Grams]:
        r"""Both sides of $\mathrm{Tr}[\hat\Sigma' Q]$ for gradients that are multiplied by a number each parameter.

        Args:
            symmetries: What was measured, by name.
            like: The parameters.
            factors: By what the gradient of each parameter is multiplied.

        Returns:
            Grams per example, by symmetry.
        """
        numbers, entries = self.scatter.numbers.clone(), {}
        for name, part in self.scatter.model_layout.parts.items():
            numbers[part] *= self.of_scatter * factors[name] ** 2
            if name in self.scatter.entries:
                entries[name] = self.scatter.entries[name] * (self.of_scatter * factors[name] ** 2)
        return all_grams(symmetries, Buffers(self.scatter.model_layout, numbers, entries).squares(), like)


def _totals(squares: Buffers, metric: Params | None) -> Tensor:
    if metric is None:
        return squares.numbers[[part.start for part in squares.model_layout.parts.values()]].cpu()
    # Rows are summed in the dtype of the entries, which are squares that have been rounded to it; their sum in float64.
    sums = (_dot(w.to(squares.entries[n].dtype), squares.entries[n]) for n, w in metric.items())
    return torch.stack(joined(sums)).cpu()


def _dot(weights: Tensor, squares: Tensor) -> Tensor:
    return torch.linalg.vecdot(torch.atleast_1d(weights), torch.atleast_1d(squares)).sum(dtype=torch.float64)

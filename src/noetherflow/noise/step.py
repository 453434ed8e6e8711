"""What the gradients of a single step say: their scatter about their mean, and that mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

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
        weighted: Whether squares were also summed with weights, such as those of a metric.

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
    weighted: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of `trace` and `norm_sq`."""
        return tuple(self.scatter.model_layout.layouts)

    def trace(self, *, weighted: bool = False) -> Tensor:
        r"""$\mathrm{Tr}\,\hat\Sigma$ of every parameter, per example, shape (P,), float64, on the CPU.

        Args:
            weighted: Sum with the weights $p_i$ of the entries that the step was given, for $\mathrm{Tr}[P\hat\Sigma]$.

        Returns:
            Traces.
        """
        return self.of_scatter * _totals(self.scatter, weighted=weighted)

    def norm_sq(self, *, weighted: bool = False) -> Tensor:
        """The unbiased squared norm of the mean gradient of every parameter, shape (P,): it may be negative."""
        trace = self.trace(weighted=weighted)
        return self.of_mean * _totals(self.mean, weighted=weighted) - trace / self.examples

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


def _totals(squares: Buffers, *, weighted: bool) -> Tensor:
    layouts = squares.model_layout.layouts.values()
    places = [layout.weighted if weighted else 0 for layout in layouts]
    starts = [part.start for part in squares.model_layout.parts.values()]
    return squares.numbers[[start + place for start, place in zip(starts, places, strict=True)]].cpu()

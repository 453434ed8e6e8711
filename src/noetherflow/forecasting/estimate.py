"""Numbers with errors, now and at the equilibrium; a number that cannot be told says why."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

# Why there is no largest stable step where no direction curves up.
NEVER_UNSTABLE = "the largest eigenvalue is not positive, so that no step is unstable"


@final
class Estimate(NamedTuple):
    """A number with its errors.

    Args:
        value: The number; NaN if it cannot be told.
        error: Standard error of the method on the given data, such as that of random vectors; 0 for an exact number,
            NaN where nothing is known.
        sampling: Standard error for another sample of the data; NaN where nothing is known.
        why: Why the number cannot be told; empty if the number is known.
    """

    value: float
    error: float = math.nan
    sampling: float = math.nan
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether the number can be told."""
        return not math.isnan(self.value)

    @property
    def total(self) -> float:
        """Both errors together; an error of which nothing is known is left out, NaN if nothing is known of either."""
        parts = [part for part in (self.error, self.sampling) if not math.isnan(part)]
        return math.hypot(*parts) if parts else math.nan

    def over(self, numerator: float) -> "Estimate":
        """A number divided by this one, to first order in the errors."""
        if not self.known or self.value == 0:
            return self._replace(value=math.nan, why=self.why or "the divisor is 0")
        slope = abs(numerator) / self.value**2
        return Estimate(numerator / self.value, slope * self.error, slope * self.sampling)

    def __str__(self) -> str:
        if not self.known:
            return "cannot be told"
        return f"{self.value:.4g}" + ("" if math.isnan(self.total) else f" +- {self.total:.2g}")


@final
class Change(NamedTuple):
    """A number now and at the equilibrium, and the ratio of both."""

    now: Estimate
    then: Estimate
    ratio: Estimate


def unknown(why: str) -> Estimate:
    """A number that cannot be told."""
    return Estimate(math.nan, why=why)


def change_of(now: Estimate, then: Estimate) -> Change:
    """Both numbers and their ratio, with errors taken as independent."""
    if not (now.known and then.known and now.value):
        return Change(now, then, unknown(now.why or then.why or "the number is 0 now"))
    ratio = then.value / now.value

    def relative(first: float, second: float) -> float:
        return math.hypot(first / now.value, second / then.value) if then.value else math.nan

    errors = (abs(ratio) * relative(now.error, then.error), abs(ratio) * relative(now.sampling, then.sampling))
    return Change(now, then, Estimate(ratio, *errors))


def mean_of(samples: Tensor, weights: Tensor) -> Estimate:
    """The mean of samples, shape (batches, vectors).

    Args:
        samples: A number for every batch and every random vector; a single column is exact on every batch.
        weights: The share of each batch, shape (batches,).

    Returns:
        The mean, its error from the vectors, and its error from the batches.
    """
    value = float((weights @ samples).mean())
    return Estimate(value, *errors_of(samples, weights))


def errors_of(samples: Tensor, weights: Tensor) -> tuple[float, float]:
    """The standard errors of the mean of samples, from vectors and from batches; as in `mean_of`."""
    batches, vectors = samples.shape
    by_vector, by_batch = weights @ samples, samples.mean(1)
    error = 0.0 if vectors == 1 else float(by_vector.std() / vectors**0.5)
    spread = (weights * (by_batch - weights @ by_batch)).square().sum()
    return error, math.nan if batches == 1 else float((spread * batches / (batches - 1)).sqrt())


def ratio_of(now: Tensor, then: Tensor, weights: Tensor) -> Change:
    """Means of samples and their ratio, whose errors are those of common vectors and batches, to first order."""
    before, after = mean_of(now, weights), mean_of(then, weights)
    if not before.value:
        return Change(before, after, unknown("the trace is 0 now"))
    ratio = after.value / before.value
    return Change(before, after, Estimate(ratio, *errors_of((then - ratio * now) / before.value, weights)))


def spread_of(values: Tensor) -> float:
    """Standard error of the mean of independent values, shape (n,); NaN for a single value."""
    return float(torch.std(values) / len(values) ** 0.5) if len(values) > 1 else math.nan

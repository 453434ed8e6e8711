"""The noise scale of a set of parameters, with its confidence interval, and what follows from it."""

import math
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class ScaleEstimate:
    r"""The simple noise scale $\mathcal B = \mathrm{Tr}\,\Sigma / |G|^2$, in examples.

    At the batch size $\mathcal B$ the noise of the minibatch gradient is as large as the mean gradient G.

    Args:
        trace: $\mathrm{Tr}\,\Sigma$ per example, averaged over steps.
        norm_sq: $|G|^2$, unbiased and averaged over steps: it may be negative where the noise hides it.
        low: Lower end of the confidence interval of the noise scale.
        high: Upper end; infinite if $|G|^2$ cannot be told from zero.
        steps: How many steps were measured.

    Examples:
        >>> import noetherflow as nf
        >>> estimate = nf.ScaleEstimate(trace=600.0, norm_sq=2.0, low=250.0, high=380.0, steps=40)
        >>> estimate.scale, estimate.bounded
        (300.0, True)
        >>> f"{estimate.saved_by_doubling(100):.1%}"
        '37.5%'

    Source: McCandlish, Kaplan, Amodei et al. (2018), An Empirical Model of Large-Batch Training, section 2.
    """

    trace: float
    norm_sq: float
    low: float
    high: float
    steps: int

    @property
    def scale(self) -> float:
        r"""$\mathrm{Tr}\,\Sigma / |G|^2$; infinite if the estimate of $|G|^2$ is not positive."""
        return self.trace / self.norm_sq if self.norm_sq > 0 else math.inf

    @property
    def bounded(self) -> bool:
        """Whether the interval has an upper end: $|G|^2$ can be told from zero."""
        return math.isfinite(self.high)

    @property
    def critical_batch_size(self) -> float:
        r"""The batch size above which examples are spent for ever fewer steps saved: the noise scale.

        In the model of McCandlish et al. a loss takes $S_{\min} (1 + \mathcal B / B)$ steps at the batch size B, so
        that $\mathcal B$ examples a step cost twice the fewest steps and twice the fewest examples.
        """
        return self.scale

    def saved_by_doubling(self, batch_size: float) -> float:
        r"""The share of steps that twice the batch size saves, $\frac{\mathcal B}{2(B + \mathcal B)}$.

        It is 1/2 for small batches, 1/4 at the critical batch size, and 0 far above.

        Args:
            batch_size: The present batch size B.

        Returns:
            A number between 0 and 1/2.
        """
        return 0.5 if math.isinf(self.scale) else self.scale / (2 * (batch_size + self.scale))

    def __str__(self) -> str:
        # NaN reaches no comparison below: averages are of finite numbers.
        upper = f"{self.high:,.4g}" if self.bounded else "unbounded"
        scale = f"{self.scale:,.4g}" if math.isfinite(self.scale) else "not told from infinity"
        return f"noise scale {scale} examples ({self.low:,.4g} to {upper}, {self.steps} steps measured)"

"""What a forecast says of learning: how far the loss still falls, and what that makes of the sharpness."""

import math
from typing import NamedTuple, final

from noetherflow.forecasting.estimate import Estimate, unknown


@final
class Learning(NamedTuple):
    """What learning alone makes of the sharpness, beside what the forecast makes of it in the time.

    Args:
        steps: The time, in steps of the optimizer: the half time of the forecast, or what a limited number of
            gradients covers of it.
        slope: The change of the loss per step, weight decay across the orbit included, without the bias that a sample
            of the data has; `sampling` is the error of a loss that does not fall, NaN for fewer than three batches.
        loss: The change of the mean loss of the batches in the time, by gradient descent without noise, weight decay
            across the orbit included.
        trace: The change of Tr H in the time, by gradient descent without noise. `sampling` is NaN where the verdict
            does not depend on this error; with it, the bias that a sample of the data has is taken out, unless the loss
            of the batches falls.
        orbit: The change of Tr H in the time by the motion along the orbit, which is forecast.
    """

    steps: float
    slope: Estimate
    loss: float
    trace: Estimate
    orbit: float

    @property
    def falls(self) -> bool:
        """Whether the loss falls by more than two of its errors; where nothing is known of the error, it does."""
        return self.slope.known and -self.slope.value > 2 * _known(self.slope.total)

    @property
    def learns(self) -> bool:
        """Whether the loss falls, or the change of Tr H is beyond two errors, which shows slow directions too."""
        known = not math.isnan(self.trace.sampling)
        return self.falls or (known and abs(self.trace.value) > 2 * self.trace.total)

    @property
    def dominates(self) -> bool:
        """Whether the model learns, and Tr H may change by that as much as along the orbit, within two errors."""
        return self.learns and not abs(self.trace.value) + 2 * _known(self.trace.total) < abs(self.orbit)

    @property
    def reason(self) -> str:
        """Why the sharpness at the end cannot be told where learning dominates, and what to do."""
        if not self.falls:
            return f"the model still learns ({self}): train on, and ask for another forecast"
        return (
            f"the loss still falls, {self._fall}: train on, and ask for another forecast when the loss has stopped "
            "falling"
        )

    @property
    def _fall(self) -> str:
        return f"by {self.slope._replace(value=-self.slope.value)} per step"

    def __str__(self) -> str:
        if not self.trace.known:
            return f"how far the model still learns cannot be told: {self.trace.why}"
        # An exact trace of these batches has the error 0, which says nothing of other batches.
        change = str(self.trace) if self.trace.total else f"{self.trace.value:.4g}"
        falls = f"the loss falls {self._fall}; " if self.falls else ""
        return (
            f"{falls}within {self.steps:,.0f} steps, learning alone would change Tr H by {change}, and the motion "
            f"along the orbit changes Tr H by {self.orbit:.4g}"
        )


def no_learning(why: str) -> Learning:
    """Learning of which nothing can be told."""
    none = unknown(why)
    return Learning(math.nan, none, math.nan, none, math.nan)


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error

"""Two noisy numbers of many groups, averaged over steps, and the confidence interval of their ratio."""

import math
from collections.abc import Mapping
from typing import final

import torch
from scipy.stats import t as student
from torch import Tensor

from noetherflow._errors import SettingsError


@final
class PairAverage:
    r"""Exponential averages of pairs (a, b), with what their spread over steps says of their errors.

    Step s of n has the weight $w_s = \beta^{n-s}$; averages are divided by $W = \sum_s w_s$, which corrects for the
    start. With $W_2 = \sum_s w_s^2$ the average is worth $W^2/W_2$ steps, which approaches the window.

    Args:
        groups: Number of pairs K.
        window: The number of steps that an average is worth at most, or infinity for equal weights.
    """

    def __init__(self, groups: int, window: float) -> None:
        self._beta = 1.0 if math.isinf(window) else 1 - 2 / (window + 1)
        self.weight = self.weight_sq = 0.0
        self.mean = torch.zeros(groups, 2, dtype=torch.float64)
        self._scatter = torch.zeros(groups, 2, 2, dtype=torch.float64)

    def add(self, pairs: Tensor) -> None:
        """Take the pairs of a step, shape (K, 2)."""
        before = self._beta * self.weight
        self.weight = before + 1
        self.weight_sq = self._beta**2 * self.weight_sq + 1
        gap = pairs - self.mean
        # West (1979), with weights that fade: no difference of large squares.
        self.mean += gap / self.weight
        self._scatter = self._beta * self._scatter + (before / self.weight) * gap[:, :, None] * gap[:, None, :]

    @property
    def steps_worth(self) -> float:
        """How many steps of equal weight would have this error."""
        return self.weight**2 / self.weight_sq if self.weight else 0.0

    def covariance(self) -> Tensor:
        """The covariance of both averages of each group, shape (K, 2, 2); it needs steps_worth above 1."""
        unbiased = self._scatter / (self.weight - self.weight_sq / self.weight)
        return unbiased / self.steps_worth

    def intervals(self, confidence: float) -> list[tuple[float, float]]:
        r"""The interval of a/b of each group, for numbers a and b that are not negative.

        Fieller's: all ratios $\rho$ for which $a - \rho b$ can be zero, by Student's t with steps_worth - 1 degrees of
        freedom. It has no upper end if b can be zero, and it does not rely on b being far from zero, as an error of
        the ratio would.

        Args:
            confidence: Such as 0.95.

        Returns:
            Lower and upper end by group; 0 and infinity before the second step.
        """
        freedom = self.steps_worth - 1
        if freedom < 1e-9:
            return [(0.0, math.inf)] * len(self.mean)
        quantile = float(student.ppf((1 + confidence) / 2, freedom))
        return [
            _fieller(float(a), float(b), (quantile**2 * spread).tolist())
            for (a, b), spread in zip(self.mean, self.covariance(), strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later averages depend on."""
        weights = torch.tensor([self.weight, self.weight_sq], dtype=torch.float64)
        return {"weights": weights, "mean": self.mean.clone(), "scatter": self._scatter.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where an average stood that `state_dict` describes."""
        mean, scatter = state["mean"], state["scatter"]
        if mean.shape != self.mean.shape or scatter.shape != self._scatter.shape:
            raise SettingsError(f"the saved averages have the shape {tuple(mean.shape)}, not {tuple(self.mean.shape)}")
        self.weight, self.weight_sq = state["weights"].tolist()
        self.mean, self._scatter = mean.clone(), scatter.clone()


def _fieller(a: float, b: float, spread: list[list[float]]) -> tuple[float, float]:
    r"""The ratios $\rho \ge 0$ with $(a - \rho b)^2 \le s_{aa} - 2 \rho s_{ab} + \rho^2 s_{bb}$."""
    (s_aa, s_ab), (_, s_bb) = spread
    square, middle, constant = b * b - s_bb, a * b - s_ab, a * a - s_aa
    root = math.sqrt(max(0.0, middle * middle - square * constant))
    if square > 0 and b > 0:
        # Both ends; the product of the ends is constant / square, which keeps the digits of the smaller end.
        high = (middle + root) / square
        return max(0.0, constant / (square * high)) if high > 0 else 0.0, max(0.0, high)
    if constant <= 0 or square >= 0:
        return 0.0, math.inf
    # b may be zero, a is not: the positive root is the lower end.
    return constant / (middle + root), math.inf

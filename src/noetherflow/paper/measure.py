"""Statistics that the claims are made of, and numbers that settings are made of."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Of the mean over replicas; NaN for fewer than two of them."""
    return math.nan if len(values) < 2 else (values.std() / len(values) ** 0.5).item()


def slope(x: Tensor, y: Tensor) -> float:
    """Of the least-squares line through some points."""
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def geometric(ends: Sequence[float], count: int) -> Tensor:
    """Numbers from one end to the other in equal ratios."""
    return torch.logspace(math.log10(ends[0]), math.log10(ends[1]), count, dtype=torch.float64)


def r_squared(x: Tensor, y: Tensor) -> float:
    """The share of the variance of y that the least-squares line explains."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].square().item()

"""Statistics of measurements for the claims, and geometric sequences for the settings."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over the first axis (replicas); NaN for fewer than two replicas."""
    return math.nan if len(values) < 2 else (values.std() / len(values) ** 0.5).item()


def slope(x: Tensor, y: Tensor) -> float:
    """Slope of the least-squares line through points (x, y), each of shape (n,)."""
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def geometric(ends: Sequence[float], count: int) -> Tensor:
    """Geometric sequence of `count` numbers from `ends[0]` to `ends[1]`, float64."""
    return torch.logspace(math.log10(ends[0]), math.log10(ends[1]), count, dtype=torch.float64)


def r_squared(x: Tensor, y: Tensor) -> float:
    """Coefficient of determination R^2 of the least-squares line of y on x, each of shape (n,)."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].square().item()

"""What single batches say of the noise, and how far they agree."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.noise.asked import Squares, grams_of
from noetherflow.noise.moments import Spread
from noetherflow.symmetry import Grams
from noetherflow.symmetry.axes import AxisSymmetry

BatchGrams = tuple[int, dict[str, Grams]]


def all_grams(
    symmetries: Mapping[str, AxisSymmetry], squares: Mapping[str, Squares], like: Params, count: int
) -> dict[str, Grams]:
    """What every symmetry wants of some squares, over a number of examples."""
    found = {name: grams_of(symmetry, squares, like) for name, symmetry in symmetries.items()}
    return {name: Grams(*(side / count for side in sides)) for name, sides in found.items()}


def spreads(batches: Sequence[BatchGrams]) -> dict[str, Spread]:
    """For each symmetry, what the differences between batches say of the spread of single examples.

    Args:
        batches: Number of examples, and unbiased estimates of the noise per example from these alone.

    Returns:
        Sums as if by example; NaN squares from a single batch.
    """
    if not batches:
        return {}
    count = sum(size for size, _ in batches)
    found = {}
    for name in batches[0][1]:
        values = []
        for _, grams in batches:
            sides = [one.diagonal() if one.ndim == 2 else one for one in grams[name]]
            values.append(torch.stack([*sides, sides[0] - sides[1]]))
        stack = torch.stack(values)
        weights = stack.new_tensor([size for size, _ in batches]).reshape(-1, *(1,) * (stack.ndim - 1))
        total: Tensor = (weights * stack).sum(0)
        if len(values) > 1:
            variance = (weights * (stack - total / count).square()).sum(0) / (len(values) - 1)
        else:
            variance = torch.full_like(total, torch.nan)
        found[name] = Spread(total, variance * (count - 1) + total.square() / count)
    return found

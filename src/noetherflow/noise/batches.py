"""What single batches say of the noise, and how far they agree."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from noetherflow._errors import EmptyDataError, SettingsError
from noetherflow._types import Params
from noetherflow.noise.asked import Squares, grams_of, names_with_variances
from noetherflow.noise.moments import NoiseMoments, Spread
from noetherflow.symmetry import Grams, Symmetry
from noetherflow.symmetry.axes import AxisSymmetry

BatchGrams = tuple[int, dict[str, Grams]]


def along_axes(symmetries: Mapping[str, Symmetry]) -> dict[str, AxisSymmetry]:
    """The same symmetries, after a check that none joins single entries of several tensors.

    Returns:
        The symmetries.

    Raises:
        SettingsError: If one does.
    """
    found = {}
    for name, symmetry in symmetries.items():
        if not isinstance(symmetry, AxisSymmetry):
            raise SettingsError(
                f"symmetry {name!r} is a {type(symmetry).__name__}, which joins single entries of several tensors: "
                "its noise cannot be measured in passing. Use estimate_noise"
            )
        found[name] = symmetry
    return found


def all_grams(
    symmetries: Mapping[str, AxisSymmetry], squares: Mapping[str, Squares], like: Params, count: float
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


def pooled(
    symmetries: Mapping[str, AxisSymmetry],
    scatter: Mapping[str, Squares],
    mean: Mapping[str, Tensor],
    batches: Sequence[BatchGrams],
) -> NoiseMoments:
    """Moments from the squares of all gradients about their mean, and from what single batches say."""
    entries = {name: scatter[name].entries for name in names_with_variances(symmetries)}
    return NoiseMoments(
        count=sum(size for size, _ in batches),
        mean=dict(mean),
        scatter=all_grams(symmetries, scatter, mean, 1),
        square_scatter={name: one for name, one in entries.items() if one is not None},
        total_scatter=torch.stack([one.total for one in scatter.values()]).sum(),
        spreads=spreads(batches),
        symmetries=dict(symmetries),
    )


@final
class Pool:
    """Estimates from single steps, each centred by itself, put together.

    Args:
        symmetries: What is measured.
        params: The parameters.
    """

    def __init__(self, symmetries: Mapping[str, AxisSymmetry], params: Params) -> None:
        self._symmetries, self._params = symmetries, params
        self._scatter: dict[str, Squares] = {}
        self._batches: list[BatchGrams] = []
        self._freedom = 0

    def add(self, scatter: Mapping[str, Squares], size: int, freedom: int, weight: float = 1.0) -> bool:
        """Add a step.

        Args:
            scatter: Sums of squares about the mean of the step.
            size: How many examples the step saw.
            freedom: How many times the noise of one example the scatter is on average.
            weight: What the gradient of an example was multiplied by.

        Returns:
            False if it holds NaN or infinity, and was left out.
        """
        if not torch.isfinite(torch.stack([one.total for one in scatter.values()]).sum()):
            return False
        for name, squares in scatter.items():
            before = self._scatter.get(name)
            self._scatter[name] = (
                squares.scaled(weight**-2) if before is None else before.combine(squares, weight**-2, reuse=True)
            )
        self._batches.append((size, all_grams(self._symmetries, scatter, self._params, freedom * weight**2)))
        self._freedom += freedom
        return True

    def moments(self) -> NoiseMoments:
        """The noise of one example, unbiased; with NaN for the mean gradient, which is not kept.

        Returns:
            The moments.

        Raises:
            EmptyDataError: If nothing was added.
        """
        if not self._batches:
            raise EmptyDataError(
                "nothing was measured yet: every step needs two examples, or two microbatches, or more"
            )
        count = sum(size for size, _ in self._batches)
        scatter = {name: one.scaled(count / self._freedom) for name, one in self._scatter.items()}
        nothing = torch.full((), torch.nan, dtype=torch.float64)
        mean = {name: nothing.to(one.device).expand(one.shape) for name, one in self._params.items()}
        return pooled(self._symmetries, scatter, mean, self._batches)

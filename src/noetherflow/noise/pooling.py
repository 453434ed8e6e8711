"""What single batches say of the noise, and how far they agree."""

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.func import vmap

from noetherflow._errors import EmptyDataError
from noetherflow._types import Params
from noetherflow.noise.buffers import Buffers, ModelLayout
from noetherflow.noise.moments import NoiseMoments, Spread
from noetherflow.noise.statistics import Squares, grams_of, names_with_variances
from noetherflow.symmetry import AxisSymmetry, Grams

# Batches whose squares are looked at together, if these are not more than so many numbers.
_TOGETHER = 64
_HELD = 2**21


def all_grams(
    symmetries: Mapping[str, AxisSymmetry], squares: Mapping[str, Squares], like: Params, count: float = 1.0
) -> dict[str, Grams]:
    """The Grams of every symmetry from squares, divided by a number of examples."""
    grams = {name: grams_of(symmetry, squares, like) for name, symmetry in symmetries.items()}
    return {name: Grams(*(side / count for side in sides)) for name, sides in grams.items()}


@final
class BatchNoise:
    """How far batches agree on the noise, each centred by itself; as few numbers however many there are.

    Args:
        symmetries: What is measured.
        params: The parameters.
    """

    def __init__(self, symmetries: Mapping[str, AxisSymmetry], params: Params) -> None:
        self._symmetries, self._params = symmetries, params
        self._sizes: list[int] = []
        self._recent: Tensor | None = None
        self._diagonals: tuple[ModelLayout, Tensor | slice] | None = None
        self._number = self._seen = self.count = 0
        self._mean: dict[str, Tensor] = {}
        self._scatter: dict[str, Tensor] = {}

    def add(self, size: int, scatter: Buffers, freedom: float) -> None:
        """Take a batch.

        Args:
            size: Number of its examples.
            scatter: Sums of squares about its mean.
            freedom: Degrees of freedom: E[scatter] = freedom * Sigma.
        """
        self._number += 1
        self.count += size
        if self._diagonals is None:
            self._diagonals = scatter.model_layout.diagonals()
        model_layout, indices = self._diagonals
        numbers = scatter.numbers[indices]
        if scatter.entries:
            # Too large to keep.
            values = self._values(Buffers(model_layout, numbers, scatter.entries))
            self._take([size], {name: stack[None] / freedom for name, stack in values.items()})
            return
        if self._recent is None:
            # Once: what is kept of every step would take a little of the memory that large tensors come back to.
            self._recent = numbers.new_empty(max(1, min(_TOGETHER, _HELD // len(numbers))), len(numbers))
        torch.div(numbers, freedom, out=self._recent[len(self._sizes)])
        self._sizes.append(size)
        if len(self._sizes) == len(self._recent):
            self._flush()

    def spreads(self) -> dict[str, Spread]:
        """For each symmetry, what the differences between batches say of the spread of single examples.

        Returns:
            Sums as if by example; NaN squares from a single batch.
        """
        self._flush()
        spreads = {}
        for name, mean in self._mean.items():
            total = mean * self.count
            single = self._number == 1
            variance = torch.full_like(total, torch.nan) if single else self._scatter[name] / (self._number - 1)
            spreads[name] = Spread(total, variance * (self.count - 1) + total.square() / self.count)
        return spreads

    def _flush(self) -> None:
        if not self._sizes or self._recent is None or self._diagonals is None:
            return
        sizes, self._sizes = self._sizes, []
        model_layout, _ = self._diagonals
        numbers = self._recent[: len(sizes)]
        self._take(sizes, vmap(lambda batch: self._values(Buffers(model_layout, batch, {})))(numbers))

    def _values(self, diagonals: Buffers) -> dict[str, Tensor]:
        """Both sides of every charge and their difference, shape (3, ...): of matrices, the diagonals."""
        grams = all_grams(self._symmetries, diagonals.squares(), self._params)
        return {name: torch.stack([plus, minus, plus - minus]) for name, (plus, minus) in grams.items()}

    def _take(self, sizes: list[int], values: Mapping[str, Tensor]) -> None:
        """Merge what some batches say, shape (batches, 3, ...), with what others said: Chan, Golub, LeVeque (1979)."""
        more = sum(sizes)
        before = self._seen
        self._seen += more
        for name, stack in values.items():
            weights = stack.new_tensor(sizes).reshape(-1, *(1,) * (stack.ndim - 1))
            mean = (weights * stack).sum(0) / more
            scatter = (weights * (stack - mean).square()).sum(0)
            if before:
                gap = mean - self._mean[name]
                mean = self._mean[name] + gap * (more / self._seen)
                scatter = self._scatter[name] + scatter + gap.square() * (before * more / self._seen)
            self._mean[name], self._scatter[name] = mean, scatter


def pooled(
    symmetries: Mapping[str, AxisSymmetry], scatter: Buffers, mean: Mapping[str, Tensor], batches: BatchNoise
) -> NoiseMoments:
    """Moments, on the CPU, from the squares of all gradients about their mean, and from what single batches say."""
    names = names_with_variances(symmetries)
    moments = NoiseMoments(
        count=batches.count,
        mean=dict(mean),
        scatter=all_grams(symmetries, scatter.squares(), mean),
        square_scatter={name: scatter.entries[name] for name in names if name in scatter.entries},
        total_scatter=scatter.trace,
        spreads=batches.spreads(),
        symmetries=dict(symmetries),
    )
    return moments.cpu()


@final
class Pool:
    """Estimates from single steps, each centred by itself, put together.

    Args:
        symmetries: What is measured.
        params: The parameters.
    """

    def __init__(self, symmetries: Mapping[str, AxisSymmetry], params: Params) -> None:
        self._symmetries, self._params = symmetries, params
        self._scatter: Buffers | None = None
        self._batches = BatchNoise(symmetries, params)
        self._freedom = 0
        self._variances = names_with_variances(symmetries)

    @property
    def count(self) -> int:
        """Number of examples seen."""
        return self._batches.count

    def add(self, scatter: Buffers, size: int, freedom: int, weight: float = 1.0) -> bool:
        """Add a step.

        Args:
            scatter: Sums of squares about the mean of the step.
            size: How many examples the step saw.
            freedom: Degrees of freedom: E[scatter] = freedom * Sigma.
            weight: What the gradient of an example was multiplied by.

        Returns:
            False if it holds NaN or infinity, and was left out.
        """
        if not math.isfinite(float(scatter.numbers.sum())):
            return False
        scatter = scatter.with_entries_of(self._variances)
        if self._scatter is None:
            self._scatter = scatter.scaled(weight**-2)
        else:
            self._scatter.combine(scatter, weight**-2)
        self._batches.add(size, scatter, freedom * weight**2)
        self._freedom += freedom
        return True

    def moments(self) -> NoiseMoments:
        """The noise of one example, unbiased; with NaN for the mean gradient, which is not kept.

        Returns:
            The moments.

        Raises:
            EmptyDataError: If nothing was added.
        """
        if self._scatter is None:
            raise EmptyDataError(
                "nothing was measured yet: every step needs two examples, or two microbatches, or more"
            )
        scatter = self._scatter.scaled(self._batches.count / self._freedom)
        unknown = torch.full((), torch.nan, dtype=torch.float64)
        mean = {name: unknown.expand(parameter.shape) for name, parameter in self._params.items()}
        return pooled(self._symmetries, scatter, mean, self._batches)

"""The gradients of the microbatches of a step, taken in as they come."""

from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow.noise.between_ranks import Ranks
from noetherflow.noise.buffers import OF_SUM, Buffers
from noetherflow.noise.kernels import accumulator, square
from noetherflow.noise.sharded import Arrivals


@final
class Running:
    """Takes in the gradients of the microbatches of one step.

    Args:
        model: The model.
        params: Tensors like its trained parameters, by name.
        buffers: Where squares are added up: those about the mean in row EACH.
        with_mean: Keep the mean gradient until its squares are taken.

    Attributes:
        count: Number of microbatches.
        examples: Number of their examples.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor], buffers: Buffers, *, with_mean: bool) -> None:
        self.count = self.examples = 0
        self._with_mean = with_mean
        # Row OF_SUM holds the squares of the gap between the next microbatch and the mean so far.
        self.buffers = buffers
        self._model, self._params = model, params
        self._arrived: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._arrivals: Arrivals | None = None

    def __enter__(self) -> "Running":
        self._arrivals = Arrivals(self._model, self._params, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._arrivals is not None:
            self._arrivals.remove()
        # Whoever keeps the function that the block gave keeps this object.
        self._arrivals = None
        for kept in (self._arrived, self._mean, self.buffers.entries, self.buffers.weights):
            kept.clear()

    def add(self, *, size: int, weight: float = 1.0) -> None:
        """Take what has arrived since the last call."""
        if size < 1 or not weight > 0:
            raise SettingsError(f"a microbatch has examples and a weight, got size={size} and weight={weight}")
        if not self._arrived:
            raise SettingsError(
                "no gradient has come since the last microbatch: run the backward pass of each inside "
                "`with meter.step() as done`, and call `done` after it"
            )
        share = size / (self.examples + size)
        for name in self._params:
            gap = self._take(self._arrived, name).div_(weight)
            if not self.count:
                self._mean[name] = gap
                continue
            gap -= self._mean[name]
            self._mean[name].add_(gap, alpha=share)
            self._square(name, gap)
        self._merge_rows(share * self.examples)
        self.count += 1
        self.examples += size

    def require_seen(self) -> None:
        """Raise if the gradient of a sharded parameter was not seen."""
        missed = [] if self._arrivals is None else self._arrivals.missed
        if missed:
            raise SettingsError(
                f"the gradients of these sharded parameters were not seen before ranks were averaged: {missed[:3]}"
                f"{' and more' if len(missed) > 3 else ''}. Call the modules that fully_shard was called with inside "
                "`with meter.step()`, by their forward(); a DTensor that computes as it is (tensor parallelism) is not "
                "measured"
            )

    def merge(self, ranks: Ranks) -> None:
        """Put together what all ranks have: afterwards each has the same."""
        mine = self.examples
        self.count, self.examples = ranks.meet(self.count, mine)
        share = mine / max(1, self.examples)
        for name, gap, mean in ranks.sums(self._params, partial(self._take, self._mean), share):
            self._square(name, gap.sub_(mean))
            if self._with_mean:
                self._mean[name] = mean
        self._merge_rows(mine)
        ranks.sum_each(self.buffers, self._params)

    def square_mean(self) -> None:
        """Put the squares of the mean gradient into row OF_SUM, after the last microbatch."""
        if self._with_mean:
            for name in self._params:
                self._square(name, self._take(self._mean, name))

    def _note(self, name: str, gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if gradient is not None:
            # A copy, or what becomes .grad would be what is kept here.
            kept = gradient.detach().to_dense().to(accumulator(gradient), copy=True)
            before = self._arrived.get(name)
            self._arrived[name] = kept if before is None else kept.add_(before)

    def _take(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        """What is there of a parameter, or zeros if no gradient reached it."""
        taken, parameter = tensors.pop(name, None), self._params[name]
        if taken is None:
            return torch.zeros_like(parameter, dtype=accumulator(parameter), requires_grad=False)
        return taken

    def _square(self, name: str, gap: Tensor) -> None:
        # Statistics of all parameters share a buffer, on the device of the first parameter.
        square(gap.to(self.buffers.numbers.device), self.buffers.buffer(name, torch.float64), OF_SUM)

    def _merge_rows(self, weight: float) -> None:
        """Add a multiple of row OF_SUM to row EACH, and set row OF_SUM to zero."""
        self.buffers.merge_rows(weight)
        for statistics in (self.buffers.numbers, *self.buffers.entries.values()):
            statistics[OF_SUM] = 0.0

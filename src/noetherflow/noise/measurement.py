"""The noise of a model at any parameters, over the same examples every time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import nn

from noetherflow._batch import cast, select
from noetherflow._errors import EmptyDataError, NonFiniteError, SettingsError
from noetherflow._params import copy_of, require_finite
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow.noise.estimate import Estimate
from noetherflow.noise.exact import Subject, resolve
from noetherflow.noise.microbatch import MicrobatchMeter
from noetherflow.noise.moments import NoiseMoments
from noetherflow.symmetry import Symmetry

# Groups of examples that are compared for standard errors: with so many, t and normal quantiles differ by 5 %.
_GROUPS = 32


@final
class Measurement:
    """How the noise is measured: from the gradients of single examples, or from differences between microbatches.

    Args:
        model: The model; it is copied, and not changed.
        loss: One loss per example, shape (B,).
        batches: The data, the same at every point.
        symmetries: By name.
        dtype: The floating-point type of the gradients.
        microbatches: Every batch is a microbatch, and its examples may be coupled.
        max_bytes: Memory that stacked gradients may take.

    Raises:
        SettingsError: If there are fewer than two microbatches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch],
        symmetries: Mapping[str, Symmetry],
        *,
        dtype: torch.dtype,
        microbatches: bool,
        max_bytes: int,
    ) -> None:
        self._model, self._loss, self._batches = model, loss, list(batches)
        self._dtype, self._microbatches, self._max_bytes = dtype, microbatches, max_bytes
        self.symmetries = resolve(model, symmetries)
        if not microbatches:
            self._estimate = Estimate(
                Subject.of(model, loss, self.symmetries, dtype), exact=None, variances=True, max_bytes=max_bytes
            )
            return
        # A meter measures while the module runs, and a module in train mode writes into its buffers.
        self._model = copy_of(model, dtype)
        if len(self._batches) < 2:
            raise SettingsError(
                "the noise between microbatches needs two or more batches from the loader, got "
                f"{len(self._batches)}: give batches as large as those of a training step"
            )

    def on(self, batches: Sequence[Batch]) -> "Measurement":
        """The same measurement over other data."""
        return Measurement(
            self._model,
            self._loss,
            batches,
            self.symmetries,
            dtype=self._dtype,
            microbatches=self._microbatches,
            max_bytes=self._max_bytes,
        )

    def at(self, params: Params, *, progress: bool = False) -> NoiseMoments:
        """The moments over all batches, at the given parameters.

        Args:
            params: The parameters, of any floating-point type.
            progress: Show a progress bar on a terminal.

        Returns:
            The moments.

        Raises:
            EmptyDataError: If there is no batch.
        """
        shown = track(self._batches, "gradient noise", total=len(self._batches), shown=progress)
        if self._microbatches:
            return self._between(params, shown)
        estimate = self._at(params)
        with own_randomness(estimate.device):
            for index, batch in enumerate(shown):
                estimate.add(batch, f"batch {index}")
        moments = estimate.take()
        # The checks of the first point hold at all points of its orbit. The parameters of this point are not kept.
        self._estimate = estimate.at(self._estimate.trained)
        if moments is None:
            raise EmptyDataError("there is no batch to measure")
        return moments

    def by_group(self, params: Params, *, progress: bool = False) -> Iterator[NoiseMoments]:
        """Yield the moments of disjoint groups of examples, each centred by itself; none of too few examples."""
        groups = self._groups()
        shown = track(groups, "standard errors", total=len(groups), shown=progress)
        if self._microbatches:
            for group in shown:
                yield self._between(params, group)
            return
        estimate = self._at(params)
        with own_randomness(estimate.device):
            for number, group in enumerate(shown):
                for batch in group:
                    estimate.add(batch, f"group {number}")
                # Moments have the size of the model, and are not kept while the next group is measured.
                if (moments := estimate.take()) is not None and moments.count > 1:
                    yield moments
                del moments

    def _at(self, params: Params) -> Estimate:
        """An empty estimate at given parameters."""
        trained = self._estimate.trained
        return self._estimate.at({name: params[name].to(tensor) for name, tensor in trained.items()})

    def _groups(self) -> list[list[Batch]]:
        """Every k-th batch or, of few batches, every k-th example, so that the order of the data does not matter."""
        batches = self._batches
        if self._microbatches:
            count = min(_GROUPS, len(batches) // 2)
            return [batches[start::count] for start in range(count)] if count > 1 else []
        if len(batches) >= _GROUPS:
            return [batches[start::_GROUPS] for start in range(_GROUPS)]
        parts = -(-_GROUPS // len(batches))
        groups = []
        for batch in batches:
            size = self._estimate.size_of(batch)
            # A group of a single example is its own mean.
            count = max(1, min(parts, size // 2))
            groups += [[select(batch, torch.arange(start, size, count), size)] for start in range(count)]
        return groups if len(groups) > 1 else []

    def _between(self, params: Params, batches: Iterable[Batch]) -> NoiseMoments:
        """The moments from the differences between batches; dropout draws the same numbers at every point."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(params[name])
        meter = MicrobatchMeter(self._model, self.symmetries, variances=True)
        device = next(self._model.parameters()).device
        with own_randomness(device, seed=0), torch.enable_grad(), meter.step() as done:
            for number, batch in enumerate(batches):
                losses = self._loss(self._model, cast(batch, self._dtype, device))
                size = require_losses(losses, f"batch {number}")
                losses.mean().backward()
                # The meter leaves out a step that overflows, as a training loop does.
                gradients = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
                require_finite(gradients, f"batch {number}: gradient of")
                done(size=size)
        self._model.zero_grad(set_to_none=True)
        if meter.skipped:
            raise NonFiniteError("the squares of the gradients overflow between batches; compute with a smaller loss")
        return meter.noise

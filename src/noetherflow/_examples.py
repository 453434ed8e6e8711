"""The gradients with which a proof compares directions: those of single examples, or that of the complete batch."""

import warnings
from collections.abc import Callable
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from noetherflow._batch import select
from noetherflow._errors import CoupledExamplesError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import BETWEEN_BATCHES, own_randomness, require_uncoupled
from noetherflow._types import Batch

_T = TypeVar("_T")
_ALONE = (
    "the loss of example {index}, or its gradient, is NaN or infinite if the example is a batch of its own, and finite "
    "within its batch: the loss couples examples, as by a division by the mean of a mask of the batch, which may be 0 "
    "for an example alone. The symmetries are proved with the gradient of the complete batch. The noise of single "
    f"examples does not exist: keep the denominator from zero (clamp) or constant, or {BETWEEN_BATCHES}"
)


class _NotFiniteError(Exception):
    """A loss or a gradient is NaN or infinite."""


@final
class Examples:
    """The examples of a batch, each as a batch of size 1; or the complete batch if examples cannot be taken out of it.

    A layer that normalises over the batch couples examples. A graph network may hold the nodes of all graphs in one
    tensor, and an `nn.EmbeddingBag` the ids of all bags, whose `offsets` are positions in the batch: rows of such
    tensors are no examples. A loss that is divided by a mean over the batch may be 0 / 0 for an example alone.

    Args:
        model: The model.
        function: The model as a function.
        batch: The batch, in the type of the function.
        size: The number of examples B.

    Attributes:
        batches: B batches, or one.
    """

    def __init__(self, model: nn.Module, function: ModelFunction, batch: Batch, size: int) -> None:
        self._device = next(iter(function.params.values())).device
        self._complete = [batch]
        self.batches = [select(batch, index.reshape(1), size) for index in torch.arange(size, device=self._device)]
        try:
            require_uncoupled(model)
            with own_randomness(self._device, seed=0):
                function.losses(function.params, self.batches[0])
        except (CoupledExamplesError, RuntimeError, IndexError, ValueError):
            self.batches = self._complete

    def each(
        self, function: ModelFunction, params: dict[str, Tensor], use: Callable[[Tensor, dict[str, Tensor]], _T]
    ) -> list[_T]:
        """What `use` makes of the losses and the gradient of each example, one example at a time.

        A large model leaves no memory for B gradients. Where the loss or the gradient of an example cannot be computed,
        or is not finite, the complete batch takes the place of the examples, here and in all later calls.

        Args:
            function: The model at the parameters of the proof.
            params: The parameters to differentiate by.
            use: A function of losses, shape (b,), and of the gradient of their sum by name.

        Returns:
            B results, or one.
        """
        alone = ""
        if self.batches is not self._complete:
            try:
                return [self._used(function, params, use, index) for index in range(len(self.batches))]
            except _NotFiniteError as error:
                alone = str(error)
            except (RuntimeError, IndexError, ValueError):
                # A mistake that has other causes is raised again by the complete batch.
                pass
            self.batches = self._complete
        try:
            result = self._used(function, params, use, 0)
        except _NotFiniteError:
            # Not within the batch either, so that no example is to blame.
            return [self._used(function, params, use, 0, finite=False)]
        if alone:
            warnings.warn(alone, stacklevel=5)
        return [result]

    def _used(
        self,
        function: ModelFunction,
        params: dict[str, Tensor],
        use: Callable[[Tensor, dict[str, Tensor]], _T],
        index: int,
        *,
        finite: bool = True,
    ) -> _T:
        """The result for an entry of `batches`; raises unless losses and gradient are finite, if they have to be."""
        with own_randomness(self._device, seed=0):
            losses, gradient = function.gradient(params, self.batches[index])
        if finite and not all(bool(torch.isfinite(tensor).all()) for tensor in (losses, *gradient.values())):
            raise _NotFiniteError(_ALONE.format(index=index))
        return use(losses, gradient)

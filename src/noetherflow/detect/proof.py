"""The numerical proof of many symmetries at once."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._batch import cast, select
from noetherflow._dtype import announced_dtype
from noetherflow._errors import CoupledExamplesError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_losses, require_uncoupled
from noetherflow._residual import cosine, relative_change
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual, random_coordinates
from noetherflow.symmetry import Symmetry

# Together they are as good a test as one by one, as long as the rounding of so many transformations stays small.
_TOGETHER = 64


def prove(
    symmetries: Sequence[Symmetry],
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    dtype: torch.dtype | None,
    draws: int = 2,
) -> list[Residual]:
    """The residual of each symmetry: as `verify_symmetry`, in the time of a few evaluations for all of them.

    Random finite elements of many symmetries are applied one after the other, and the loss is compared once; only where
    it has changed, halves of them are tried on their own. The gradients of the examples are taken once, and compared
    with the direction of every symmetry.

    Returns:
        Residuals, in the same order.
    """
    return _Proof(model, loss, batch, dtype, draws).of(list(symmetries))


@final
class _Proof:
    """What all symmetries of one model have in common."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype | None, draws: int) -> None:
        dtype = announced_dtype(model, loss, batch, dtype)
        self._function = ModelFunction(model, loss, dtype)
        self._params = self._function.params
        self._device = next(iter(self._params.values())).device
        self._batch = cast(batch, dtype, self._device)
        self._draws = draws
        self._generator = torch.Generator().manual_seed(0)
        self._before = self._evaluate(self._params)
        self._size = require_losses(self._before, "find_symmetries")
        try:
            require_uncoupled(model)
            self._coupled = False
        except CoupledExamplesError:
            self._coupled = True
        with own_randomness(self._device, seed=0):
            self._function.observe(self._batch if self._coupled else self._example(0))

    def of(self, symmetries: list[Symmetry]) -> list[Residual]:
        cosines = self._cosines(symmetries)
        changes: list[float] = []
        for first in range(0, len(symmetries), _TOGETHER):
            changes += self._changes(symmetries[first : first + _TOGETHER])
        return [
            Residual(change, float(each.max()), int(each.argmax()), self._function.precision)
            for change, each in zip(changes, cosines, strict=True)
        ]

    def _changes(self, symmetries: list[Symmetry]) -> list[float]:
        """The change of loss by each, as far as it has to be told apart."""
        worst = 0.0
        drawn: list[Tensor] = []
        for draw in range(self._draws):
            if draw % 2 == 0:
                drawn = [next(random_coordinates(one, self._params, 1, self._generator)) for one in symmetries]
            moved = self._params
            for one, x in zip(symmetries, drawn, strict=True):
                own = {name: moved[name] for name in one.names}
                # Every element and then its inverse: a loss may jump when a weight grows, and not when it shrinks.
                moved = moved | one.act(x if draw % 2 == 0 else -x, own)
            after = self._evaluate(moved)
            worst = max(worst, float(relative_change(self._before, after).max()))
        if worst <= self._function.tolerance.proof or len(symmetries) == 1:
            return [worst] * len(symmetries)
        half = len(symmetries) // 2
        return self._changes(symmetries[:half]) + self._changes(symmetries[half:])

    def _cosines(self, symmetries: list[Symmetry]) -> list[Tensor]:
        """|g . Q theta| / (|g| |Q theta|) of each symmetry and every example."""
        directions = []
        for one in symmetries:
            own = {name: self._params[name] for name in one.names}
            (x,) = random_coordinates(one, own, 1, self._generator)
            directions.append(one.generate(x, own))
        moved = {name: self._params[name] for one in symmetries for name in one.names}
        found = []
        for index in range(1 if self._coupled else self._size):
            with own_randomness(self._device, seed=0):
                gradients = self._function.gradient(moved, self._batch if self._coupled else self._example(index))[1]
            found.append(torch.stack([cosine(gradients, direction) for direction in directions]))
        return list(torch.stack(found, 1))

    def _example(self, index: int) -> Batch:
        return select(self._batch, torch.tensor([index], device=self._device), self._size)

    def _evaluate(self, params: dict[str, Tensor]) -> Tensor:
        # The same seed every time, so that dropout drops the same units before and after.
        with own_randomness(self._device, seed=0):
            return self._function.losses(params, self._batch)

"""The numerical proof of many symmetries at once."""

import warnings
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._batch import cast
from noetherflow._dtype import announced_dtype
from noetherflow._examples import Examples
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._perturbed import GIVEN_ONLY, generic_points
from noetherflow._residual import active_rows, cosine, is_rounding, relative_change
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual, random_coordinates, worst_of
from noetherflow.symmetry import Symmetry

# A group of this many transformations is as good a test as the transformations one by one: their rounding stays small.
_GROUP = 64


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
    it has changed, halves of the symmetries are tried. The gradients of the examples are computed once, and compared
    with the direction of every symmetry. All this is done at the parameters of the model and at perturbed parameters
    and buffers, because a proof at a special point, such as a factor that is zero at the start, proves nothing.

    Args:
        symmetries: Symmetries with canonical names.
        model: The model.
        loss: `loss(model, batch)`, shape (B,).
        batch: The examples.
        dtype: The type of the computation; None chooses it.
        draws: The number of finite transformations at each point. Every second is the inverse of the one before.

    Returns:
        Residuals, in the order of the symmetries.
    """
    symmetries = list(symmetries)
    dtype = announced_dtype(model, loss, batch, dtype)
    function = ModelFunction(model, loss, dtype)
    device = next(iter(function.params.values())).device
    batch = cast(batch, dtype, device)
    with own_randomness(device, seed=0):
        size = require_losses(function.losses(function.params, batch), "find_symmetries")
    examples = Examples(model, function, batch, size)
    with own_randomness(device, seed=0):
        function.observe(examples.batches[0])
    given = _Point(function, batch, examples, draws=draws)
    residuals = [[residual] for residual in given.residuals(symmetries)[0]]
    del given
    tested = [torch.zeros((), dtype=torch.bool)] * len(symmetries)
    note = GIVEN_ONLY
    for generic in generic_points(function, batch):
        note = generic.note
        missing = [index for index, rows in enumerate(tested) if not rows.all()]
        point = _Point(generic.function, batch, examples, draws=draws, perturbation=generic.size)
        for index, residual, rows in zip(missing, *point.residuals([symmetries[i] for i in missing]), strict=True):
            residuals[index].append(residual)
            tested[index] = tested[index] | rows
        if all(rows.all() for rows in tested):
            break
    worst = [worst_of(each, int((~rows).sum())) for each, rows in zip(residuals, tested, strict=True)]
    if note and any(residual <= function.tolerance.proof for residual in worst):
        warnings.warn(note, stacklevel=3)
    return worst


@final
class _Point:
    """Parameters and buffers at which symmetries are tested.

    Args:
        function: The model at these parameters and buffers.
        batch: The batch, in the type of the function.
        examples: The examples whose gradients are compared with directions.
        draws: The number of finite transformations.
        perturbation: The size of the perturbation that leads to this point; 0 for the given parameters.
    """

    def __init__(
        self,
        function: ModelFunction,
        batch: Batch,
        examples: Examples,
        *,
        draws: int,
        perturbation: float = 0.0,
    ) -> None:
        self._function = function
        self._params = function.params
        self._device = next(iter(self._params.values())).device
        self._batch = batch
        self._examples = examples
        self._draws = draws
        self._perturbation = perturbation
        self._generator = torch.Generator().manual_seed(0)
        self._before = self._evaluate(self._params)

    def residuals(self, symmetries: list[Symmetry]) -> tuple[list[Residual], list[Tensor]]:
        """The residual of each symmetry at this point, and the rows of each symmetry that are tested."""
        cosines, tested = self._cosines(symmetries)
        changes: list[float] = []
        for first in range(0, len(symmetries), _GROUP):
            changes += self._changes(symmetries[first : first + _GROUP])
        kind = self._function.precision, "perturbed" if self._perturbation else "given", self._perturbation
        residuals = [
            Residual(change, float(each.max()), int(each.argmax()), *kind)
            for change, each in zip(changes, cosines, strict=True)
        ]
        return residuals, tested

    def _changes(self, symmetries: list[Symmetry]) -> list[float]:
        """The change of loss by each symmetry; symmetries are tested in groups, and groups that fail in halves."""
        worst = 0.0
        drawn: list[Tensor] = []
        for draw in range(self._draws):
            if draw % 2 == 0:
                drawn = [next(random_coordinates(each, self._params, 1, self._generator)) for each in symmetries]
            moved = self._params
            for each, x in zip(symmetries, drawn, strict=True):
                acted_on = {name: moved[name] for name in each.names}
                # Every element and then its inverse: a loss may jump when a weight grows, and not when it shrinks.
                moved = moved | each.act(x if draw % 2 == 0 else -x, acted_on)
            after = self._evaluate(moved)
            worst = max(worst, float(relative_change(self._before, after).max()))
        if worst <= self._function.tolerance.proof or len(symmetries) == 1:
            return [worst] * len(symmetries)
        half = len(symmetries) // 2
        return self._changes(symmetries[:half]) + self._changes(symmetries[half:])

    def _cosines(self, symmetries: list[Symmetry]) -> tuple[list[Tensor], list[Tensor]]:
        """|g . Q theta| / (|g| |Q theta|) of each symmetry and every example, and the rows that are tested."""
        directions = []
        for symmetry in symmetries:
            acted_on = {name: self._params[name] for name in symmetry.names}
            (x,) = random_coordinates(symmetry, acted_on, 1, self._generator)
            directions.append(symmetry.generate(x, acted_on))
        moved = {name: self._params[name] for symmetry in symmetries for name in symmetry.names}
        tested = [torch.zeros((), dtype=torch.bool)] * len(symmetries)

        def column(losses: Tensor, gradients: dict[str, Tensor]) -> Tensor:
            slopes = []
            for index, (symmetry, direction) in enumerate(zip(symmetries, directions, strict=True)):
                rounding = is_rounding(losses, gradients, direction, self._function.precision)
                slope = cosine(gradients, direction).cpu()
                slopes.append(torch.zeros_like(slope) if rounding else slope)
                if not tested[index].all():
                    rows = active_rows(symmetry, gradients, self._params).cpu()
                    tested[index] = tested[index] | (torch.zeros_like(rows) if rounding else rows)
            return torch.stack(slopes)

        columns = self._examples.each(self._function, moved, column)
        return list(torch.stack(columns, 1)), tested

    def _evaluate(self, params: dict[str, Tensor]) -> Tensor:
        # One seed for all evaluations, so that dropout drops equal units before and after.
        with own_randomness(self._device, seed=0):
            return self._function.losses(params, self._batch)

"""The oracle: the gradient of every example, formed and kept for a moment."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._batch import tensors_of
from noetherflow._device import require_float64
from noetherflow._errors import (
    CoupledExamplesError,
    FrozenParameterError,
    LossError,
    NoetherflowError,
    NotASymmetryError,
    SettingsError,
)
from noetherflow._model_function import ModelFunction
from noetherflow._params import aliases, require_finite, require_names
from noetherflow._per_example import BETWEEN_BATCHES, require_independent
from noetherflow._residual import cosine
from noetherflow._types import Batch, Loss
from noetherflow.noise.moments import NoiseMoments
from noetherflow.symmetry import Symmetry

# Stacked gradients are held in the model's dtype, in float64 and in float64 about their mean.
_COPIES = 3


def resolve(model: nn.Module, symmetries: Mapping[str, Symmetry]) -> dict[str, Symmetry]:
    """Symmetries under canonical parameter names, after a check that they fit the model.

    Returns:
        Symmetries by name.

    Raises:
        TypeError: If there are no names.
        SettingsError: If a complex parameter is trained, or if a device has no float64.
        FrozenParameterError: If nothing is trained, or a symmetry would move what is not.
    """
    if not isinstance(symmetries, Mapping):
        raise TypeError(f"symmetries is a mapping from your names to symmetries, got {type(symmetries).__name__}")
    params = dict(model.named_parameters())
    frozen = {name for name, parameter in params.items() if not parameter.requires_grad}
    if len(frozen) == len(params):
        raise FrozenParameterError(
            "the model has no parameter that requires gradients: nothing is trained, so there is no noise"
        )
    if pairs := [name for name, parameter in params.items() if parameter.is_complex() and name not in frozen]:
        raise SettingsError(
            f"the gradient noise of complex parameters is not measured: {pairs}. Store them as real tensors with a "
            "last dimension of 2, and call torch.view_as_complex in forward"
        )
    canonical = aliases(model)
    require_float64(parameter.device for parameter in params.values())
    resolved = {name: symmetry.rename(canonical) for name, symmetry in symmetries.items()}
    for name, symmetry in resolved.items():
        require_names(params, symmetry.names, f"symmetry {name!r}")
        symmetry.check(params)
        if stuck := sorted(frozen.intersection(symmetry.names)):
            raise FrozenParameterError(
                f"symmetry {name!r} acts on {stuck}, which do not require gradients: SGD does not move them, and "
                "moving their partners alone would change the function. Leave this symmetry out, or unfreeze them"
            )
    return resolved


@final
@dataclass(frozen=True)
class Subject:
    """The model under study as a function of its trained parameters, with everything that was checked at the door.

    Args:
        function: Losses and gradients at any parameters.
        trained: The parameters to differentiate by, by canonical name.
        symmetries: With canonical names.
        dtype: The requested floating-point type, or None.
    """

    function: ModelFunction
    trained: dict[str, Tensor]
    symmetries: dict[str, Symmetry]
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, symmetries: Mapping[str, Symmetry], dtype: torch.dtype | None
    ) -> "Subject":
        """Check what was given, and take a copy of the parameters."""
        resolved = resolve(model, symmetries)
        function = ModelFunction(model, loss, dtype)
        return cls(function, function.trained, resolved, dtype)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.trained.values())).device

    @property
    def moved(self) -> set[str]:
        """The parameters on which a symmetry acts."""
        return {name for symmetry in self.symmetries.values() for name in symmetry.names}

    def losses_of(self, batch: Batch) -> Tensor:
        """The loss of every example, shape (B,)."""
        return self.function.losses(self.trained, batch)

    def direction(self) -> dict[str, Tensor]:
        """Some sum of directions in which the loss should not change, one of each symmetry."""
        total: dict[str, Tensor] = {}
        for symmetry in self.symmetries.values():
            for name, part in self._direction_of(symmetry).items():
                total[name] = total[name] + part if name in total else part
        return total

    def _direction_of(self, symmetry: Symmetry) -> dict[str, Tensor]:
        params = {name: self.trained[name] for name in symmetry.names}
        identity = symmetry.identity(params)
        # Fixed coordinates of all signs: any generator that is not a symmetry shows, in one product per example.
        x = torch.cos(1.0 + torch.arange(identity.numel(), dtype=identity.dtype, device=identity.device)).reshape(
            identity.shape
        )
        return symmetry.generate((x + x.mT) / 2 if x.ndim == 2 else x, params)

    def require_symmetric(self, gradients: dict[str, Tensor], first: int, where: str) -> None:
        """Raise if some example's gradient has a component along a direction in which the loss should not change."""
        for name, symmetry in self.symmetries.items():
            direction = self._direction_of(symmetry)
            residuals = cosine(gradients, direction, batched=True)
            worst = int(residuals.argmax())
            if not residuals[worst] <= self.function.tolerance.rounding:
                raise NotASymmetryError(
                    f"{name!r} is not a symmetry of this loss: in {where} its residual, the cosine between the "
                    f"gradient of example {first + worst} and the direction Q theta, is {residuals[worst].item():.2e} "
                    "and should be 0 up to rounding. Look for a forgotten bias or a wrong sign; verify_symmetry "
                    "tries a declaration on one batch"
                )


def exact_moments(
    subject: Subject,
    batch: Batch,
    together: Tensor,
    max_bytes: int,
    where: str,
    so_far: NoiseMoments | None,
    *,
    random: bool,
) -> NoiseMoments:
    """The moments of a batch merged with earlier moments.

    Args:
        subject: The model.
        batch: The batch.
        together: The losses of its examples within the batch, shape (B,).
        max_bytes: Memory that stacked gradients may take.
        where: Name of the batch in error messages.
        so_far: The moments of earlier batches, or None.
        random: Whether losses differ from call to call, as with dropout.

    Returns:
        The moments.

    Raises:
        CoupledExamplesError: If an example has another loss as a batch of size 1.
    """
    moments = so_far
    tolerance = math.inf if random else subject.function.tolerance.rounding

    def check(values: Tensor, first: int) -> None:
        require_independent(values, together, where, tolerance, first)

    for first, _, gradients in chunks(subject, batch, len(together), max_bytes, where, check):
        subject.require_symmetric(gradients, first, where)
        reference = None if moments is None else _running_mean(moments, gradients)
        chunk = NoiseMoments.of(gradients, subject.symmetries, reference=reference)
        moments = chunk if moments is None else moments.merge(chunk)
    assert moments is not None
    return moments


def chunks(
    subject: Subject,
    batch: Batch,
    size: int,
    max_bytes: int,
    where: str,
    check: Callable[[Tensor, int], None] | None = None,
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """First example, losses and gradients of as many examples at a time as fit into memory; losses are checked."""
    per_example = sum(8 * tensor.numel() for tensor in subject.trained.values())
    step = max(1, min(size, max_bytes // (_COPIES * per_example)))
    for start in range(0, size, step):
        examples = slice(start, min(start + step, size))
        with single_examples(batch, size, where):
            values, gradients = subject.function.example_gradients(subject.trained, batch, size, examples, where)
        if check is not None:
            check(values, start)  # before the gradients: a variance over a single example makes all of them NaN
        require_finite(gradients, f"{where}: the per-example gradient of")
        yield start, values, gradients


@contextmanager
def single_examples(batch: Batch, size: int, where: str) -> Iterator[None]:
    """A block that evaluates single examples; its errors say why an example cannot be taken out of the batch."""
    try:
        yield
    except NoetherflowError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            raise CoupledExamplesError(
                f"{where}: the loss of a single example cannot be computed ({error}): a function of the model, such as "
                "torch.nn.functional.batch_norm, normalises with the statistics of the batch, which couples its "
                f"examples. Use GroupNorm or LayerNorm, or {BETWEEN_BATCHES}"
            ) from error
        shapes = [tuple(tensor.shape) for tensor in tensors_of(batch)]
        if all(shape[:1] == (size,) for shape in shapes):
            raise
        raise LossError(
            f"{where}: the loss of a single example cannot be computed ({type(error).__name__}: {error}). The loss has "
            f"{size} examples, and the tensors of the batch have the shapes {shapes}. If an example cannot be cut out "
            "of the batch, as with the nodes of all graphs in a tensor, or with `offsets` of an nn.EmbeddingBag, which "
            "are positions in another tensor: give every example a row (ids of shape (B, T), filled up with "
            f"padding_idx), or {BETWEEN_BATCHES}"
        ) from error


def _running_mean(moments: NoiseMoments, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean gradient of everything seen so far and of a further stack."""
    extra = len(next(iter(gradients.values())))
    weight = extra / (moments.count + extra)
    return {
        name: mean + weight * (gradients[name].to(torch.float64).mean(0) - mean) for name, mean in moments.mean.items()
    }

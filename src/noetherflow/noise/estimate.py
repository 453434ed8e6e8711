"""One pass over the data: per-example gradients in, noise moments out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow._batch import cast
from noetherflow._errors import EmptyDataError, FrozenParameterError, NotASymmetryError
from noetherflow._params import aliases, bind, require_finite, require_names, snapshot
from noetherflow._per_example import (
    Losses,
    example_gradients,
    own_randomness,
    require_differentiable,
    require_independent,
    require_losses,
    require_uncoupled,
)
from noetherflow._progress import track
from noetherflow._types import Batch, Loss
from noetherflow.noise.moments import NoiseMoments, Witness
from noetherflow.symmetry import Symmetry

# Stacked gradients are held in the model's dtype, in float64 and in float64 about their mean.
_COPIES = 3


def estimate_noise(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    symmetries: Mapping[str, Symmetry],
    *,
    dtype: torch.dtype | None = None,
    max_bytes: int = 2**28,
    progress: bool = True,
) -> NoiseMoments:
    r"""Measure the gradient noise that the symmetries need, exactly, in one pass over the data.

    The gradient of every example is formed by `torch.func`, a chunk of examples at a time, and its centred second
    moments are accumulated in float64: $N_\pm = E[C_\pm(g)] - C_\pm(E g)$. The model is not changed, nor are its
    gradients, its mode or the global random state.

    Args:
        model: The model, in the mode (train or eval) in which it trains.
        loss: `loss(model, batch)` with one loss per example, shape (B,): what you train with, `reduction="none"`.
        loader: Batches, as a DataLoader gives them: tensors, or tensors in tuples, lists, mappings or dataclasses. A
            tensor whose leading dimension is not the batch size is shared by all examples.
        symmetries: What to measure it for, by name.
        dtype: Compute gradients in this floating-point type; None keeps the model's own.
        max_bytes: Memory that stacked gradients may take; it sets how many examples are done at once.
        progress: Show a progress bar on a terminal.

    Returns:
        The moments, per example.

    Raises:
        ParameterNameError: If a symmetry names parameters that the model does not have.
        ParameterShapeError: If its axes do not fit them.
        FrozenParameterError: If it would move a parameter that does not require gradients.
        NotASymmetryError: If it changes the loss of an example; with its residual.
        CoupledExamplesError: If the loss of one example depends on the others.
        LossError: If the loss does not return one differentiable number per example.
        NonFiniteError: If a parameter, loss or gradient is NaN or infinite, naming batch and tensor.
        EmptyDataError: If the loader yields nothing.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> hidden = nf.DiagonalSymmetry(into, out_of)
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> nf.estimate_noise(net, loss, batches, {"hidden": hidden}).trace > 0
        tensor(True)

    Source: exact per-example gradients by vectorisation, as in `torch.func`; the statistics are those of Ziyin et al.
        (2024).
    """
    require_uncoupled(model)
    subject = _Subject.of(model, loss, symmetries, dtype)
    moments: NoiseMoments | None = None
    witness: Witness | None = None
    random: bool | None = None
    with own_randomness(subject.device):
        for index, given in enumerate(track(loader, "gradient noise", total=_length(loader), shown=progress)):
            where, batch = f"batch {index}", cast(given, subject.dtype, subject.device)
            together = subject.losses_of(batch)
            size = require_losses(together, where)
            if witness is None:
                witness = Witness(loss, given)
                require_differentiable(subject.losses, subject.trained, batch, subject.moved, where)
                random = not torch.equal(together, subject.losses_of(batch))
            alone = []
            for first, values, gradients in _chunks(subject, batch, size, max_bytes, where):
                subject.require_symmetric(gradients, first, where)
                reference = None if moments is None else _running_mean(moments, gradients)
                chunk = NoiseMoments.of(gradients, subject.symmetries, reference=reference)
                moments = chunk if moments is None else moments.merge(chunk)
                alone.append(values)
            if not random:
                require_independent(torch.cat(alone), together, where)
    if moments is None:
        raise EmptyDataError(
            f"the loader yielded no batch: {loader!r}. Is the data set empty, or smaller than a batch with "
            "drop_last=True?"
        )
    return replace(moments, aliases=subject.aliases, witness=witness)


@dataclass(frozen=True)
class _Subject:
    """The model under study as a function of its trained parameters, with everything that was checked at the door."""

    losses: Losses
    trained: dict[str, Tensor]
    symmetries: dict[str, Symmetry]
    aliases: dict[str, str]
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, symmetries: Mapping[str, Symmetry], dtype: torch.dtype | None
    ) -> "_Subject":
        if not isinstance(symmetries, Mapping):
            raise TypeError(f"symmetries is a mapping from your names to symmetries, got {type(symmetries).__name__}")
        params = snapshot(model, dtype)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FrozenParameterError(
                "the model has no parameter that requires gradients: nothing is trained, so there is no noise"
            )
        require_finite(params, "parameter")
        canonical = aliases(model)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        resolved = {name: symmetry.rename(canonical) for name, symmetry in symmetries.items()}
        for name, symmetry in resolved.items():
            require_names(params, symmetry.names, f"symmetry {name!r}")
            symmetry.check(params)
            if stuck := sorted(frozen.intersection(symmetry.names)):
                raise FrozenParameterError(
                    f"symmetry {name!r} acts on {stuck}, which do not require gradients: SGD does not move them, and "
                    "moving their partners alone would change the function. Leave this symmetry out, or unfreeze them"
                )
        trained = {name: tensor for name, tensor in params.items() if name not in frozen}
        fixed = {name: tensor for name, tensor in params.items() if name in frozen}
        whole = bind(model, loss, dtype)
        different = {name: target for name, target in canonical.items() if name != target}
        return cls(lambda p, batch: whole({**fixed, **p}, batch), trained, resolved, different, dtype)

    @property
    def device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    @property
    def moved(self) -> set[str]:
        return {name for symmetry in self.symmetries.values() for name in symmetry.names}

    def losses_of(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.losses(self.trained, batch)

    def require_symmetric(self, gradients: dict[str, Tensor], first: int, where: str) -> None:
        """Raise if some example's gradient has a component along a direction in which the loss should not change."""
        for name, symmetry in self.symmetries.items():
            identity = symmetry.identity(self.trained)
            # Fixed coordinates of all signs: any generator that is not a symmetry shows, in one product per example.
            x = torch.cos(1.0 + torch.arange(identity.numel(), dtype=identity.dtype, device=identity.device)).reshape(
                identity.shape
            )
            direction = symmetry.generate((x + x.mT) / 2 if x.ndim == 2 else x, self.trained)
            moved = symmetry.names
            along = torch.stack([(gradients[n] * direction[n]).flatten(1).sum(1) for n in moved]).sum(0)
            norms = torch.stack([gradients[n].flatten(1).square().sum(1) for n in moved]).sum(0)
            length = torch.stack([direction[n].square().sum() for n in moved]).sum()
            cosine = (along.abs() / (norms * length).sqrt()).nan_to_num(nan=0.0)
            worst = int(cosine.argmax())
            if not cosine[worst] <= torch.finfo(cosine.dtype).eps ** 0.5:
                raise NotASymmetryError(
                    f"{name!r} is not a symmetry of this loss: in {where} its residual, the cosine between the "
                    f"gradient of example {first + worst} and the direction Q theta, is {cosine[worst].item():.2e} "
                    "and should be 0 up to rounding. Look for a forgotten bias or a wrong sign; verify_symmetry "
                    "tries a declaration on one batch"
                )


def _chunks(
    subject: _Subject, batch: Batch, size: int, max_bytes: int, where: str
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    per_example = sum(8 * tensor.numel() for tensor in subject.trained.values())
    step = max(1, min(size, max_bytes // (_COPIES * per_example)))
    for start in range(0, size, step):
        examples = slice(start, min(start + step, size))
        values, gradients = example_gradients(subject.losses, subject.trained, batch, size, examples, where)
        require_finite(gradients, f"{where}: the per-example gradient of")
        yield start, values, gradients


def _running_mean(moments: NoiseMoments, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean gradient of everything seen so far and of a further stack."""
    extra = len(next(iter(gradients.values())))
    weight = extra / (moments.count + extra)
    return {
        name: mean + weight * (gradients[name].to(torch.float64).mean(0) - mean) for name, mean in moments.mean.items()
    }


def _length(loader: Any) -> int | None:
    size: Callable[[], int] | None = getattr(loader, "__len__", None)
    try:
        return size() if size is not None else None
    except TypeError:
        return None

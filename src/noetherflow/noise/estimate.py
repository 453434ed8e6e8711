"""One pass over the data: per-example gradients in, noise moments out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow._batch import cast, peek, select
from noetherflow._errors import EmptyDataError
from noetherflow._given import require_loader
from noetherflow._per_example import (
    own_randomness,
    require_differentiable,
    require_interval,
    require_losses,
    require_uncoupled,
)
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow.detect import find_symmetries
from noetherflow.noise.exact import Subject, exact_moments, single_examples
from noetherflow.noise.layerwise import LayerwisePass
from noetherflow.noise.moments import NoiseMoments
from noetherflow.symmetry import Action, Symmetry

# Models of no more parameters are measured exactly unless exact=False: the cost is negligible.
_FEW = 20_000


def estimate_noise(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    exact: bool | None = None,
    variances: bool = True,
    dtype: torch.dtype | None = None,
    max_bytes: int = 2**28,
    check_every: int = 256,
    progress: bool = True,
) -> NoiseMoments:
    r"""Measure the gradient noise that the symmetries need, in one pass over the data.

    The centred second moments $N_\pm = E[C_\pm(g)] - C_\pm(E g)$ of the gradients g of single examples. In small
    models every such gradient is formed by `torch.func`. In others one forward and one backward pass over the batch
    yield the sums of squares layer by layer, and no such gradient is kept: linear maps and convolutions, embeddings,
    normalisations, and parameters that are added or multiplied; the rest is done exactly, and named in the result. A
    few examples of the first batch are checked one by one. The model is not changed, nor are its gradients, its mode
    or the global random state.

    Args:
        model: The model, in the mode (train or eval) in which it trains.
        loss: `loss(model, batch)` with one loss per example, shape (B,): what you train with, `reduction="none"`.
        loader: Batches, as a DataLoader gives them: tensors, or tensors in tuples, lists, mappings or dataclasses. A
            tensor whose leading dimension is not the batch size is shared by all examples.
        symmetries: What to measure it for, by name; None finds them on the first batch, see `find_symmetries`.
        exact: Form the gradient of every example; None does so for models of at most 20,000 trained parameters.
        variances: Measure the variance of every entry of the parameters on which scalings and rescalings act, which
            `solve_equilibrium` needs.
        dtype: Compute gradients in this floating-point type; None keeps the model's own.
        max_bytes: Memory that stacked gradients may take; it sets how many examples are done at once.
        check_every: A few examples of the first batch are compared with backward passes of their own, and of every
            batch after so many.
        progress: Show a progress bar on a terminal.

    Returns:
        The moments, per example. Unless exact, standard errors are those between batches, and need two of them.

    Raises:
        ParameterNameError: If a symmetry names parameters that the model does not have.
        ParameterShapeError: If its axes do not fit them.
        FrozenParameterError: If it would move a parameter that does not require gradients.
        NotASymmetryError: If it changes the loss of an example; with its residual.
        CoupledExamplesError: If the loss of one example depends on the others.
        LossError: If the loss does not return one differentiable number per example.
        NonFiniteError: If a parameter, loss or gradient is NaN or infinite, naming batch and tensor.
        SettingsError: If check_every is less than 1.
        EmptyDataError: If the loader yields nothing.
        TraceError: If symmetries are to be found, and the computation cannot be written down as a graph.

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
    require_interval(check_every)
    first, batches = peek(loader)
    require_loader(model, loss, loader, first)
    if symmetries is None:
        symmetries = find_symmetries(model, loss, first)
    estimate = Estimate(
        Subject.of(model, loss, symmetries, dtype), exact=exact, variances=variances, max_bytes=max_bytes
    )
    with own_randomness(estimate.device):
        for index, batch in enumerate(track(batches, "gradient noise", total=_length(loader), shown=progress)):
            if index and index % check_every == 0:
                estimate.check_next()
            estimate.add(batch, f"batch {index}")
    moments = estimate.take()
    if moments is None:
        raise EmptyDataError(
            f"the loader yielded no batch: {loader!r}. Is the data set empty, or smaller than a batch with "
            "drop_last=True?"
        )
    return moments


@final
class Estimate:
    """Accumulates the moments of batches, after the checks that the first batch allows.

    Args:
        subject: The model with its symmetries.
        exact: Whether the gradient of every example is formed; None decides by the size of the model.
        variances: Whether the variance of every entry of scaled parameters is measured.
        max_bytes: Memory that stacked gradients may take.
    """

    def __init__(self, subject: Subject, *, exact: bool | None, variances: bool, max_bytes: int) -> None:
        if any(symmetry.action is Action.SCALES_EIGENSPACES for symmetry in subject.symmetries.values()):
            exact = True  # such a generator joins single entries of several tensors
        if exact is None:
            exact = sum(tensor.numel() for tensor in subject.trained.values()) <= _FEW
        self._subject, self._exact, self._variances, self._max_bytes = subject, exact, variances, max_bytes
        self._layerwise = None if exact else LayerwisePass(subject, variances=variances, max_bytes=max_bytes)
        self._moments: NoiseMoments | None = None
        self._random: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._subject.device

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters to differentiate by."""
        return self._subject.trained

    def size_of(self, batch: Batch) -> int:
        """The number of examples of a batch."""
        with own_randomness(self.device):
            return len(self._subject.losses_of(cast(batch, self._subject.dtype, self.device)))

    def check_next(self) -> None:
        """Compare some examples of the next batch with backward passes of their own, as those of the first."""
        self._random = None
        if self._layerwise is not None:
            self._layerwise.forget_places()

    def add(self, given: Batch, where: str) -> None:
        """Measure a batch; `where` is the subject of errors."""
        subject = self._subject
        batch = cast(given, subject.dtype, subject.device)
        if self._random is None:
            self._check(batch, where)
        if self._layerwise is not None and self._layerwise.add(batch, where):
            return
        together = subject.losses_of(batch)
        require_losses(together, where)
        self._moments = exact_moments(
            subject, batch, together, self._max_bytes, where, self._moments, random=bool(self._random)
        )

    def take(self) -> NoiseMoments | None:
        """The moments of the batches since the last call; None if there were none."""
        moments, self._moments = None if self._moments is None else self._moments.cpu(), None
        if self._layerwise is not None and self._layerwise.count:
            layerwise, self._layerwise = self._layerwise, self._layerwise.fresh(self._subject)
            return layerwise.moments() if moments is None else layerwise.moments().merge(moments)
        return moments

    def at(self, trained: Params) -> "Estimate":
        """An empty estimate with the outcome of all checks, at further values of the trained parameters."""
        # Where only some parameters are differentiated by, the others have these values, too.
        function = self._subject.function.with_values(trained)
        subject = replace(self._subject, function=function, trained=dict(trained))
        other = Estimate(subject, exact=self._exact, variances=self._variances, max_bytes=self._max_bytes)
        other._random = self._random
        other._layerwise = None if self._layerwise is None else self._layerwise.fresh(subject)
        return other

    def _check(self, batch: Batch, where: str) -> None:
        """What has to hold of the first batch; decides whether the layerwise pass can be used."""
        subject = self._subject
        together = subject.losses_of(batch)
        size = require_losses(together, where)
        with single_examples(batch, size, where):
            subject.function.observe(select(batch, torch.zeros(1, dtype=torch.long, device=subject.device), size))
        unreached = subject.function.unreached(subject.trained, batch)
        require_differentiable(unreached, subject.trained, subject.moved, where)
        if subject.function.reentrant:
            self._layerwise = None  # its backward pass runs inside another, where a sum cannot be taken apart
        self._random = not torch.equal(together, subject.losses_of(batch))
        if self._layerwise is not None:
            with single_examples(batch, size, where):
                self._layerwise.check(batch, together, random=self._random, where=where)


def _length(loader: Any) -> int | None:
    size: Callable[[], int] | None = getattr(loader, "__len__", None)
    try:
        return size() if size is not None else None
    except TypeError:
        return None

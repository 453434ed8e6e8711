"""The public function `forecast`: sharpness, stable steps and warmup, now and at the noise equilibrium."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from noetherflow._batch import read
from noetherflow._dtype import working_dtype
from noetherflow._errors import EquilibriumError, SettingsError
from noetherflow._given import require_loader
from noetherflow._params import aliases, canonical_names
from noetherflow._per_example import own_randomness
from noetherflow._progress import track
from noetherflow._second_moments import SecondMoments
from noetherflow._second_moments import second_moments as second_moments_of
from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.equilibrium import Equilibrium, equilibrate, solve_equilibrium
from noetherflow.forecasting.assumptions import assumptions_of
from noetherflow.forecasting.estimate import unknown
from noetherflow.forecasting.learning import Learning
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.norms import norms_of
from noetherflow.forecasting.result import Forecast
from noetherflow.forecasting.sides import Sides
from noetherflow.forecasting.traces import moved
from noetherflow.optimizers import AdamW, Optimizer, require_settings
from noetherflow.optimizers.state import Source
from noetherflow.symmetry import Symmetry

# Largest difference between the moved parameters and the equilibrium, relative to the largest entry of a tensor.
_ROUNDING = 1e-6
# Random vectors, at least: their spread is the error.
_FEWEST = 4


def forecast(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    settings: object,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    equilibrium: Equilibrium | None = None,
    second_moments: SecondMoments | Source | None = None,
    vectors: int = 32,
    microbatches: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Forecast:
    r"""Predict how the sharpness of a model changes on the way to its noise equilibrium, and whether warmup is needed.

    The Hessian follows a symmetry, $H(e^{Q}\theta) = e^{-Q} H(\theta)\,e^{-Q}$. So the trace of H at the equilibrium is
    known before training gets there: $\mathrm{Tr} H = \sum_p e^{-2 s_p} H_{pp}$ where the entry p is scaled by
    $e^{s_p}$. For symmetries that mix rows, and for the largest eigenvalue, H is measured at the moved parameters. The
    model is never changed.

    That holds for a function that stays as it is. Gradient descent without noise, on these batches and for the half
    time of the forecast, shows what learning alone would make of Tr H. Where the fall of the loss or that change is
    beyond two errors, and learning, two errors included, may change Tr H by as much as the motion along the orbit, the
    change and the half time cannot be told.

    Args:
        model: The model, in the mode in which it trains.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: Batches of the training data, two or more for errors. They are kept in memory; give a part of a large
            data set.
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        symmetries: As for `equilibrate`; not beside `equilibrium`.
        equilibrium: The equilibrium of the model as it is now; None searches it with `equilibrate`.
        second_moments: For AdamW: the optimizer in training, its state dict, a file of it, or the result of
            `second_moments`. The step sizes then are those of the run, not those that the gradients of the batches
            would give, and the equilibrium is that of `solve_equilibrium` from these second moments.
        vectors: The number of random vectors for the traces, where they are not exact. The error falls with the square
            root.
        microbatches: As for `equilibrate`.
        dtype: The floating-point type of the computation; by default float64, or the type of a very large model.
        seed: The seed of the random vectors.
        progress: Show a progress bar on a terminal.

    Returns:
        The forecast; `print` shows it as a table. A number that cannot be told is NaN with a reason.

    Raises:
        SettingsError: If `vectors` is below 4, if symmetries are given beside an equilibrium, or if second moments are
            given beside settings of SGD.
        EquilibriumError: If the equilibrium is not that of the model as it is now.
        NoetherflowError: For bad input, as `equilibrate` raises it.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> forecast = nf.forecast(net, loss, batches, nf.SGD(lr=0.1, batch_size=8))
        >>> forecast.trace.then.value > 0
        True

    Source: Ziyin et al. (2024) for sharpness along the orbit; Hutchinson (1989) for traces from random signs; Lanczos
        (1950) for the eigenvalue; Meyer et al. (2012) for gradient flow; Gilmer et al. (2021) for the role of warmup.
        Their combination is this package's own.
    """
    aliases(model)  # raises unless the model is a module
    given = require_settings(settings, model)
    if not isinstance(vectors, int) or vectors < _FEWEST:
        raise SettingsError(f"vectors must be an integer, {_FEWEST} or more, got {vectors!r}")
    if symmetries is not None and equilibrium is not None:
        raise SettingsError("give symmetries or an equilibrium, which has symmetries of its own, but not both")
    with own_randomness(next(model.parameters()).device):
        batches = read(loader, "loader")
    require_loader(model, loss, loader, batches[0])
    moments = None if second_moments is None else _moments(second_moments, model, given)
    if equilibrium is None and moments is not None:
        equilibrium = _equilibrium_of(moments, model, loss, batches[0], given, symmetries)
    if equilibrium is None:
        equilibrium = equilibrate(
            model, loss, batches, given, symmetries, microbatches=microbatches, dtype=dtype, progress=progress
        )
    working = working_dtype(model, loss, batches[0], dtype)
    mean_loss = MeanLoss(model, loss, batches, given, working.dtype)
    equilibrium = _of_model(equilibrium, model, mean_loss)
    for _ in track(range(1), "sharpness", total=1, shown=progress):
        sides = Sides.measure(mean_loss, equilibrium, given, vectors, seed, microbatches=microbatches, moments=moments)
        half = sides.half_steps()
        learning = sides.learning(half)
    trace = sides.trace()
    if learning.dominates:
        trace = trace._replace(ratio=unknown(learning.reason))
        half = unknown(learning.reason)
    return Forecast(
        trace=trace,
        blocks=sides.blocks(),
        largest=sides.largest,
        critical=sides.critical,
        stable_step=sides.stable_step,
        noisy_step=sides.noisy_step,
        half_steps=half,
        learning=learning,
        warmup=sides.warmup(_doubt(learning)),
        norms=norms_of(equilibrium, given, mean_loss.function.params),
        exact=sides.exact,
        status=equilibrium.status,
        settings=given,
        examples=mean_loss.examples,
        assumptions=assumptions_of(given, sides, learning),
        notes=tuple(filter(None, (working.note, *equilibrium.notes, equilibrium.message))),
    )


def _moments(given: SecondMoments | Source, model: nn.Module, settings: Optimizer) -> SecondMoments:
    """The second moments that Adam keeps."""
    if not isinstance(settings, AdamW):
        raise SettingsError(
            f"second_moments are those of Adam, got them beside nf.{type(settings).__name__}: leave them out, or give "
            "nf.AdamW"
        )
    return given if isinstance(given, SecondMoments) else second_moments_of(given, model)


def _equilibrium_of(
    moments: SecondMoments,
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    settings: Optimizer,
    symmetries: Mapping[str, Symmetry] | None,
) -> Equilibrium:
    """The equilibrium from second moments, for the symmetries of which these are known."""
    if symmetries is None:
        every = find_symmetries(model, loss, batch)
        symmetries = {name: s for name, s in every.items() if moments.values.keys() >= set(s.names)}
    return solve_equilibrium(moments.for_symmetries(symmetries, model), settings, model)


def _doubt(learning: Learning) -> str:
    """Why the model may not get to the equilibrium of the present function; empty if there is no reason."""
    if learning.learns:
        return "the loss still falls, so that the function and its equilibrium change"
    return "" if learning.slope.known else str(learning)


def _of_model(equilibrium: Equilibrium, model: nn.Module, mean_loss: MeanLoss) -> Equilibrium:
    """An equilibrium under the names of a model; raises unless it is that of the model as it is now."""
    names = canonical_names(model, equilibrium.params, "the equilibrium")
    renamed = replace(
        equilibrium,
        params={names[name]: tensor for name, tensor in equilibrium.params.items()},
        symmetries={name: symmetry.rename(names) for name, symmetry in equilibrium.symmetries.items()},
    )
    here = {name: tensor.double().cpu() for name, tensor in mean_loss.function.params.items()}
    there = moved(renamed, renamed.coordinates, here)
    for name, expected in renamed.params.items():
        got = there[name]
        size = float(torch.maximum(expected.abs().max(), got.abs().max())) if expected.numel() else 0.0
        if got.shape != expected.shape or float((got - expected).abs().max()) > _ROUNDING * size:
            raise EquilibriumError(
                f"the equilibrium is not that of the model as it is now: {name!r} would move to another point. Search "
                "the equilibrium again, or leave equilibrium out"
            )
    return renamed

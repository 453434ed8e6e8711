"""Moving a model along its symmetries, which changes no loss."""

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from noetherflow._batch import cast
from noetherflow._errors import (
    EquilibriumError,
    FrozenParameterError,
    FunctionChangedError,
    SettingsError,
)
from noetherflow._model_function import ModelFunction
from noetherflow._optimizer_state import Move, SecondMoments, StateChange, require_supported, transport
from noetherflow._params import canonical_names
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._residual import relative_change
from noetherflow._types import Batch, Loss
from noetherflow._undo import Rebalanced, Snapshot
from noetherflow.equilibrium import Equilibrium, Status

_UNUSABLE = (Status.NON_FINITE, Status.NOT_CONVERGED)
# Largest difference, relative to the largest entry of a tensor, between the move of the present parameters and the
# equilibrium: far above rounding in float64, far below a step of training.
_ROUNDING = 1e-9


def rebalance_(
    model: nn.Module,
    equilibrium: Equilibrium,
    loss: Loss,
    batch: Batch,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    second_moments: SecondMoments = "transport",
    tolerance: float | None = None,
) -> Rebalanced:
    r"""Move a model to its noise equilibrium in place, and check that no example's loss has changed.

    The group element that `solve_equilibrium` or `equilibrate` returned acts on the parameters,
    $\theta \to e^{Q_x}\theta$, in float64. The loss of every example of a batch is computed at $\theta$ and at
    $e^{Q_x}\theta$, and the model is moved only if no loss changes by more than the tolerance. An error or an
    interruption leaves model and optimizer as they were.

    The model may be inside DistributedDataParallel, `torch.compile` or a PEFT model, or no longer be.

    Args:
        model: The model, changed in place.
        equilibrium: The equilibrium of the model as it is now.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples on which the function is checked.
        optimizer: A `torch.optim.SGD`, `Adam` or `AdamW` that trains the model. Averages of gradients (SGD's momentum,
            Adam's first moment) are transformed like a gradient, by $e^{-Q_x}$. Adam's second moments (the maxima of
            AMSGrad too) are exact for symmetries that scale entries.
        second_moments: What becomes of Adam's second moments under symmetries that mix rows. They are variances of
            entries without correlations, so their transformation is not determined. `"transport"`: the diagonal of
            $e^{-Q_x}\,\mathrm{diag}(v)\,e^{-Q_x}$. `"reset"`: the state of these parameters starts afresh, step count
            included. Under a `DenseSymmetry` and other groups that mix single entries, the state always starts afresh.
            A warning names the parameters.
        tolerance: Largest accepted change of the loss of an example, relative to that loss or to the mean of all
            absolute losses, whichever is larger. By default the square root of the machine epsilon of the coarsest
            floating-point type in which the loss is computed.

    Returns:
        The largest relative change of the loss of an example as `change`, and the way back: `moved()` restores every
        bit of the parameters and of the optimizer's state, and so does the end of `with nf.rebalance_(...):`.

    Raises:
        EquilibriumError: If the solver did not reach an equilibrium, or the parameters are no longer those that were
            measured.
        FunctionChangedError: If the loss of an example would change by more than the tolerance; the model stays as it
            was.
        FrozenParameterError: If a parameter that would move does not require gradients.
        SettingsError: If the optimizer is of another kind or trains no parameter of the model, or `second_moments` is
            neither `"transport"` nor `"reset"`.
        ParameterNameError: If the equilibrium names parameters that the model does not have.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4).double(), torch.randn(8, 1).double()) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr=0.1, batch_size=8), net)
        >>> moved = nf.rebalance_(net, equilibrium, loss, batches[0])
        >>> moved.change < 1e-12
        True
        >>> moved()  # and back

    Source: Ziyin et al. (2024): the loss is constant along the orbit, the noise of its gradient is not.
    """
    if equilibrium.status in _UNUSABLE:
        raise EquilibriumError(f"there is no equilibrium to move to: {equilibrium.status.value}\n{equilibrium.message}")
    if second_moments not in get_args(SecondMoments):
        raise SettingsError(f"second_moments must be one of {get_args(SecondMoments)}, got {second_moments!r}")
    names = canonical_names(model, equilibrium.params, "the equilibrium")
    # A group element with coordinates zero, of a symmetry without an equilibrium, moves nothing.
    moves = [
        (symmetry.rename(names), equilibrium.coordinates[name])
        for name, symmetry in equilibrium.symmetries.items()
        if equilibrium.coordinates[name].any()
    ]
    named = dict(model.named_parameters())
    touched = _touched(moves, named)
    if optimizer is not None:
        require_supported(optimizer, named)
    function = ModelFunction(model, loss)
    for name, there in equilibrium.params.items():
        here = named[names[name]]
        if here.shape != there.shape:
            raise EquilibriumError(
                f"the parameters are no longer those that were measured: {names[name]!r} has the shape "
                f"{tuple(here.shape)}, at the equilibrium {tuple(there.shape)}; nothing was moved"
            )
    transformed = _transformed(moves, function.params)
    _require_measured(transformed, equilibrium, names, named)
    moved = {name: transformed[name].to(named[name].dtype) for name in touched}
    change = _checked_change(function, moved, cast(batch, None, next(iter(named.values())).device), tolerance)
    state = StateChange() if optimizer is None else transport(optimizer, named, moves, second_moments)
    before = Snapshot(named.values(), optimizer)
    try:
        with torch.no_grad():
            for name, value in moved.items():
                named[name].copy_(value)
        if optimizer is not None:
            state.write(optimizer)
    except BaseException:
        before.restore()
        raise
    return Rebalanced(change, before)


def _touched(moves: list[Move], named: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the parameters that move; raises `FrozenParameterError` if a parameter of these is frozen."""
    acted_on = {name for symmetry, _ in moves for name in symmetry.names}
    frozen = [name for name in named if name in acted_on and not named[name].requires_grad]
    if frozen:
        raise FrozenParameterError(
            f"the equilibrium moves {frozen}, which do not require gradients: frozen parameters are never moved. "
            "Measure the noise and solve again with these parameters frozen"
        )
    return [name for name in named if name in acted_on]


def _transformed(moves: list[Move], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters after the moves, in float64; parameters on which no symmetry acts are the given tensors."""
    touched = {name for symmetry, _ in moves for name in symmetry.names}
    result = {name: tensor.double() if name in touched else tensor for name, tensor in params.items()}
    for symmetry, x in moves:
        result = symmetry.act(x, result)
    return result


def _require_measured(
    transformed: Mapping[str, Tensor],
    equilibrium: Equilibrium,
    names: Mapping[str, str],
    named: Mapping[str, nn.Parameter],
) -> None:
    """Raise `EquilibriumError` unless the moved parameters are the equilibrium.

    Args:
        transformed: The parameters after the move.
        equilibrium: The equilibrium.
        names: The name of each of its parameters in the model.
        named: The parameters of the model as they are.

    Raises:
        EquilibriumError: If a parameter differs.
    """

    def distance(tensors: Mapping[str, Tensor], name: str) -> float:
        """The largest difference from the equilibrium, relative to the largest entry."""
        here, there = tensors[names[name]].detach(), equilibrium.params[name]
        if not here.numel():
            return 0.0
        # Integers and truth values are parameters, too.
        wide = torch.promote_types(here.dtype, torch.float64)
        here, there = here.to(wide), there.to(here.device, wide)
        size = torch.maximum(here.abs().max(), there.abs().max()).clamp_min(torch.finfo(torch.float64).tiny)
        return float((here - there).abs().max() / size)

    distances = {name: distance(transformed, name) for name in names}
    different = [name for name in names if not distances[name] <= _ROUNDING]
    if not different:
        return
    dtypes = {name: named[names[name]].dtype for name in different}
    slack = {name: torch.finfo(dtype).eps if dtype.is_floating_point else 0.0 for name, dtype in dtypes.items()}
    if all(distance(named, name) <= max(_ROUNDING, slack[name]) for name in different):
        advice = "The model is at this equilibrium already, so there is nothing to do (was a notebook cell run twice?)"
    else:
        advice = "Measure the noise and solve again"
    worst = max(different, key=distances.__getitem__)
    raise EquilibriumError(
        f"the parameters are no longer those that were measured: after the move {worst!r} would differ from the "
        f"equilibrium by {distances[worst]:.1e} of its largest entry, expected at most {_ROUNDING:.0e}; nothing was "
        f"moved. {advice}, or undo an earlier move with the object that rebalance_ returned"
    )


def _checked_change(function: ModelFunction, moved: dict[str, Tensor], batch: Batch, tolerance: float | None) -> float:
    """The largest relative change of the loss of an example; raises if the change is above the tolerance.

    Args:
        function: The model at the parameters before the move.
        moved: The parameters that move, by name.
        batch: The examples.
        tolerance: The largest accepted change; None takes that of the type in which the loss is computed.

    Returns:
        The change.

    Raises:
        FunctionChangedError: If it is above the tolerance.
    """
    loss_before = _losses(function, function.params, batch)
    if tolerance is None:
        with own_randomness(loss_before.device, seed=0):
            tolerance = function.observe(batch).tolerance.rounding
    loss_after = _losses(function, function.params | moved, batch)
    change = relative_change(loss_before, loss_after)
    worst = int(change.argmax())
    if not change[worst] <= tolerance:
        raise FunctionChangedError(
            f"the loss of example {worst} would change from {loss_before[worst].item():.6g} to "
            f"{loss_after[worst].item():.6g}, relative {change[worst].item():.2e} > tolerance {tolerance:.2e}; "
            "the model stays as it was. Either (a) a declared symmetry is not one: check it with verify_symmetry; "
            "or (b) the type in which the loss is computed is too coarse for so large a move: raise the tolerance"
        )
    return change[worst].item()


def _losses(function: ModelFunction, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """The losses of a batch, float64, shape (B,)."""
    # One seed for the losses before and after the move, so that dropout drops equal units.
    with own_randomness(next(iter(params.values())).device, seed=0):
        losses = function.losses(params, batch)
    require_losses(losses, "rebalance_")
    return losses.double()

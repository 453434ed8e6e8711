"""Moving a model along its symmetries without changing its function."""

import torch
from torch import Tensor, nn

from noetherflow._batch import cast
from noetherflow._errors import EquilibriumError, FunctionChangedError, SettingsError
from noetherflow._params import require_names, snapshot
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._types import Batch, Loss
from noetherflow.equilibrium import Equilibrium, Status

_UNUSABLE = (Status.NON_FINITE, Status.NOT_CONVERGED)


def rebalance_(
    model: nn.Module,
    equilibrium: Equilibrium,
    loss: Loss,
    batch: Batch,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tolerance: float | None = None,
) -> float:
    r"""Move a model to its noise equilibrium in place, and check that no example's loss has changed.

    The group element found by `solve_equilibrium` is applied to the parameters as they are now,
    $\theta \to e^{Q_x}\theta$. The loss of every example of a batch is compared before and after, and if one changed
    by more than the tolerance everything is put back.

    Args:
        model: The model, changed in place.
        equilibrium: From `solve_equilibrium`.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples on which the function is checked.
        optimizer: A `torch.optim.SGD` whose momentum moves along; it transforms like a gradient, by $e^{-Q_x}$.
        tolerance: Largest change of an example's loss that is accepted, relative to that loss or to the batch's mean,
            whichever is larger. By default the square root of the machine epsilon of the model's dtype.

    Returns:
        The largest relative change of an example's loss.

    Raises:
        EquilibriumError: If the solver did not reach an equilibrium.
        FunctionChangedError: If an example's loss would change by more than the tolerance; the model is as it was.
        SettingsError: If the optimizer holds state that does not move with the parameters.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4).double(), torch.randn(8, 1).double()) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr=0.1, batch_size=8), net)
        >>> nf.rebalance_(net, equilibrium, loss, batches[0]) < 1e-12
        True

    Source: Ziyin et al. (2024): the loss is constant along the orbit, its noise is not.
    """
    if equilibrium.status in _UNUSABLE:
        raise EquilibriumError(f"there is no equilibrium to move to: {equilibrium.status.value}\n{equilibrium.message}")
    named = dict(model.named_parameters())
    before = snapshot(model, None)
    for symmetry in equilibrium.symmetries.values():
        require_names(named, symmetry.names, "the equilibrium")
    dtype = next(iter(named.values())).dtype
    tolerance = torch.finfo(dtype).eps ** 0.5 if tolerance is None else tolerance
    buffers = None if optimizer is None else _momenta(optimizer, named)

    loss_before = _losses(model, loss, batch)
    _assign(named, _moved(equilibrium, before, 1.0))
    try:
        loss_after = _losses(model, loss, batch)
        scale = torch.maximum(loss_before.abs(), loss_before.abs().mean()).clamp_min(
            torch.finfo(loss_before.dtype).tiny
        )
        change = ((loss_after - loss_before).abs() / scale).nan_to_num(nan=torch.inf)
        worst = int(change.argmax())
        if not change[worst] <= tolerance:
            raise FunctionChangedError(
                f"the loss of example {worst} would change from {loss_before[worst].item():.6g} to "
                f"{loss_after[worst].item():.6g}, relative {change[worst].item():.2e} > tolerance {tolerance:.2e}; "
                "the model was put back. Either (a) a declared symmetry is not one: check it with verify_symmetry; "
                "or (b) the model's dtype is too coarse for so large a move: raise the tolerance"
            )
    except BaseException:
        _assign(named, before)
        raise
    if buffers is not None:
        with torch.no_grad():
            for name, moved in _moved(
                equilibrium, {name: buffer.detach() for name, buffer in buffers.items()}, -1.0
            ).items():
                buffers[name].copy_(moved)
    return change[worst].item()


def _moved(equilibrium: Equilibrium, tensors: dict[str, Tensor], sign: float) -> dict[str, Tensor]:
    """The group element (sign 1) or its inverse (sign -1), computed in float64."""
    moved = snapshot(tensors)
    for name, symmetry in equilibrium.symmetries.items():
        moved = symmetry.act(sign * equilibrium.coordinates[name], moved)
    return moved


def _assign(named: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])


def _losses(model: nn.Module, loss: Loss, batch: Batch) -> Tensor:
    parameter = next(model.parameters())
    # The same seed before and after, so that dropout drops the same units; buffers are put back, since train mode may
    # move them.
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with own_randomness(parameter.device, seed=0), torch.no_grad():
        values = loss(model, cast(batch, None, parameter.device))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    require_losses(values, "rebalance_")
    return values.double()


def _momenta(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The momentum buffers by parameter name, zeros where there is none yet."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise SettingsError(
            f"only the state of torch.optim.SGD moves with the parameters, got {type(optimizer).__name__}: rebalance "
            "without optimizer= and start the optimizer afresh"
        )
    found = {
        name: optimizer.state[parameter].get("momentum_buffer")
        for name, parameter in named.items()
        if parameter in optimizer.state
    }
    held = {name: buffer for name, buffer in found.items() if buffer is not None}
    return {name: held.get(name, torch.zeros_like(parameter)) for name, parameter in named.items()}

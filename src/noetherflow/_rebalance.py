"""Moving a model along its symmetries, which changes no loss."""

import torch
from torch import Tensor, nn

from noetherflow._batch import cast
from noetherflow._errors import EquilibriumError, FunctionChangedError, SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._params import require_names, snapshot
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._residual import relative_change
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

    The group element that `solve_equilibrium` returned acts on the present parameters, $\theta \to e^{Q_x}\theta$. The
    loss of every example of a batch is computed at $\theta$ and at $e^{Q_x}\theta$, and the model is moved only if no
    loss changes by more than the tolerance.

    Args:
        model: The model, changed in place.
        equilibrium: From `solve_equilibrium`.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples on which the function is checked.
        optimizer: A `torch.optim.SGD`, whose momentum is transformed like a gradient, by $e^{-Q_x}$.
        tolerance: Largest accepted change of the loss of an example, relative to that loss or to the mean of all
            absolute losses, whichever is larger. By default the square root of the machine epsilon of the coarsest
            floating-point type in which the loss is computed.

    Returns:
        The largest relative change of the loss of an example.

    Raises:
        EquilibriumError: If the solver did not reach an equilibrium.
        FunctionChangedError: If the loss of an example would change by more than the tolerance; the model stays as it
            was.
        SettingsError: If the optimizer is not `torch.optim.SGD`.
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
        >>> nf.rebalance_(net, equilibrium, loss, batches[0]) < 1e-12
        True

    Source: Ziyin et al. (2024): the loss is constant along the orbit, the noise of its gradient is not.
    """
    if equilibrium.status in _UNUSABLE:
        raise EquilibriumError(f"there is no equilibrium to move to: {equilibrium.status.value}\n{equilibrium.message}")
    named = dict(model.named_parameters())
    for symmetry in equilibrium.symmetries.values():
        require_names(named, symmetry.names, "the equilibrium")
    buffers = None if optimizer is None else _momenta(optimizer, named)
    function = ModelFunction(model, loss)
    transformed = _transformed(equilibrium, function.params, 1.0)
    moved = {name: tensor.to(named[name].dtype) for name, tensor in transformed.items()}
    batch = cast(batch, None, next(iter(named.values())).device)
    loss_before = _losses(function, function.params, batch)
    if tolerance is None:
        with own_randomness(next(iter(named.values())).device, seed=0):
            tolerance = function.observe(batch).tolerance.rounding
    loss_after = _losses(function, moved, batch)
    change = relative_change(loss_before, loss_after)
    worst = int(change.argmax())
    if not change[worst] <= tolerance:
        raise FunctionChangedError(
            f"the loss of example {worst} would change from {loss_before[worst].item():.6g} to "
            f"{loss_after[worst].item():.6g}, relative {change[worst].item():.2e} > tolerance {tolerance:.2e}; "
            "the model stays as it was. Either (a) a declared symmetry is not one: check it with verify_symmetry; "
            "or (b) the type in which the loss is computed is too coarse for so large a move: raise the tolerance"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(moved[name])
    if buffers is not None:
        with torch.no_grad():
            momenta = _transformed(equilibrium, {name: buffer.detach() for name, buffer in buffers.items()}, -1.0)
            for name, momentum in momenta.items():
                buffers[name].copy_(momentum)
    return change[worst].item()


def _transformed(equilibrium: Equilibrium, tensors: dict[str, Tensor], sign: float) -> dict[str, Tensor]:
    """e^{Q_x} v for sign 1, e^{-Q_x} v for sign -1, with v the tensors; computed in float64."""
    result = snapshot(tensors)
    for name, symmetry in equilibrium.symmetries.items():
        result = symmetry.act(sign * equilibrium.coordinates[name], result)
    return result


def _losses(function: ModelFunction, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """The losses of a batch, float64, shape (B,)."""
    # One seed for the losses before and after the move, so that dropout drops equal units.
    with own_randomness(next(iter(params.values())).device, seed=0):
        losses = function.losses(params, batch)
    require_losses(losses, "rebalance_")
    return losses.double()


def _momenta(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The momentum buffers by parameter name; zeros for parameters without a buffer."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise SettingsError(
            f"only the state of torch.optim.SGD moves with the parameters, got {type(optimizer).__name__}: rebalance "
            "without optimizer= and start the optimizer afresh"
        )
    buffers = {}
    for name, parameter in named.items():
        # `get`, because optimizer.state[parameter] would create an entry.
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        buffers[name] = torch.zeros_like(parameter) if buffer is None else buffer
    return buffers

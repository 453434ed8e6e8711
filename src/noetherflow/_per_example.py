"""Checks that losses are those of independent examples, and functions that are evaluated for every example."""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from noetherflow._device import every_device
from noetherflow._errors import CoupledExamplesError, EmptyDataError, LossError, NonFiniteError, SettingsError
from noetherflow._types import Params

# What to do about a loss that couples examples, the end of a sentence.
BETWEEN_BATCHES = (
    "measure the noise between batches instead, with microbatches=True in analyze, equilibrate and forecast, or with "
    "MicrobatchMeter"
)


def require_uncoupled(model: nn.Module) -> None:
    """Raise `CoupledExamplesError` if a layer normalises over the batch: then no example has a gradient."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise CoupledExamplesError(
                f"{name!r} ({type(module).__name__}) normalises with the statistics of the batch, which couples its "
                "examples: the gradient of one example does not exist. Measure the noise of training between "
                "batches, with microbatches=True in analyze and equilibrate or with MicrobatchMeter; or use GroupNorm "
                "or LayerNorm. After model.eval() running statistics are used, whose noise is not that of training"
            )


def require_interval(check_every: int) -> None:
    """Raise `SettingsError` unless an interval between checks is a positive number of steps."""
    if check_every < 1:
        raise SettingsError(f"check_every is {check_every}, expected a number of steps, 1 or more")


def require_losses(values: Tensor, where: str) -> int:
    """Raise unless values are losses: one finite floating-point number per example.

    Args:
        values: What the user's loss returned.
        where: Subject of the message, such as the number of the batch.

    Returns:
        The number of examples B.

    Raises:
        LossError: If values are not a floating-point tensor of shape (B,).
        EmptyDataError: If B is 0.
        NonFiniteError: If a loss is NaN or infinite.
    """
    if not isinstance(values, Tensor):
        raise LossError(f"{where}: loss(model, batch) must return a tensor of shape (B,), got {type(values).__name__}")
    if not values.is_floating_point():
        raise LossError(
            f"{where}: loss(model, batch) must return floating-point numbers, got {values.dtype}, which has no gradient"
        )
    if values.ndim != 1:
        raise LossError(
            f"{where}: loss(model, batch) must return one loss per example, shape (B,), got shape "
            f"{tuple(values.shape)}. "
            'Use reduction="none", and average over tokens or outputs but not over examples'
        )
    if len(values) == 0:
        raise EmptyDataError(f"{where}: the batch is empty")
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"{where}: the loss of example {bad[0]} is {values[bad[0]].item()} ({len(bad)} of {len(values)} not finite)"
        )
    return len(values)


def require_differentiable(unreached: Collection[str], params: Params, needed: set[str], where: str) -> None:
    """Raise `LossError` if no gradient reaches any parameter, or a parameter on which a symmetry acts.

    Args:
        unreached: The parameters that no gradient reaches.
        params: All trainable parameters.
        needed: The parameters on which symmetries act.
        where: Subject of the message.

    Raises:
        LossError: See above.
    """
    if len(unreached) == len(params):
        raise LossError(
            f"{where}: the loss does not depend differentiably on any trainable parameter. Look for .detach(), "
            ".item(), argmax or torch.no_grad() in the loss or the model"
        )
    unused = [name for name in unreached if name in needed]
    if unused:
        raise LossError(
            f"{where}: the loss does not depend on {unused}, on which a symmetry acts: no gradient reaches them"
        )


def each(function: Callable[..., Any], inputs: tuple[Any, ...], shared: tuple[bool, ...], randomness: str) -> Any:
    """Evaluate a function at every index of the leading axis of its inputs.

    The evaluation is vectorised by `torch.func.vmap`. A function that vmap refuses is evaluated in a loop: recurrent
    layers, and models that branch on their inputs in Python (as models of transformers do to warn about padding).

    Args:
        function: A function of nested containers of tensors that returns such containers.
        inputs: Its arguments; the tensors of an argument that is not shared have a leading axis of length b.
        shared: For each argument, whether all evaluations get the same tensors.
        randomness: `same` or `different` random numbers, as `vmap` has it.

    Returns:
        The results, stacked along a leading axis of length b.

    Raises:
        RuntimeError: If the function raises it in the loop.
    """
    try:
        return vectorised(function, inputs, shared, randomness)
    except RuntimeError:
        return in_a_loop(function, inputs, shared)  # which raises a mistake in the function again


def vectorised(function: Callable[..., Any], inputs: tuple[Any, ...], shared: tuple[bool, ...], randomness: str) -> Any:
    """What `each` returns, by `torch.func.vmap`, or the error by which vmap refuses the function."""
    with warnings.catch_warnings():
        # vmap runs an operation that it cannot vectorise in a loop, and warns.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        dims = tuple(None if is_shared else 0 for is_shared in shared)
        return vmap(function, in_dims=dims, randomness=randomness)(*inputs)


def in_a_loop(function: Callable[..., Any], inputs: tuple[Any, ...], shared: tuple[bool, ...]) -> Any:
    """What `each` returns, by a call for every index."""
    stacked = next(value for value, is_shared in zip(inputs, shared, strict=True) if not is_shared)
    results = [
        function(
            *(
                value if is_shared else tree_map(lambda tensor, at=index: tensor[at], value)
                for value, is_shared in zip(inputs, shared, strict=True)
            )
        )
        for index in range(len(tree_leaves(stacked)[0]))
    ]
    return tree_map(lambda *tensors: torch.stack(tensors), *results)


def require_independent(single: Tensor, batched: Tensor, where: str, tolerance: float, first: int = 0) -> None:
    """Raise `CoupledExamplesError` if the loss of an example depends on the batch around it.

    Args:
        single: The losses of b examples, each evaluated as a batch of size 1, shape (b,).
        batched: The losses of all examples within their batch, shape (B,).
        where: Subject of the message.
        tolerance: Largest difference, relative to the loss of the example plus the mean of all losses. With infinity,
            only a loss that is not finite on its own raises.
        first: The index in the batch of the first of the b examples.

    Raises:
        CoupledExamplesError: See above.
    """
    mean, single, batched = (
        batched.double().abs().mean(),
        single.double(),
        batched[first : first + len(single)].double(),
    )
    difference = (single - batched).abs()
    scale = (mean + batched.abs()).clamp_min(torch.finfo(batched.dtype).tiny)
    worst = int((difference / scale).argmax())
    if not difference[worst] <= tolerance * scale[worst]:
        raise CoupledExamplesError(
            f"{where}: example {first + worst} has loss {batched[worst].item():.6g} within its batch and "
            f"{single[worst].item():.6g} on its own. Either (a) the loss couples examples (contrastive losses, a "
            "normalisation over the batch, a division by the mean of a mask), and no example has a gradient of its "
            "own; or (b) a tensor of the batch that all examples share happens to have the batch size as its leading "
            f"dimension. For (a), {BETWEEN_BATCHES}"
        )


@contextlib.contextmanager
def own_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """A block that may draw random numbers (dropout) and leaves the global generators of PyTorch unchanged.

    Args:
        device: A device of the model; the generators of the CPU and of all devices of this type are restored.
        seed: Seed within the block; None goes on from the present state.
    """
    devices = every_device(device)
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        if seed is not None:
            torch.manual_seed(seed)
        yield

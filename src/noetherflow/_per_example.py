"""What stands in the way of losses and gradients of single examples, and functions of every example."""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from noetherflow._errors import CoupledExamplesError, EmptyDataError, LossError, NonFiniteError
from noetherflow._types import Params


def require_uncoupled(model: nn.Module) -> None:
    """Raise if a layer of the model normalises over the batch, so that no example has a gradient of its own."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise CoupledExamplesError(
                f"{name!r} ({type(module).__name__}) normalises with the statistics of the batch, which couples its "
                "examples: the gradient of one example does not exist. Call model.eval() to use the running "
                "statistics, use GroupNorm or LayerNorm, or measure the noise between microbatches with MicrobatchMeter"
            )


def require_losses(values: Tensor, where: str) -> int:
    """Raise unless these are losses, one finite floating-point number per example; returns the number of examples."""
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
    """Raise if the loss is detached from all parameters, or from a parameter on which a symmetry acts."""
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
    """A function of every entry along the leading axis of its inputs, but for those that are shared.

    It is vectorised if it can be. Models that look at their inputs in Python (those of transformers that warn about
    padding do) cannot be, nor recurrent layers; they are evaluated in a loop.

    Returns:
        What the function returns, stacked.

    Raises:
        RuntimeError: Whatever the function raises.
    """
    try:
        with warnings.catch_warnings():
            # A single operation that cannot be batched is done one by one, with a warning.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(function, in_dims=tuple(None if common else 0 for common in shared), randomness=randomness)(
                *inputs
            )
    except RuntimeError:
        pass  # a mistake of the function's own is raised again below
    leading = next(tensor for tensor, common in zip(inputs, shared, strict=True) if not common)
    results = [
        function(
            *(
                tensor if common else tree_map(lambda t, at=index: t[at], tensor)
                for tensor, common in zip(inputs, shared, strict=True)
            )
        )
        for index in range(len(tree_leaves(leading)[0]))
    ]
    return tree_map(lambda *parts: torch.stack(parts), *results)


def require_independent(alone: Tensor, together: Tensor, where: str, tolerance: float) -> None:
    """Raise if examples have another loss on their own than within their batch, beyond a relative tolerance."""
    alone, together = alone.double(), together.double()
    difference = (alone - together).abs()
    scale = together.abs().mean() + together.abs()
    worst = int((difference / scale.clamp_min(torch.finfo(together.dtype).tiny)).argmax())
    if not difference[worst] <= tolerance * scale[worst]:
        raise CoupledExamplesError(
            f"{where}: example {worst} has loss {together[worst].item():.6g} within its batch and "
            f"{alone[worst].item():.6g} on its own. Either (a) the loss couples examples (contrastive losses, a "
            "normalisation over the batch), and no example has a gradient of its own; or (b) a tensor of the batch "
            "that all examples share happens to have the batch size as its leading dimension. For (a), MicrobatchMeter "
            "measures the noise between microbatches"
        )


@contextlib.contextmanager
def own_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """A block that may draw random numbers (dropout) and leaves the global generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield

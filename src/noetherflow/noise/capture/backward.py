"""Backward passes inside of a block in which noise is measured."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noetherflow.noise.capture.autograd import DerivativeError
from noetherflow.noise.capture.calls import leaves_of, named, own_code
from noetherflow.noise.capture.layouts import Lost, Several

if TYPE_CHECKING:
    from noetherflow.noise.capture.mode import Capture

_BACKWARD: dict[Any, Any] = {function: own_code(function) for function in (torch.autograd.backward, Tensor.backward)}
_GRAD = own_code(torch.autograd.grad)
BACKWARD_PASSES = {*_BACKWARD, torch.autograd.grad}
_NAMES = {
    torch.autograd.backward: ("tensors", "grad_tensors", "retain_graph", "create_graph"),
    Tensor.backward: ("self", "gradient", "retain_graph", "create_graph"),
    torch.autograd.grad: ("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph"),
}


def run(capture: "Capture", func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a backward pass under the mode: layers under a checkpoint are computed again, and have to be seen again.

    Args:
        capture: The forward pass.
        func: One of BACKWARD_PASSES.
        args: Its arguments.
        kwargs: Its named arguments.

    Returns:
        What the function returns.

    Raises:
        DerivativeError: If its gradients are to be differentiated, or taken by parameters without `backward`.
    """
    first, second, *_, create_graph = named(_NAMES[func], args, kwargs)
    if create_graph:
        raise DerivativeError(
            "the loss takes derivatives of the model (create_graph=True), inside a block in which noise is measured. "
            "Use estimate_noise(exact=True), or MicrobatchMeter"
        )
    if func is torch.autograd.grad:
        return _grad(capture, list(leaves_of((second,))), args, kwargs)
    for root in leaves_of((first,)):
        layout = capture.layout(root)
        if isinstance(layout, Lost):
            capture.joined = capture.joined or f"{layout.cause}, hides where they are"
        if isinstance(layout, Several) and not layout.additive:
            capture.joined = capture.joined or f"{layout.cause} joins them"
        capture.summed |= isinstance(layout, Several) and layout.summed and second is None
    before, capture.marks.again = capture.marks.again, True
    try:
        with capture:
            return _BACKWARD[func](*args, **kwargs)
    finally:
        capture.marks.again = before


def _grad(capture: "Capture", inputs: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gradients by something other than parameters: what is recorded on the way is forgotten."""
    if any(capture.is_tracked(leaf) for leaf in inputs):
        raise DerivativeError(
            "torch.autograd.grad by parameters, inside a block in which noise is measured: call backward(), or "
            "compute these gradients outside of the block"
        )
    before = [(source, list(source.uses)) for source in capture.sources()]
    with capture:
        result = _GRAD(*args, **kwargs)
    for source, uses in before:
        source.uses = uses
    return result

"""Linear maps: the gradient of an example is a sum of outer products, output gradient times input."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.calls import named
from noetherflow.noise.capture.layouts import Apart, Listed, Regular
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import outer, per_example
from noetherflow.noise.capture.sources import roots_of
from noetherflow.noise.ops.registry import gradient_rule


@gradient_rule(functional.linear)
def linear(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Vectors times a matrix, and a bias."""
    x, weight, bias = named(("input", "weight", "bias"), args, kwargs)
    return _linear(capture, x, weight, bias)


@gradient_rule(
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.mv, Tensor.mv
)
def matmul(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Vectors times a matrix from either side."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    left, right = args if func is not Tensor.__rmatmul__ else args[::-1]
    if capture.is_constant(right):
        return _linear(capture, left, right, None, transposed=True)
    if right.ndim < 2:
        return _linear(capture, right, left, None)
    layout = capture.layout(right)
    if not isinstance(layout, (Regular, Listed)):
        return NotImplemented
    # W X = (X^T W^T)^T: the vectors are the columns of X, and the examples may be columns.
    last = right.ndim - 1
    dim = {last: last - 1, last - 1: last}.get(layout.dim, layout.dim)
    moved: Apart = (
        Regular(dim, layout.inner, layout.scaled) if isinstance(layout, Regular) else Listed(dim, layout.owners)
    )
    result = _linear(capture, right.mT, left, None, layout=moved)
    return result if result is NotImplemented else result.mT


@gradient_rule(torch.addmm, Tensor.addmm)
def addmm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The linear layers of GPT-2."""
    if len(args) != 3 or kwargs:
        return NotImplemented
    return _linear(capture, args[1], args[2], args[0], transposed=True)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the type in which autocast computes products of matrices; it leaves float64 as it is."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _linear(
    capture: Capture,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    layout: Apart | None = None,
) -> Any:
    w, b = capture.tracked(weight), capture.tracked(bias)
    if weight.ndim != 2 or (bias is not None and bias.ndim != 1) or not capture.is_constant(weight, bias):
        return NotImplemented
    if layout is None:
        layout = capture.apart(x, 1)
    elif layout.scaled or not layout.is_complete or not layout.ends_before(x.ndim, 1):
        layout = None
    if layout is None:
        return NotImplemented
    examples, size = layout, capture.size
    x, weight = _autocast(x), _autocast(weight)
    bias = None if bias is None else _autocast(bias)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        gradients, handed = examples.rows(outputs, 1, size), []
        if w is not None:
            vectors = examples.rows(inputs, 1, size)
            pair = (gradients, vectors) if transposed else (vectors, gradients)
            handed.append(w.note(outer(w.views, *pair)))
        if b is not None:
            handed.append(b.note(per_example(b.views, gradients)))
        return handed

    matrix = weight.t() if transposed else weight
    return autograd.linear(x, matrix, bias, note, roots_of(w, b), keeps_inputs=w is not None)

"""Convolutions, also transposed: linear maps of the patches of an image."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import named
from noetherflow.noise.capture.layouts import Apart, Rows
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import Record, outer, per_example
from noetherflow.noise.ops.other import other
from noetherflow.noise.ops.registry import gradient_rule
from noetherflow.noise.uses import Convolution, View


@gradient_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Convolutions of one to three dimensions, in groups or not; an example may have several images."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = named(names, args, kwargs)
    space = weight.ndim - 2
    stride, dilation = _each(stride, 1, space), _each(dilation, 1, space)
    groups = 1 if groups is None else groups
    layout = capture.apart(x, space + 1)
    if layout is None or x.ndim != space + 2 or not capture.is_constant(weight, bias):
        return NotImplemented
    is_single = _is_single(capture, x, layout)
    if groups > 1 and not is_single:
        return other(capture, func, args, kwargs)
    if isinstance(padding, str):
        widths = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(width % 2 for width in widths):
            return other(capture, func, args, kwargs)
        padding = [width // 2 for width in widths]
    else:
        padding = _each(padding, 0, space)
    output = func(x, *_detached(weight, bias), stride, padding, dilation, groups)
    steps = stride, padding, dilation
    return _tapped(capture, x, weight, bias, output, layout, steps, groups, is_single=is_single, transposed=False)


@gradient_rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Transposed convolutions: the patches are those of the output's gradient, and the input takes the other place."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, further, groups, dilation = named(names, args, kwargs)
    space = weight.ndim - 2
    stride, padding, further, dilation = (
        _each(value, default, space) for value, default in ((stride, 1), (padding, 0), (further, 0), (dilation, 1))
    )
    groups = 1 if groups is None else groups
    layout = capture.apart(x, space + 1) if x.ndim == space + 2 and capture.is_constant(weight, bias) else None
    # With more output padding than a stride, the kernel fits into the output more often than the input has places.
    if layout is None or any(width >= step for width, step in zip(further, stride, strict=True)):
        return other(capture, func, args, kwargs)
    is_single = _is_single(capture, x, layout)
    if groups > 1 and not is_single:
        return other(capture, func, args, kwargs)
    output = func(x, *_detached(weight, bias), stride, padding, further, groups, dilation)
    steps = stride, padding, dilation
    return _tapped(capture, x, weight, bias, output, layout, steps, groups, is_single=is_single, transposed=True)


def _is_single(capture: Capture, x: Tensor, layout: Apart) -> bool:
    """Whether every example has one image."""
    return x.shape[0] == capture.size and layout.rows(x[:, :1], x.ndim - 1, capture.size).owners is None


def _detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def _tapped(
    capture: Capture,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    layout: Apart,
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
    *,
    is_single: bool,
    transposed: bool,
) -> Tensor:
    """The output; in the backward pass, the gradients of weight and bias are recorded."""
    w, b = capture.tracked(weight), capture.tracked(bias)
    kernel = weight.shape[2:]

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        handed = []
        if w is not None:
            inputs = inputs.to(outputs.dtype)
            images, places = (outputs, inputs) if transposed else (inputs, outputs)
            if is_single:
                use: Record = Convolution(w.views, images, places, *steps, groups, kernel)
            else:
                use = _of_many(w.views, layout, images, places, steps, kernel, capture.size)
            handed.append(w.note(use))
        if b is not None:
            sums = outputs.flatten(2).sum(2)
            handed.append(b.note(per_example(b.views, layout.rows(sums, 1, capture.size))))
        return handed

    return capture.tap(output, x, note, w, b)


def _of_many(
    views: tuple[View, ...],
    layout: Apart,
    images: Tensor,
    outputs: Tensor,
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]],
    kernel: Sequence[int],
    size: int,
) -> Record:
    """Where an example has several images, the vectors of a linear map are the patches of all of them."""
    stride, padding, dilation = steps
    widths = [width for side in reversed(padding) for width in (side, side)]
    padded = functional.pad(images, widths) if any(widths) else images.contiguous()
    moves = [distance * step for distance, step in zip(dilation, padded.stride()[2:], strict=True)]
    jumps = [distance * step for distance, step in zip(stride, padded.stride()[2:], strict=True)]
    count, places = len(padded), outputs.shape[2:]
    strides = (padded.stride(0), *jumps, padded.stride(1), *moves)
    patches = padded.as_strided((count, *places, padded.shape[1], *kernel), strides, padded.storage_offset())
    vectors = patches.reshape(count, math.prod(places), -1)
    gradients = outputs.flatten(2).mT
    pair = []
    for stack in (vectors, gradients):
        values, owners = layout.rows(stack, 2, size)
        if owners is None:
            pair.append(Rows(values.flatten(1, 2), None))
        else:
            pair.append(Rows(values.flatten(0, 1), owners.repeat_interleave(values.shape[1])))
    return outer((*views, lambda tensor: tensor.flatten(1)), *pair)


def _each(value: Any, default: int, count: int) -> list[int]:
    value = default if value is None else value
    return list(value) * (count if len(value) == 1 else 1) if isinstance(value, (tuple, list)) else [value] * count

"""Gains and biases of normalisations."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture import autograd
from noetherflow.noise.capture.calls import named
from noetherflow.noise.capture.layouts import Apart, Rows
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import per_example
from noetherflow.noise.capture.sources import Tracked, roots_of
from noetherflow.noise.kernels import affine_sums, channel_sums
from noetherflow.noise.ops.registry import gradient_rule


@gradient_rule(functional.layer_norm)
def layer_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation over the last dimensions."""
    x, shape, weight, bias, eps = named(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    kept, size = len(shape), capture.size
    layout = capture.apart(x, kept)
    if layout is None or not capture.is_constant(weight, bias):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    gain, shift = (None if affine is None else affine.detach() for affine in (weight, bias))
    output, mean, deviation = torch.native_layer_norm(x, shape, gain, shift, 1e-5 if eps is None else eps)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        parts = [layout.rows(part, kept, size) for part in (inputs, outputs, mean.detach(), deviation.detach())]
        owners = parts[0].owners
        values = [part.values if owners is None else part.values[:, None] for part in parts]
        gains, biases = affine_sums(*values)
        return _note(w, b, *(Rows(sums[:, None] if owners is None else sums, owners) for sums in (gains, biases)))

    return capture.tap(output, x, note, w, b)


@gradient_rule(functional.group_norm)
def group_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation over groups of channels."""
    x, groups, weight, bias, eps = named(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    layout = capture.apart(x, x.ndim - 1)
    if layout is None or not capture.is_constant(weight, bias):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    note = partial(_note_channels, capture.size, layout, w, b)
    images = x.contiguous() if x.ndim > 2 else x[..., None].contiguous()
    output = autograd.group_norm(images, weight, bias, groups, 1e-5 if eps is None else eps, note, roots_of(w, b))
    return output if x.ndim > 2 else output[..., 0]


@gradient_rule(functional.batch_norm)
def batch_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation with running statistics; those of the batch join its examples."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, _, eps = named(names, args, kwargs)
    layout = capture.apart(x, x.ndim - 1)
    if training or layout is None or not capture.is_constant(weight, bias, mean, variance):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    eps = 1e-5 if eps is None else eps
    fixed = [None if affine is None else affine.detach() for affine in (weight, bias)]
    output = func(x, mean, variance, *fixed, False, 0.0, eps)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        products, sums = channel_sums(inputs, outputs)
        gains = (products - mean * sums) * (variance + eps).rsqrt()
        return _note_channels(capture.size, layout, w, b, gains, sums)

    return capture.tap(output, x, note, w, b)


@gradient_rule(torch.instance_norm, functional.instance_norm)
def instance_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation of every channel by itself."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    x, mean, variance, weight, bias, of_input, momentum, eps = named(names, args, kwargs)
    of_input, momentum, eps = (
        of_input is None or of_input,
        0.1 if momentum is None else momentum,
        1e-5 if eps is None else eps,
    )
    with capture:
        result = functional.instance_norm(x, mean, variance, None, None, of_input, momentum, eps)
        shape = (-1, *(1,) * (x.ndim - 2))
        result = result if weight is None else result * weight.reshape(shape)
        return (result if bias is None else result + bias.reshape(shape)).to(x.dtype)


@gradient_rule(functional.rms_norm)
def rms_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A gain after a normalisation."""
    x, shape, weight, eps = named(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    with capture:
        return (functional.rms_norm(x, shape, None, eps) * weight).to(x.dtype)


def _note_channels(
    size: int, layout: Apart, w: Tracked | None, b: Tracked | None, gains: Tensor, biases: Tensor
) -> list[Tensor | None]:
    """Sums by image, shape (N, channels)."""
    return _note(w, b, *(layout.rows(sums, 1, size) for sums in (gains, biases)))


def _note(w: Tracked | None, b: Tracked | None, gains: Rows, biases: Rows) -> list[Tensor | None]:
    return [
        affine.note(per_example(affine.views, sums)) for affine, sums in ((w, gains), (b, biases)) if affine is not None
    ]

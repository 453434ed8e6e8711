"""What each function of PyTorch does with parameters: how to compute it, and what to note of their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise import taps
from noetherflow.noise.capture import Capture, Rule
from noetherflow.noise.kernels import affine_sums, channel_sums
from noetherflow.noise.modes import own_code
from noetherflow.noise.tracked import Tracked, roots_of
from noetherflow.noise.uses import Convolution, Outer, Rows, Whole

RULES: dict[Any, Rule] = {}


def rule_for(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@rule_for(functional.linear)
def linear(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens times a matrix, and a bias."""
    return _linear(capture, *(_named(("input", "weight", "bias"), args, kwargs) if kwargs else args))


@rule_for(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens times a matrix, the other way round."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    return _linear(capture, args[0], args[1], None, transposed=True)


@rule_for(torch.addmm, Tensor.addmm)
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
    capture: Capture, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Any:
    w, b = capture.tracked(weight), capture.tracked(bias)
    if capture.tracked(x) or weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        return NotImplemented
    layout = capture.layout
    if not layout.fits(x) or not _are_known(capture, weight, bias):
        return NotImplemented
    x, weight = _autocast(x), _autocast(weight)
    bias = None if bias is None else _autocast(bias)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        g, found = layout.examples_first(outputs), []
        if w is not None:
            tokens = layout.examples_first(inputs)
            found.append(w.note(Outer(w.views, g, tokens) if transposed else Outer(w.views, tokens, g)))
        if b is not None:
            found.append(b.note(Whole(b.views, g.sum(1) if g.shape[1] > 1 else g[:, 0])))
        return found

    weight = weight.t() if transposed else weight
    return taps.linear(x, weight, bias, note, roots_of(w, b))


@rule_for(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Convolutions of one to three dimensions, in groups or not."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _named(names, args, kwargs)
    space = weight.ndim - 2
    stride, dilation = _each(stride, 1, space), _each(dilation, 1, space)
    groups = 1 if groups is None else groups
    if capture.tracked(x) or x.ndim != space + 2 or x.shape[0] != capture.size or not _are_known(capture, weight, bias):
        return NotImplemented
    if isinstance(padding, str):
        widths = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(width % 2 for width in widths):
            return NotImplemented
        padding = [width // 2 for width in widths]
    else:
        padding = _each(padding, 0, space)
    w, b = capture.tracked(weight), capture.tracked(bias)
    output = func(x, weight.detach(), None if bias is None else bias.detach(), stride, padding, dilation, groups)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        found = []
        if w is not None:
            images = inputs.to(outputs.dtype)
            steps = (stride, padding, dilation)
            found.append(w.note(Convolution(w.views, images, outputs, *steps, groups, weight.shape[2:])))
        if b is not None:
            found.append(b.note(Whole(b.views, outputs.flatten(2).sum(2))))
        return found

    return capture.tap(output, x, note, *_present(w, b))


@rule_for(functional.embedding)
def embedding(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    ids, weight, padding, most, _, by_frequency, sparse = _named(names, args, kwargs)
    table = capture.tracked(weight)
    if table is None or most is not None or by_frequency or sparse or ids.shape[0] % capture.size:
        return NotImplemented
    padding = None if padding is None else padding % len(weight)

    def note(tokens: Tensor, outputs: Tensor) -> list[Tensor | None]:
        ids = tokens.reshape(capture.size, -1)
        outputs = outputs.reshape(capture.size, ids.shape[1], -1)
        if padding is not None:
            outputs = outputs.masked_fill((ids == padding)[..., None], 0.0)
        return [table.note(Rows(table.views, ids, outputs))]

    # Indexing makes a tensor of its own, functional.embedding a view.
    return capture.tap(weight.detach()[ids], ids, note, table)


@rule_for(functional.layer_norm)
def layer_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation over the last dimensions."""
    x, shape, weight, bias, eps = _named(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    kept, layout = len(shape), capture.layout
    if capture.tracked(x) or not layout.fits(x, kept) or not _are_known(capture, weight, bias):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    fixed = [None if one is None else one.detach() for one in (weight, bias)]
    eps = 1e-5 if eps is None else eps
    output, mean, deviation = torch.native_layer_norm(x, shape, fixed[0], fixed[1], eps)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        parts = (inputs, outputs, mean.detach(), deviation.detach())
        x, g, m, r = (layout.examples_first(one, kept) for one in parts)
        return _note_affine(w, b, *affine_sums(x, g, m, r))

    return capture.tap(output, x, note, *_present(w, b))


@rule_for(functional.group_norm)
def group_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation over groups of channels."""
    x, groups, weight, bias, eps = _named(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    if capture.tracked(x) or x.shape[0] != capture.size or not _are_known(capture, weight, bias):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    roots, eps = roots_of(w, b), 1e-5 if eps is None else eps
    return taps.group_norm(x.contiguous(), weight, bias, groups, eps, partial(_note_affine, w, b), roots)


@rule_for(functional.batch_norm)
def batch_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gain and bias after a normalisation with running statistics; with those of the batch there is no such rule."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, variance, weight, bias, training, _, eps = _named(names, args, kwargs)
    if training or capture.tracked(x) or x.shape[0] != capture.size or not _are_known(capture, weight, bias):
        return NotImplemented
    w, b = capture.tracked(weight), capture.tracked(bias)
    eps = 1e-5 if eps is None else eps
    fixed = [None if one is None else one.detach() for one in (weight, bias)]
    output = func(x, mean, variance, *fixed, False, 0.0, eps)

    def note(inputs: Tensor, outputs: Tensor) -> list[Tensor | None]:
        products, sums = channel_sums(inputs, outputs)
        return _note_affine(w, b, (products - mean * sums) * (variance + eps).rsqrt(), sums)

    return capture.tap(output, x, note, *_present(w, b))


def _note_affine(w: Tracked | None, b: Tracked | None, gains: Tensor, biases: Tensor) -> list[Tensor | None]:
    return [one.note(Whole(one.views, found)) for one, found in ((w, gains), (b, biases)) if one is not None]


@rule_for(functional.rms_norm)
def rms_norm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A gain after a normalisation."""
    x, shape, weight, eps = _named(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    return elementwise(capture, torch.mul, (func(x, shape, None, eps), weight), {})


@rule_for(functional.prelu, torch.prelu)
def prelu(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A slope for negative inputs, of each channel or of all."""
    x, weight = _named(("input", "weight"), args, kwargs)
    slope = capture.tracked(weight)
    if slope is None or x.shape[0] != capture.size:
        return NotImplemented
    lengths = (len(weight), *(1,) * (x.ndim - 2)) if x.ndim > 1 else (1,)
    spread = capture.spread(slope, (capture.size, len(weight)))
    return torch.where(x > 0, x, spread.reshape(capture.size, *lengths) * x)


def elementwise(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function of single entries: a parameter that is broadcast over examples is expanded over them first."""
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    ndim = max(one.ndim for one in tensors)
    leading = {one.shape[0] for one in tensors if one.ndim == ndim and not capture.tracked(one)} - {1}
    (length,) = leading if len(leading) == 1 else (0,)
    if not length or length % capture.size or (capture.tracked(args[0]) and func in _IN_PLACE):
        return NotImplemented
    folded = length != capture.size

    def put(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        tracked = capture.tracked(one)
        if tracked is None:
            whole = folded and one.ndim == ndim and one.shape[0] == length
            return one.unflatten(0, (capture.size, -1)) if whole else one
        shape = (1,) * (ndim + folded - one.ndim) + tuple(one.shape)
        if shape[0] != 1:
            raise _CannotSpreadError
        return capture.spread(tracked, (capture.size, *shape[1:]))

    try:
        found = func(*map(put, args), **{name: put(one) for name, one in kwargs.items()})
    except _CannotSpreadError:
        return NotImplemented
    return found.flatten(0, 1) if folded else found


class _CannotSpreadError(Exception):
    """A parameter has a dimension where examples should be."""


_NAMES = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "rsub", "pow", "maximum", "minimum",
    "where", "lerp", "addcmul", "addcdiv", "atan2", "hypot", "copysign",
)  # fmt: skip
_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow")
_IN_PLACE = {getattr(Tensor, f"__i{name}__") for name in ("add", "sub", "mul", "truediv")}
rule_for(
    *(getattr(torch, name) for name in _NAMES if hasattr(torch, name)),
    *(getattr(Tensor, name) for name in _NAMES if hasattr(Tensor, name)),
    *(getattr(Tensor, f"__{name}__") for name in _OPERATORS),
    *_IN_PLACE,
)(elementwise)


@rule_for(functional.multi_head_attention_forward)
def attention(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`nn.MultiheadAttention`, which puts tokens before examples: its own code, seen call by call."""
    with capture.batch_second():
        return _ATTENTION(*args, **kwargs)


_ATTENTION = own_code(functional.multi_head_attention_forward)


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of a function's signature; None where nothing was given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _each(value: Any, default: int, count: int) -> list[int]:
    value = default if value is None else value
    return list(value) * (count if len(value) == 1 else 1) if isinstance(value, (tuple, list)) else [value] * count


def _are_known(capture: Capture, *tensors: Tensor | None) -> bool:
    """Whether tensors are parameters, or constants."""
    for one in tensors:
        if one is not None and (capture.is_data(one) or (one.requires_grad and not capture.tracked(one))):
            return False
    return True


def _present(*tracked: Tracked | None) -> list[Tracked]:
    return [one for one in tracked if one is not None]

"""A small network around every operation that has an exponent rule, and the number of its symmetries.

`CASES` maps the key of a rule to variants by name: arguments, overloads, and twins in which the operation breaks what
another variant has. Every number of symmetries is counted by hand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, Any, Any]
Function = Callable[..., Tensor]


class RuleCase(NamedTuple):
    """A network with a loss per example and a batch, and how many independent symmetric generators it has.

    Attributes:
        count: The number of symmetries of the finder.
        build: Makes the model, the loss and the batch.
        missing: How many more the null space of gradients has.
        reason: Why there is a difference.
        coupled: Whether the loss of an example depends on other examples, so that no noise is measured.
        random: Whether the loss is random, so that no noise is measured.
        dtype: The type of the proof of an operation that PyTorch has not in float64, so that no null space is computed.
    """

    count: int
    build: Callable[[], Built]
    missing: int = 0
    reason: str = ""
    coupled: bool = False
    random: bool = False
    dtype: torch.dtype | None = None


class Written(nn.Module):
    """A forward pass written as a function of the model and a batch of inputs."""

    def __init__(self, function: Function, parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared errors, one number per example."""
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(1)


def problem(model: nn.Module, inputs: Tensor) -> Built:
    """A regression to random numbers of the shape of the outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        shape = model(inputs).shape
    return model, squares, (inputs, torch.randn(shape, generator=generator))


def numbers(*shape: int, count: int = 4) -> Tensor:
    """Random inputs of a shape, one per example."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def indices(*shape: int, below: int = 3, count: int = 4) -> Tensor:
    """Random indices, one tensor per example."""
    return torch.randint(below, (count, *shape), generator=torch.Generator().manual_seed(1))


def written(function: Function, inputs: Tensor, **parts: Callable[[], Any]) -> Callable[[], Built]:
    """A model with parts, and its forward pass."""
    return lambda: problem(Written(function, {name: make() for name, make in parts.items()}).eval(), inputs)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Callable[[], nn.Module]:
    return partial(nn.Linear, inputs, outputs, bias=bias)


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def units(function: Function, hidden: int = 3, out: int | None = None) -> Callable[[], Built]:
    """A function of hidden units, shape (B, hidden), between two linear maps."""
    return written(
        lambda model, x: model.last(function(model.first(x))),
        numbers(2),
        first=linear(2, hidden),
        last=linear(hidden if out is None else out, 2),
    )


def tokens(function: Function, out: int = 3, length: int = 3, hidden: int = 3) -> Callable[[], Built]:
    """A function of tokens, shape (B, length, hidden), between a linear map of each token and one of all results."""
    return written(
        lambda model, x: model.last(function(model.first(x)).flatten(1)),
        numbers(length, 2),
        first=linear(2, hidden, bias=False),
        last=linear(out, 2, bias=False),
    )


def branches(function: Function, hidden: int = 3, out: int | None = None) -> Callable[[], Built]:
    """A function of two layers of hidden units, before a linear map."""
    return written(
        lambda model, x: model.last(function(model.left(x), model.right(x))),
        numbers(2),
        left=linear(2, hidden),
        right=linear(2, hidden),
        last=linear(hidden if out is None else out, 2),
    )


def with_parameter(function: Function, *shape: int, hidden: int = 3) -> Callable[[], Built]:
    """A function of hidden units and a parameter, between two linear maps."""
    return written(
        lambda model, x: model.last(function(model.first(x), model.p)),
        numbers(2),
        first=linear(2, hidden),
        p=parameter(*shape),
        last=linear(hidden, 2),
    )


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def channels(function: Function, dims: int, size: int = 4, out: int = 2) -> Callable[[], Built]:
    """A function of pictures with two channels, between two convolutions with a kernel of a single entry."""
    convolution = _CONVOLUTIONS[dims]
    return written(
        lambda model, x: model.last(function(model.first(x))),
        numbers(1, *(size,) * dims),
        first=lambda: convolution(1, 2, 1),
        last=lambda: convolution(out, 2, 1),
    )


def filtered(dims: int, size: int, make: Callable[[], nn.Module]) -> Callable[[], Built]:
    """A convolution with a kernel of a single entry, and then another convolution."""
    return written(
        lambda model, x: model.last(model.first(x)),
        numbers(1, *(size,) * dims),
        first=lambda: _CONVOLUTIONS[dims](1, 2, 1),
        last=make,
    )


def attention(function: Function, heads: int = 1, groups: int = 1) -> Callable[[], Built]:
    """Attention with heads of size 2: `function(q, k, v)` of shapes (B, heads or groups, T, 2)."""

    def forward(model: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (model.q, model.k, model.v))
        return model.o(function(q, k, v).transpose(1, 2).flatten(2))

    return written(
        forward,
        numbers(3, 2),
        q=linear(2, 2 * heads, bias=False),
        k=linear(2, 2 * groups, bias=False),
        v=linear(2, 2 * groups, bias=False),
        o=linear(2 * heads, 2, bias=False),
    )


def table(function: Function, *shape: int, rows: int = 4, below: int = 3) -> Callable[[], Built]:
    """A function of indices and a table of 3 columns, before a linear map."""
    return written(
        lambda model, x: model.last(function(x, model.table)),
        indices(*shape, below=below),
        table=parameter(rows, 3),
        last=linear(3, 2),
    )


_REORDERED = "rows of one tensor and columns of the other stand in another order, which no pair of axes describes"
_JUMP = "gradients do not see where the loss jumps"
CASES: dict[str, dict[str, RuleCase]] = {}


def case(keys: str, name: str, count: int, build: Callable[[], Built], **options: Any) -> None:
    """Add a variant to one key or more, given without `aten::`."""
    for key in keys.split():
        variants = CASES.setdefault(key if "::" in key else f"aten::{key}", {})
        assert name not in variants, (key, name)
        variants[name] = RuleCase(count, build, **options)


def _conjugates(z: Tensor) -> Tensor:
    return z.conj().resolve_conj() + 2 * torch.conj_physical(z) + z.conj()


def _with_part(x: Tensor, row: Tensor) -> Tensor:
    x = x.clone()
    x[:, :1] = row
    return x


def _put(x: Tensor, value: float, *where: Any) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


def _moved_norm() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    norm.running_mean += torch.tensor([0.5, -0.3, 0.2])
    return norm


def _experts(product: Function) -> Function:
    """Two layers of two experts: examples are sorted by expert, multiplied group by group, and put back."""

    def forward(model: Any, x: Tensor) -> Tensor:
        expert = (x[:, 0] > 0).long()
        order = expert.argsort(stable=True)
        offsets = torch.stack([(expert == 0).sum(), (expert >= 0).sum()]).int()
        hidden = product(x[order], model.a, offsets).relu()
        return product(hidden, model.b, offsets)[order.argsort()]

    return forward


def _fallback(x: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401  registers the operation

    return torch.ops.transformers.grouped_mm_fallback(x, stack, offs=offsets)


def _grid(x: Tensor, dims: int) -> Tensor:
    return (
        torch.linspace(-1, 1, 2**dims * dims).to(x).reshape(1, *(2,) * dims, dims).expand(len(x), *(-1,) * (dims + 1))
    )


# Sums of products.
case("mm", "two matrices", 6, written(lambda m, x: x.mm(m.a).mm(m.b), numbers(2), a=parameter(2, 3), b=parameter(3, 2)))
case("matmul", "tokens", 6, written(lambda m, x: x @ m.a @ m.b, numbers(3, 2), a=parameter(2, 3), b=parameter(3, 2)))
case(
    "matmul", "a vector", 1, written(lambda m, x: (x @ m.a)[:, None] * m.b, numbers(2), a=parameter(2), b=parameter(2))
)
case("bmm", "a stack of matrices", 6, written(
    lambda m, x: torch.bmm(torch.bmm(x.expand(2, -1, -1), m.a), m.b).transpose(0, 1).flatten(1),
    numbers(2), a=parameter(2, 2, 2), b=parameter(2, 2, 2)))  # fmt: skip
case("mv", "a vector", 1, written(lambda m, x: x.mv(m.a)[:, None] * m.b, numbers(2), a=parameter(2), b=parameter(2)))
case("dot", "two vectors", 6, written(lambda m, x: x * m.a.dot(m.b), numbers(2), a=parameter(3), b=parameter(3)),
     missing=3, reason="entries of a vector that are mixed with those of another are along no axis")  # fmt: skip
case("linear", "with biases", 6, units(lambda x: x))
case("linear", "without biases", 6, tokens(lambda x: x, 9))
_ADDED = {"a": parameter(2, 3), "b": parameter(3), "c": parameter(3, 2)}
case("addmm", "a bias", 6, written(lambda m, x: torch.addmm(m.b, x, m.a, beta=2, alpha=3) @ m.c, numbers(2), **_ADDED))
case("addmm", "a bias that does not count", 6, written(
    lambda m, x: torch.addmm(torch.ones(3).to(x), x, m.a, beta=0) @ m.c, numbers(2), **_ADDED))  # fmt: skip
case(
    "addmm",
    "a fixed bias",
    0,
    written(lambda m, x: torch.addmm(torch.ones(3).to(x), x, m.a).relu() @ m.c, numbers(2), **_ADDED),
)
_STACKED = {"a": parameter(2, 2, 2), "b": parameter(2, 1, 2), "c": parameter(2, 2, 2)}
case("baddbmm", "a bias", 6, written(
    lambda m, x: torch.baddbmm(m.b, x.expand(2, -1, -1), m.a).bmm(m.c).transpose(0, 1).flatten(1),
    numbers(2), **_STACKED))  # fmt: skip
case("baddbmm", "a bias that does not count", 6, written(
    lambda m, x: torch.baddbmm(m.b, x.expand(2, -1, -1), m.a, beta=0).bmm(m.c).transpose(0, 1).flatten(1),
    numbers(2), **_STACKED))  # fmt: skip
case("addmv", "a bias", 1, written(
    lambda m, x: torch.addmv(m.c, x, m.p, alpha=2)[:, None] * m.q, numbers(2),
        p=parameter(2), q=parameter(2), c=parameter(1)))  # fmt: skip
case("bilinear", "two maps before", 6, written(
    lambda m, x: m.map(m.left(x), m.right(x)), numbers(2),
    left=linear(2, 2, bias=False), right=linear(2, 2, bias=False), map=lambda: nn.Bilinear(2, 2, 2)))  # fmt: skip
for _spec, _count in {
    "bi,ih,ho->bo": 6, "...i,ih,ho->...o": 6, "bi,ih,ho": 6, "bi,ih,oh->ob": 6,
}.items():  # fmt: skip
    _shape = (2, 3) if _spec.endswith("ob") else (3, 2)
    case("einsum", _spec, _count, written(
        lambda m, x, spec=_spec: torch.einsum(spec, x, m.a, m.b).reshape(len(x), 2) if "ob" not in spec
        else torch.einsum(spec, x, m.a, m.b).T, numbers(2), a=parameter(2, 3), b=parameter(*_shape)))  # fmt: skip
case("einsum", "a diagonal of numbers between", 3, written(
    lambda m, x: torch.einsum("bi,ih,h,ho->bo", x, m.a, torch.tensor([1.0, 2.0, 3.0]).to(x), m.b),
    numbers(2), a=parameter(2, 3), b=parameter(3, 2)))  # fmt: skip
case("einsum", "the diagonal of a matrix", 3, written(
    lambda m, x: torch.einsum("bhh,ho->bo", (x @ m.a)[:, None, :] * torch.tril(torch.ones(3, 3)).to(x), m.b),
    numbers(2), a=parameter(2, 3), b=parameter(3, 2)),
    missing=3, reason="entries of a diagonal are not mixed")  # fmt: skip
_sdpa = functional.scaled_dot_product_attention
case("scaled_dot_product_attention", "a head", 6, attention(lambda q, k, v: _sdpa(q, k, v, is_causal=True)))
case("scaled_dot_product_attention", "two heads", 12, attention(_sdpa, 2, 2))
case("scaled_dot_product_attention", "queries in groups", 12, attention(
    lambda q, k, v: _sdpa(q, k, v, enable_gqa=True), 4, 2))  # fmt: skip
case("scaled_dot_product_attention", "a mask", 6, attention(
    lambda q, k, v: _sdpa(q, k, v, torch.ones(3, 3, dtype=torch.bool).tril(), scale=0.5)))  # fmt: skip
case("scaled_dot_product_attention", "keys that are also values", 0, attention(
    lambda q, k, v: _sdpa(q.relu(), k.relu().cos(), v.tanh())))  # fmt: skip

# Complex numbers. Pairs of hidden units are real and imaginary parts.
_pairs = lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # noqa: E731
case("view_as_complex", "absolute values", 2, units(lambda x: _pairs(x).abs(), 4, 2))
case("view_as_complex", "a sigmoid", 0, units(lambda x: _pairs(x).abs().sigmoid(), 4, 2))
case("view_as_real", "squares", 2, units(lambda x: torch.view_as_real(_pairs(x) * _pairs(x).abs()).flatten(1), 4))
case(
    "complex", "both parts", 3, branches(lambda a, b: torch.complex(a, b).real.relu() + torch.complex(a, b).imag.relu())
)
case("_conj _conj_physical", "both parts", 3, branches(lambda a, b: _conjugates(torch.complex(a, b)).abs()))
case("polar", "fixed angles", 3, units(lambda x: torch.polar(x.abs(), torch.tensor([1.0, 2.0, 3.0]).to(x)).real))
case("polar", "angles that scale", 0, units(lambda x: torch.polar(torch.ones_like(x), x).real))
case("_fft_r2c", "along tokens", 3, tokens(lambda x: torch.fft.rfft(x, dim=1).abs(), 6))
case(
    "_fft_c2c", "along tokens", 3, tokens(lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1).abs() + 0j, dim=1).abs(), 9)
)
case("_fft_c2r", "there and back", 3, tokens(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=3, dim=1).abs(), 9))
case("_fft_c2c", "along units", 1, tokens(lambda x: torch.fft.fft(_pairs(x.relu().repeat(1, 1, 2)), dim=2).abs(), 9))

# Convolutions: channels of the first are contracted by the second.
for _dims in (1, 2, 3):
    _kind = _CONVOLUTIONS[_dims]
    _back = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[_dims]
    case(f"conv{_dims}d", "two channels", 3, filtered(_dims, 2, lambda kind=_kind: kind(2, 2, 2)))
    case(f"conv{_dims}d", "in groups", 2, filtered(_dims, 3, lambda kind=_kind: kind(2, 2, 2, groups=2, dilation=2)))
    case(f"conv_transpose{_dims}d", "two channels", 3, filtered(_dims, 2, lambda kind=_back: kind(2, 2, 2)))
    case(f"conv_transpose{_dims}d", "in groups", 2, filtered(
        _dims, 2, lambda kind=_back: kind(2, 2, 2, groups=2, dilation=2, stride=2)))  # fmt: skip
case("conv1d", "padded as it was", 3, filtered(1, 3, lambda: nn.Conv1d(2, 2, 3, padding="same")))
case("conv1d", "of zeros", 3, channels(
    lambda x: x + functional.conv1d(torch.zeros_like(x), x.new_ones(2, 2, 1)).mul(x), 1))  # fmt: skip
case("conv1d", "a sigmoid between", 0, channels(torch.sigmoid, 1))
case("convolution", "channels in groups", 2, written(
    lambda m, x: torch.convolution(torch.convolution(x, m.a, m.c, [1], [0], [1], False, [0], 1),
                                   m.b, None, [1], [0], [1], False, [0], 2),
    numbers(1, 3), a=parameter(2, 1, 1), b=parameter(2, 1, 2), c=parameter(2)))  # fmt: skip
case("convolution", "transposed", 3, written(
    lambda m, x: torch.convolution(torch.convolution(x, m.a, m.c, [1], [0], [1], False, [0], 1),
                                   m.b, None, [1], [0], [1], True, [0], 1),
    numbers(1, 3), a=parameter(2, 1, 1), b=parameter(2, 2, 2), c=parameter(2)))  # fmt: skip

# Functions of entries.
case("clone", "copied", 6, units(torch.clone))
case("alias", "renamed", 6, units(torch.ops.aten.alias.default))
case("neg", "negative", 6, units(torch.neg))
case(
    "tril",
    "of a parameter",
    3,
    written(lambda m, x: m.last(x @ m.p.tril()), numbers(3), p=parameter(3, 3), last=linear(3, 2)),
)
case(
    "triu",
    "of a parameter",
    3,
    written(lambda m, x: m.last(x @ m.p.triu()), numbers(3), p=parameter(3, 3), last=linear(3, 2)),
)
case("relu", "a layer", 3, units(torch.relu))
case("leaky_relu", "a layer", 3, units(lambda x: functional.leaky_relu(x, 0.2)))
case("abs", "a layer", 3, units(torch.abs))
case("sign sgn", "of a branch", 3, branches(lambda a, b: a.sign() * b.sgn().abs() * b))
case("isnan", "masked", 3, units(lambda x: x.relu().masked_fill(x.isnan(), 0)))
case("isinf", "masked", 3, units(lambda x: x.relu().masked_fill(x.isinf(), 0)))
_NOT_HOMOGENEOUS = {
    "gelu": functional.gelu, "silu": functional.silu, "elu": functional.elu, "celu": functional.celu,
    "mish": functional.mish, "softplus": functional.softplus, "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid, "hardtanh": functional.hardtanh,
    "log_sigmoid_forward": functional.logsigmoid, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "exp": lambda x: (x / 4).exp(), "log": lambda x: (x.abs() + 1).log(), "erf": torch.erf, "sin": torch.sin,
    "cos": torch.cos, "log_softmax": lambda x: x.log_softmax(-1), "softmax": lambda x: x.softmax(-1),
    "cumprod": lambda x: x.cumprod(-1),
}  # fmt: skip
for _key, _function in _NOT_HOMOGENEOUS.items():
    if _key != "cumprod":
        case(_key, "a layer", 0, units(_function))
for _key, _function in {"round": torch.round, "floor": torch.floor}.items():
    case(_key, "a layer", 0, units(lambda x, f=_function: f(4 * x) + x.relu()))
case("softmax", "scores of attention", 6, attention(lambda q, k, v: (q @ k.mT).softmax(-1) @ v))
case("detach", "of a branch", 3, branches(lambda a, b: a.detach().relu() * b.relu()))
case("_to_copy", "to numbers of more digits", 3, units(lambda x: x.relu().double().to(x.dtype)))
case("_to_copy", "to whole numbers", 3, branches(lambda a, b: (4 * a).int() * b.relu()))
case("_to_copy", "to truth values", 3, branches(lambda a, b: a.bool() * b.abs()))
case("copy", "in place", 3, units(lambda x: torch.zeros_like(x).copy_(x.relu())))
case("copy", "a fixed row over a part", 2, units(lambda x: _with_part(x.relu(), torch.zeros(1).to(x))))
case("add", "branches", 6, branches(lambda a, b: torch.add(a, b, alpha=2)))
case("add", "zero", 6, units(lambda x: x + 0))
case("add", "one", 0, units(lambda x: torch.relu(x) + 1))
case("add", "one times zero", 0, units(lambda x: torch.add(torch.relu(x), 1.0, alpha=0)), missing=3,
     reason="a number that is added is not multiplied by alpha first")  # fmt: skip
case("add", "a bias", 3, with_parameter(lambda x, p: torch.relu(x) + p, 3))
case("add", "numbers of the batch", 0, written(
    lambda m, x: m.last(m.first(x).relu() + x.sum(1, keepdim=True)), numbers(2), first=linear(2, 3),
        last=linear(3, 2)))  # fmt: skip
case("sub", "branches", 6, branches(torch.sub))
case("sub", "one", 0, units(lambda x: x.relu() - 1))
case("rsub", "branches", 6, branches(lambda a, b: torch.rsub(a, b, alpha=2)))
case("rsub", "from one", 0, units(lambda x: 1 - x.relu()))
case("mul", "branches", 6, branches(torch.mul))
case("mul", "a number", 6, units(lambda x: 2 * x))
case("mul", "a number for each unit", 3, units(lambda x: x * torch.tensor([1.0, 2.0, 3.0]).to(x)))
case("mul", "a gain", 6, with_parameter(lambda x, p: x.abs() * p, 3))
case("div", "branches", 3, branches(lambda a, b: a / (1 + b.square())))
case("div", "by a gain", 6, with_parameter(lambda x, p: x.abs() / p, 3))
case("div", "rounded", 0, units(lambda x: torch.div(4 * x, 2, rounding_mode="floor") + x.relu()))
case("sqrt", "a layer", 3, units(lambda x: x.abs().sqrt()))
case("rsqrt", "a layer", 3, units(lambda x: x.abs().rsqrt()))
case("reciprocal", "a gain", 6, with_parameter(lambda x, p: x.abs() * p.reciprocal(), 3))
case("pow", "cubes", 3, units(lambda x: x**3))
case("pow", "roots", 3, units(lambda x: x.abs() ** 1.5))
case("pow", "of a number", 0, units(lambda x: 2.0**x))
case("pow", "learnt exponents", 0, with_parameter(lambda x, p: x.abs() ** p.abs(), 3))
case("maximum minimum", "branches", 3, branches(lambda a, b: torch.maximum(a, b) + torch.minimum(a, 2 * b)))
case(
    "maximum minimum",
    "one",
    0,
    units(lambda x: torch.minimum(torch.maximum(x, -torch.ones_like(x)), torch.ones_like(x))),
)
case("atan2", "branches", 3, branches(torch.atan2))
case("atan2", "halves", 2, units(lambda x: torch.atan2(x[:, :2], x[:, 2:]), 4, 2))
case("atan2", "one for all", 1, units(lambda x: torch.atan2(x, x[:, :1])))
case("atan2", "above zero", 3, units(lambda x: torch.atan2(x, torch.zeros_like(x)) * x))
case("atan2", "beside a linear map", 3, branches(lambda a, b: torch.cat([a, b, torch.atan2(a, b)], 1), 3, 9))
case("atan2", "above one", 0, units(lambda x: torch.atan2(x, torch.ones_like(x))))
case("gt ge lt le", "branches", 3, branches(
    lambda a, b: torch.where(a > b, a, 0.1 * b) + torch.where(a >= b, a, 0.2 * b) + torch.where(a < b, 0.3 * a, b)
    + torch.where(a <= b, a, 0.1 * b)))  # fmt: skip
case("gt ge lt le", "one", 0, units(
    lambda x: (x > 1) * x + (x >= 1) * x.relu() + (x < 1) * x.abs() + (x <= 1) * x), missing=3,
        reason=_JUMP)  # fmt: skip
case("eq ne", "zero", 3, units(lambda x: torch.where(x == 0, 0.0, x.abs()) + torch.where(x != 0, x, 0.0)))
case("where", "zero", 3, units(lambda x: torch.where(x > 0, x, 0.1 * x)))
case("where", "a number", 0, units(lambda x: torch.where(x > 0, x, 1.0)))
case("where", "zeros by a fixed mask", 3, units(
    lambda x: torch.where(torch.tensor([True, False, True]), x.abs(), 0.0) + x))  # fmt: skip
case("where", "other units by the batch", 3, written(
    lambda m, x: m.last(torch.where(x[:, :1] > torch.tensor([0.0, 0.5, -0.5]).to(x), m.first(x), 0.0)),
    numbers(2), first=linear(2, 3), last=linear(3, 2)))  # fmt: skip
case("where", "ones by a fixed mask", 2, units(lambda x: x.relu().masked_fill(torch.tensor([True, False, False]), 1.0)))
case("where", "a branch by a fixed mask", 3, branches(
    lambda a, b: torch.where(torch.tensor([True, False, False]), a.relu(), b.relu())))  # fmt: skip
case("where", "a condition of the batch", 3, written(
    lambda m, x: m.last(torch.where(x[:, :1] > torch.zeros(3).to(x), m.first(x), m.first(x).abs())),
    numbers(2), first=linear(2, 3), last=linear(3, 2)))  # fmt: skip
case("threshold", "a ReLU", 3, units(lambda x: functional.threshold(x, 0.0, 0.0)))
case("threshold", "one", 0, units(lambda x: functional.threshold(x, 1.0, 1.0)))
case("clamp clamp_min", "zero", 3, units(lambda x: x.clamp(min=0) + torch.clamp_min(-x, 0)))
case("clamp", "zeros of another shape", 1, units(lambda x: x.abs()[:, :1].clamp(min=torch.zeros(3).to(x)) + x.abs()))
case("clamp", "one", 0, units(lambda x: x.clamp(-1, 1)))
case("clamp_min", "one", 0, units(lambda x: x.clamp_min(1)))
case("native_dropout", "switched off", 6, units(lambda x: torch.native_dropout(x, 0.5, False)[0]))
case("prelu", "slopes of units", 3, with_parameter(functional.prelu, 3))
case("prelu", "slopes that are products", 6, written(
    lambda m, x: m.last(functional.prelu(m.first(x), m.p * m.q)),
    numbers(2), first=linear(2, 3), p=parameter(3), q=parameter(3), last=linear(3, 2)))  # fmt: skip
case("glu", "two halves", 3, units(functional.glu, 6, 3))


# Constants of the shape of a tensor.
case("zeros_like", "added", 3, units(lambda x: x.relu() + torch.zeros_like(x)))
case("ones_like", "a factor", 3, units(lambda x: x.relu() * torch.ones_like(x)))
case("ones_like", "added", 0, units(lambda x: x.relu() + torch.ones_like(x)))
case("full_like", "a factor", 3, units(lambda x: x.relu() * torch.full_like(x, 2.0)))
case("full_like", "added", 0, units(lambda x: x.relu() + torch.full_like(x, 2.0)))
case("empty_like", "filled", 3, units(lambda x: torch.empty_like(x).copy_(x.relu())))
case(
    "rand_like randn_like",
    "added",
    0,
    units(lambda x: x.relu() + torch.rand_like(x) + torch.randn_like(x)),
    random=True,
)

# Entries that only move.
_MOVES: dict[str, tuple[Function, int]] = {
    "view": (lambda x: x.view(-1, 3, 1).view(-1, 3), 3),
    "_unsafe_view": (lambda x: torch.ops.aten._unsafe_view.default(x, [len(x), 3, 1]).flatten(1), 3),
    "permute": (lambda x: x[:, None].permute(0, 2, 1).flatten(1), 3),
    "transpose": (lambda x: x[:, None].transpose(1, 2).flatten(1), 3),
    "t": (lambda x: x.t().t(), 3),
    "unsqueeze": (lambda x: x.unsqueeze(1).flatten(1), 3),
    "squeeze": (lambda x: x[:, :, None, None].squeeze().unsqueeze(1).squeeze(1), 3),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 2).flatten(1), 6),
    "slice": (lambda x: x[:, 1:], 2),
    "select": (lambda x: x[:, 1][:, None], 1),
    "flip": (lambda x: x.flip(1), 3),
    "roll": (lambda x: x.roll(1, 1), 3),
    "repeat": (lambda x: x.repeat(1, 2), 6),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), 6),
    "unfold": (lambda x: x.unfold(1, 2, 1).flatten(1), 4),
    "split": (lambda x: torch.cat(x.split(2, 1)[::-1], 1), 3),
    "split_with_sizes": (lambda x: torch.cat(x.split([1, 2], 1)[::-1], 1), 3),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), 3),
    "pixel_shuffle": (lambda x: functional.pixel_shuffle(x.repeat(1, 4)[..., None, None], 2).flatten(1), 12),
    "pixel_unshuffle": (lambda x: functional.pixel_unshuffle(x[:, None, :, None].repeat(1, 1, 2, 2), 2).flatten(1), 12),
    "channel_shuffle": (lambda x: functional.channel_shuffle(x.repeat(1, 2)[..., None], 2).flatten(1), 6),
}
_KEPT = {"slice": 2, "select": 1}
for _key, (_move, _out) in _MOVES.items():
    case(_key, "after a ReLU", _KEPT.get(_key, 3), units(lambda x, f=_move: f(x.relu()), 3, _out))
    if _out == 3:
        reordered = _key in ("flip", "roll", "split", "split_with_sizes", "unbind")
        case(_key, "between linear maps", 3 if reordered else 6, units(_move),
             missing=3 if reordered else 0, reason=_REORDERED if reordered else "")  # fmt: skip
case("view", "as bits", 0, units(lambda x: (x.view(torch.int32) > 0).sum(1, keepdim=True) + x.relu()))  # fmt: skip
case(
    "diagonal",
    "of units as a square",
    2,
    units(lambda x: x.view(-1, 2, 2).diagonal(dim1=1, dim2=2), 4, 2),
    missing=1,
    reason=_REORDERED,
)
case("diagonal", "of tokens and units", 3, tokens(lambda x: x.diagonal(dim1=1, dim2=2)))
case("roll", "of all entries", 3, tokens(lambda x: torch.stack([y.roll(1) for y in x]), 9),
     missing=3, reason="a unit of a token becomes a unit of another token")  # fmt: skip
case("repeat_interleave", "as often as a tensor says", 3, units(
    lambda x: x.relu().repeat_interleave(torch.tensor([1, 2, 1]), 1, output_size=4), 3, 4))  # fmt: skip
case("slice", "of merged tokens", 3, tokens(lambda x: x.flatten(1)[:, ::4]))

# Entries at positions that a tensor gives.
_ORDER = torch.tensor([2, 0])
case("index", "fixed positions", 2, units(lambda x: x[:, _ORDER], 3, 2), missing=1, reason=_REORDERED)
case("index", "fixed pairs of positions", 3, tokens(lambda x: x[:, [0, 1, 2], [0, 1, 2]]))
case("index", "a row that the batch chooses", 6, table(lambda x, p: p[x]))
case("index", "tokens that the batch chooses", 6, written(
    lambda m, x: m.last(m.first(x)[torch.arange(len(x)), x[:, :, 0].argmax(1)]),
    numbers(3, 2), first=linear(2, 3), last=linear(3, 2)))  # fmt: skip
case("index", "units that the batch chooses", 1, written(
    lambda m, x: m.last(m.first(x)[torch.arange(len(x)), (x[:, 0] > 0).long()][:, None]),
    numbers(2), first=linear(2, 2), last=linear(1, 2)))  # fmt: skip
case(
    "index_select", "fixed positions", 2, units(lambda x: x.index_select(1, _ORDER), 3, 2), missing=1, reason=_REORDERED
)
case("index_select", "rows that the batch chooses", 6, table(lambda x, p: p.index_select(0, x)))
case("gather", "the tokens are others for each unit", 3, tokens(
    lambda x: x.gather(1, torch.tensor([[[0, 1, 2]]]).expand(len(x), -1, -1))))  # fmt: skip
case("gather", "a token that the batch chooses", 6, written(
    lambda m, x: m.last(m.first(x).gather(1, x[:, :, :1].argmax(1, keepdim=True).expand(-1, -1, 3)).flatten(1)),
    numbers(3, 2), first=linear(2, 3), last=linear(3, 2)))  # fmt: skip
case("gather", "units that the batch chooses", 1, written(
    lambda m, x: m.last(m.first(x).gather(1, (x > 0).long())),
    numbers(2), first=linear(2, 2), last=linear(2, 2)))  # fmt: skip
case("embedding", "rows", 6, table(lambda x, p: functional.embedding(x, p)))
case("embedding", "a row for padding", 6, table(lambda x, p: functional.embedding(x + 1, p, padding_idx=0)))
case("embedding", "positions", 3, written(
    lambda m, x: m.last((m.first(x) + functional.embedding(torch.arange(2), m.p)).relu().flatten(1)),
    numbers(2, 2), first=linear(2, 3, bias=False), p=parameter(2, 3), last=linear(6, 2)))  # fmt: skip
case("embedding", "gradients by frequency", 0, table(
    lambda x, p: functional.embedding(torch.cat([x, x[:1]]), p, scale_grad_by_freq=True)[:-1]), coupled=True,
    missing=6, reason="gradients are no derivatives")  # fmt: skip
case("_embedding_bag", "sums", 6, table(lambda x, p: functional.embedding_bag(x, p, mode="sum"), 2))
case("_embedding_bag", "means", 6, table(lambda x, p: functional.embedding_bag(x, p, mode="mean"), 2))
case("_embedding_bag", "maxima", 3, table(lambda x, p: functional.embedding_bag(x, p, mode="max"), 2))
case("_embedding_bag", "weights", 6, table(
    lambda x, p: functional.embedding_bag(x, p, mode="sum", per_sample_weights=x.to(p) + 1), 2))  # fmt: skip

# Tensors out of parts.
case("cat", "branches", 6, branches(lambda a, b: torch.cat([a.relu(), b.relu()], 1), 3, 6))
case("cat", "zeros", 6, units(lambda x: torch.cat([x, torch.zeros_like(x)], 1), 3, 6))
case("cat", "ones", 3, units(lambda x: torch.cat([x.relu(), torch.ones_like(x)], 1), 3, 6))
case("stack", "branches", 6, branches(lambda a, b: torch.stack([a.relu(), b.relu()], 1).flatten(1), 3, 6))
case("slice_scatter", "zeros", 2, units(lambda x: x.relu().slice_scatter(torch.zeros_like(x[:, :1]), 1, 0, 1)))
case("slice_scatter", "another branch", 3, branches(lambda a, b: a.relu().slice_scatter(b.relu()[:, :1], 1, 1, 2)))
case("select_scatter", "zeros", 2, units(lambda x: x.relu().select_scatter(torch.zeros_like(x[:, 0]), 1, 0)))
case("select_scatter", "ones", 2, units(lambda x: x.relu().select_scatter(torch.ones_like(x[:, 0]), 1, 0)))
case("select_scatter", "zeros over a token", 6, tokens(lambda x: x.select_scatter(torch.zeros_like(x[:, 0]), 1, 0), 9))
case("diagonal_scatter", "zeros", 3, tokens(lambda x: x.diagonal_scatter(torch.zeros_like(x[:, 0]), 0, 1, 2), 9))
case("scatter", "zeros at fixed positions", 2, units(lambda x: x.relu().scatter(1, torch.zeros(len(x), 1).long(), 0.0)))
case("scatter", "a branch at fixed positions", 3, branches(
    lambda a, b: a.relu().scatter(1, torch.tensor([[2, 0]]).expand(len(a), -1), b.relu()[:, :2])))  # fmt: skip
case("scatter", "two entries in one place", 0, branches(
    lambda a, b: a.relu().scatter(1, torch.tensor([[2, 2]]).expand(len(a), -1), b.relu()[:, :2])),
    missing=3, reason="all of several writes to a place get gradients")  # fmt: skip
case("scatter", "zeros that the batch places", 3, written(
    lambda m, x: m.last(m.first(x).scatter(1, (x[:, :1] > 0).long(), 0.0)), numbers(2), first=linear(2, 3),
        last=linear(3, 2)))  # fmt: skip
case("scatter", "ones that the batch places", 0, written(
    lambda m, x: m.last(m.first(x).relu().scatter(1, (x[:, :1] > 0).long(), 1.0)), numbers(2),
        first=linear(2, 3), last=linear(3, 2)),
    missing=1, reason="positions that the batch gives may be any unit")  # fmt: skip
case("scatter_add", "at fixed positions", 3, branches(
    lambda a, b: a.relu().scatter_add(1, torch.tensor([[2, 0]]).expand(len(a), -1), b.relu()[:, :2])))  # fmt: skip
case("scatter_add", "to zeros", 2, units(
    lambda x: torch.zeros_like(x).scatter_add(1, torch.tensor([[0, 0, 2]]).expand(len(x), -1), x.relu())))  # fmt: skip
case("scatter_add", "where the batch says", 1, written(
    lambda m, x: m.last(m.first(x).relu().scatter_add(1, (x > 0).long(), m.first(x).abs())),
    numbers(2), first=linear(2, 2), last=linear(2, 2)))  # fmt: skip
case("scatter_reduce", "largest at fixed positions", 3, branches(
    lambda a, b: a.relu().scatter_reduce(1, _ORDER[None].expand(len(a), -1), b.relu()[:, :2], "amax")))  # fmt: skip
case("scatter_reduce", "products", 0, units(
    lambda x: x.scatter_reduce(1, torch.tensor([[2, 0, 2]]).expand(len(x), -1), x.abs(), "prod")),
    missing=3, reason="products of entries of different units")  # fmt: skip
case("index_put", "zeros at fixed positions", 2, units(lambda x: _put(x.relu(), 0.0, slice(None), [0])))
case("index_put", "zero at a token of a unit", 3, tokens(lambda x: _put(x, 0.0, slice(None), [0], [1]), 9),
     missing=1, reason="a matrix may mix the units of which no entry is replaced")  # fmt: skip
case("index_put", "zero at a token of a unit, before a map of tokens", 3, written(
    lambda m, x: m.last(_put(m.first(x), 0.0, slice(None), [0], [1])),
    numbers(3, 2), first=linear(2, 3), last=linear(3, 2)),
    missing=1, reason="a matrix may mix the units of which no entry is replaced")  # fmt: skip
case("index_put", "ones at fixed positions", 2, units(lambda x: _put(x.relu(), 1.0, slice(None), [0])))
case("index_put", "zeros by a mask of the batch", 6, written(
    lambda m, x: m.last(_put(m.first(x), 0.0, x[:, 0] > 0)), numbers(2), first=linear(2, 3),
        last=linear(3, 2)))  # fmt: skip
case("index_put", "ones by a mask of the batch", 0, written(
    lambda m, x: m.last(_put(m.first(x).relu(), 1.0, x[:, 0] > 0)), numbers(2), first=linear(2, 3),
        last=linear(3, 2)))  # fmt: skip
case("index_put", "zeros by a mask of the units", 3, units(lambda x: _put(x, 0.0, x < 0)))
case("index_put", "added at fixed positions", 3, branches(
    lambda a, b: a.relu().index_put((torch.arange(len(a))[:, None],
        torch.tensor([[2, 0, 2]])), b.relu(), accumulate=True)))  # fmt: skip

# Normalisations.
case("layer_norm", "gain and bias", 3, written(
    lambda m, x: m.last(m.norm(m.first(x))), numbers(2), first=linear(2, 3), norm=lambda: nn.LayerNorm(3),
        last=linear(3, 2)))  # fmt: skip
case("layer_norm", "without eps", 1, units(lambda x: functional.layer_norm(x, (3,), eps=0.0).tanh()))
case("layer_norm", "with eps", 0, units(lambda x: functional.layer_norm(x, (3,), eps=0.1)))
case(
    "native_layer_norm", "without eps", 1, units(lambda x: torch.native_layer_norm(x, (3,), None, None, 0.0)[0].tanh())
)
case("native_layer_norm", "with eps", 0, units(lambda x: torch.native_layer_norm(x, (3,), None, None, 0.1)[0].tanh()))
case("rms_norm", "a gain", 3, with_parameter(lambda x, p: functional.rms_norm(x, (3,), p, 0.1), 3))
case("rms_norm", "without eps", 1, units(lambda x: functional.rms_norm(x, (3,), None, 0.0).tanh()))
case("_fused_rms_norm", "a gain", 3, with_parameter(
    lambda x, p: torch.ops.aten._fused_rms_norm.default(x, [3], p, 0.1)[0], 3))  # fmt: skip
_group = functional.group_norm
case("group_norm", "groups without eps", 2, units(lambda x: _group(x, 2, eps=0.0).tanh(), 6))
case("group_norm", "with eps", 0, units(lambda x: _group(x, 2, eps=0.1).tanh(), 6))
case("group_norm", "a gain", 6, with_parameter(lambda x, p: _group(x, 2, p, eps=0.1), 6, hidden=6))
case("_native_batch_norm_legit_no_training", "running statistics", 3, written(
    lambda m, x: m.last(m.norm(m.first(x))), numbers(2), first=linear(2, 3), norm=_moved_norm,
        last=linear(3, 2)))  # fmt: skip
_instances = {"first": lambda: nn.Conv1d(2, 2, 1), "last": lambda: nn.Conv1d(2, 2, 1)}
for _name, _eps, _count in (("statistics of each example", 0.0, 2), ("with eps", 0.1, 0)):
    case("_native_batch_norm_legit", _name, _count, written(
        lambda m, x, eps=_eps: m.last(functional.instance_norm(m.first(x), eps=eps).tanh()),
            numbers(2, 4), **_instances))  # fmt: skip
case("_native_batch_norm_legit_functional", "statistics of the batch", 3, written(
    lambda m, x: m.last(m.norm.train()(m.first(x))), numbers(2),
    first=linear(2, 3), norm=lambda: nn.BatchNorm1d(3), last=linear(3, 2)), coupled=True)  # fmt: skip
case("_weight_norm", "a linear map", 6, written(
    lambda m, x: m.last(m.first(x).relu()), numbers(2), last=linear(3, 2),
    first=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))))  # fmt: skip
case("cosine_similarity", "a vector", 2, written(
    lambda m, x: m.last(functional.cosine_similarity(m.first(x), m.p, -1)[:, None]),
    numbers(2), first=linear(2, 3), p=parameter(3), last=linear(1, 2)))  # fmt: skip
case("cosine_similarity", "vectors of fewer dimensions", 3, written(
    lambda m, x: m.last(functional.cosine_similarity(m.first(x).unflatten(1, (2, 2)), m.p, 1)),
    numbers(2), first=linear(2, 4), p=parameter(2, 1), last=linear(2, 2)))  # fmt: skip
case("cosine_similarity", "a large eps", 0, units(
    lambda x: functional.cosine_similarity(x[:, :, None], torch.eye(3, 2).to(x), 1, 0.5), 3, 2))  # fmt: skip

# Numbers around a tensor.
case("constant_pad_nd", "zeros", 3, channels(lambda x: functional.pad(x, (1, 1)), 1))
case("constant_pad_nd", "ones", 0, channels(lambda x: functional.pad(x, (1, 1), value=1.0).relu(), 1))
case("constant_pad_nd", "zeros beside units", 3, units(lambda x: functional.pad(x.relu(), (1, 1)), 3, 5))
case("constant_pad_nd", "zeros added to a branch", 3, branches(
    lambda a, b: functional.pad(a.relu()[:, :2].flip(1), (0, 1)) + b.relu()))  # fmt: skip
case("constant_pad_nd", "units cut off", 2, units(lambda x: functional.pad(x.relu(), (-1, 1)), 3, 3))
case(
    "constant_pad_nd",
    "less than nothing of ones",
    2,
    units(lambda x: functional.pad(x.relu(), (-1, 0), value=1.0), 3, 2),
)
for _dims in (1, 2, 3):
    _pad = (1,) * 2 * _dims
    case(
        f"reflection_pad{_dims}d", "a border", 3, channels(lambda x, p=_pad: functional.pad(x, p, "reflect"), _dims, 3)
    )
    case(
        f"replication_pad{_dims}d",
        "a border",
        3,
        channels(lambda x, p=_pad: functional.pad(x, p, "replicate"), _dims, 3),
    )

# Neighbouring positions.
_LINEAR_POOLS = {
    "avg_pool": ("avg_pool", 2), "adaptive_avg_pool": ("adaptive_avg_pool", 2),
}  # fmt: skip
for _dims in (1, 2, 3):
    _average, _adaptive = (getattr(functional, f"{name}{_dims}d") for name in ("avg_pool", "adaptive_avg_pool"))
    case(f"avg_pool{_dims}d", "two channels", 3, channels(lambda x, f=_average: f(x, 2, padding=1), _dims))
    case(
        f"{'_' if _dims > 1 else ''}adaptive_avg_pool{_dims}d",
        "two channels",
        3,
        channels(lambda x, f=_adaptive: f(x, 3), _dims),
    )
    case(
        f"upsample_nearest{_dims}d",
        "two channels",
        3,
        channels(lambda x: functional.interpolate(x, scale_factor=2), _dims, 2),
    )
for _key, _dims in {"linear1d": 1, "bilinear2d": 2, "trilinear3d": 3, "bicubic2d": 2}.items():
    case(f"upsample_{_key}", "two channels", 3, channels(
        lambda x, mode=_key[:-2]: functional.interpolate(x, scale_factor=2, mode=mode), _dims, 2))  # fmt: skip
for _dims in (2, 3):
    _largest, _adaptive = (getattr(functional, f"{name}{_dims}d") for name in ("max_pool", "adaptive_max_pool"))
    case(f"max_pool{_dims}d_with_indices", "two channels", 2, channels(lambda x, f=_largest: f(x, 2, padding=1), _dims))
    case(f"adaptive_max_pool{_dims}d", "two channels", 2, channels(lambda x, f=_adaptive: f(x, 3), _dims))
case("max_pool2d_with_indices", "in one dimension", 2, channels(lambda x: functional.max_pool1d(x, 2), 1))
for _mode in ("bilinear", "bicubic"):
    case(f"_upsample_{_mode}2d_aa", "two channels", 3, channels(
        lambda x, mode=_mode: functional.interpolate(x, (3, 3), mode=mode, antialias=True), 2))  # fmt: skip
case(
    "grid_sampler_2d",
    "fixed positions",
    3,
    channels(lambda x: functional.grid_sample(x, _grid(x, 2), align_corners=False), 2),
)
case(
    "grid_sampler_3d",
    "fixed positions",
    3,
    channels(lambda x: functional.grid_sample(x, _grid(x, 3), align_corners=False), 3),
)
case("grid_sampler_2d", "positions that scale", 0, channels(
    lambda x: functional.grid_sample(
        torch.ones_like(x).cumsum(-1), x.movedim(1, 3), align_corners=False), 2))  # fmt: skip
case("im2col", "windows", 2, written(
    lambda m, x: m.last(functional.unfold(m.first(x).relu(), 2).flatten(1)),
    numbers(1, 2, 3), first=lambda: nn.Conv2d(1, 2, 1), last=linear(16, 2)))  # fmt: skip
case("col2im", "windows added up", 2, written(
    lambda m, x: m.last(functional.fold(functional.unfold(m.first(x).relu(), 2), (2, 3), 2)),
    numbers(1, 2, 3), first=lambda: nn.Conv2d(1, 2, 1), last=lambda: nn.Conv2d(2, 2, 1)))  # fmt: skip

# Along axes.
_OVER_TOKENS: dict[str, tuple[Function, int]] = {
    "sum": (lambda x: x.sum(1), 6), "mean": (lambda x: x.mean((1,)), 6), "amax": (lambda x: x.amax(1), 3),
    "amin": (lambda x: x.amin(1), 3), "max": (lambda x: x.max(1).values, 3), "min": (lambda x: x.min(1).values, 3),
    "median": (lambda x: x.median(1).values, 3), "nanmedian": (lambda x: x.nanmedian(1).values, 3),
    "kthvalue": (lambda x: x.kthvalue(2, 1).values, 3), "mode": (lambda x: x.mode(1).values, 3),
    "var": (lambda x: x.var(1), 3), "prod": (lambda x: x.prod(1), 3),
    "linalg_vector_norm": (lambda x: x.norm(dim=1), 3),
}  # fmt: skip
for _key, (_function, _count) in _OVER_TOKENS.items():
    case(_key, "of tokens", _count, tokens(_function))
    case(_key, "of all entries of an example", 1, tokens(
        lambda x, f=_function: torch.stack([f(y.reshape(1, -1, 1)) for y in x.abs()]).flatten(1), 1),
        missing=2 if _key == "prod" else 0,
        reason="the factors of a product need not scale alike" if _key == "prod" else "")  # fmt: skip
case("var", "of everything", 1, units(lambda x: torch.stack([torch.var(y[None], False) for y in x])[:, None], 3, 1))
case("max min", "of two branches", 3, branches(lambda a, b: torch.max(a, b) + torch.min(a, 2 * b)))
case("max min", "without an axis", 1, units(lambda x: torch.stack([y.max() - 2 * y.min() for y in x])[:, None], 3, 1))
case("argmax argmin", "of units", 3, branches(
    lambda a, b: b.relu() * (a.argmax(1, keepdim=True) + a.argmin(1, keepdim=True) + 1)))  # fmt: skip
for _order in (1, 3, float("inf")):
    case(
        "linalg_vector_norm", f"of order {_order}", 3, tokens(lambda x, p=_order: torch.linalg.vector_norm(x, p, dim=1))
    )
case("linalg_vector_norm", "of order 0", 3, branches(
    lambda a, b: b.relu() * torch.linalg.vector_norm(a.relu(), 0, dim=1, keepdim=True)))  # fmt: skip
case("_cdist_forward", "of units", 1, with_parameter(lambda x, p: torch.cdist(x.relu(), p)[:, :3], 3, 3))
case("_cdist_forward", "numbers of points", 0, units(lambda x: torch.cdist(x.relu(), torch.ones(3, 3).to(x))))
case("cumsum", "of tokens", 6, tokens(lambda x: x.cumsum(1), 9))
case("cumsum", "of units", 1, units(lambda x: x.relu().cumsum(1).abs()))
case("cummax cummin", "of tokens", 3, tokens(lambda x: x.cummax(1).values + 2 * x.cummin(1).values, 9))
case("sort", "of tokens", 3, tokens(lambda x: x.sort(1).values, 9))
case("sort", "of units, stable", 1, units(lambda x: x.sort(stable=True, descending=True).values),
     missing=1, reason="a multiple of the sum of all units may be added to each")  # fmt: skip
case("topk", "of tokens", 3, tokens(lambda x: x.topk(2, 1).values, 6))
case("topk", "of units", 1, units(lambda x: x.topk(2).values, 3, 2))

# Experts that the batch chooses.
case("transformers::grouped_mm_fallback", "two layers", 6, written(
    _experts(_fallback), numbers(2), a=parameter(2, 2, 3), b=parameter(2, 3, 2)))  # fmt: skip
case("_grouped_mm", "two layers", 16, written(
    _experts(lambda x, stack, offsets: torch._grouped_mm(x, stack, offs=offsets)),
    numbers(8).bfloat16(), a=lambda: nn.Parameter(torch.randn(2, 8, 8, dtype=torch.bfloat16)),
    b=lambda: nn.Parameter(torch.randn(2, 8, 8, dtype=torch.bfloat16))),
    dtype=torch.float32)  # fmt: skip

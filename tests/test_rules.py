"""Rules of single operations: the finder against null spaces, and noise against single examples."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import checks
import noetherflow as nf
import oracles
from noetherflow.detect.rules import RULES
from zoo import Call, regression, sequential

Built = tuple[nn.Module, Any, Any]


def around(function: Callable[[Tensor], Tensor], hidden: int = 3, out: int | None = None) -> Callable[[], Built]:
    """A function of hidden units, between two linear maps."""
    return lambda: sequential(
        (2,), (2,), nn.Linear(2, hidden), Call(function), nn.Linear(hidden if out is None else out, 2)
    )


def over_tokens(function: Callable[[Tensor], Tensor], tokens: int = 4) -> Callable[[], Built]:
    """The same of tokens, shape (B, T, 3), of which the function keeps one row or more."""
    return lambda: sequential(
        (tokens, 2), (2,), nn.Linear(2, 3), Call(lambda x: function(x).reshape(len(x), -1)[:, :3]), nn.Linear(3, 2)
    )


def images(*layers: Callable[[], nn.Module], size: int = 3, channels: int = 1) -> Callable[[], Built]:
    """Layers on images of `size` pixels in a row, or on squares of them; all that comes out goes into the loss."""

    def build() -> Built:
        made = nn.Sequential(*(layer() for layer in layers), nn.Flatten()).eval()
        space = (size,) * (2 if any("2d" in type(one).__name__ for one in made) else 1)
        return regression(made, (channels, *space), made(torch.zeros(1, channels, *space)).shape[1:])

    return build


class Both(nn.Module):
    """A function of two branches."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.left(x), self.right(x)))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.map = nn.Bilinear(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.left(x), self.right(x))


class Directions(nn.Module):
    """Cosine similarity of a linear map and a learnt vector."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.vector, self.out = nn.Linear(2, 3), nn.Parameter(torch.randn(3)), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.cosine_similarity(self.inner(x), self.vector, -1)[:, None])


def both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Built]:
    return lambda: regression(Both(function), (2,), (2,))


def conv(inputs: int, outputs: int, width: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(inputs, outputs, width)


def deconvolved(kind: type[nn.Module], *, groups: int = 1) -> Callable[[], Built]:
    return images(lambda: kind(1, 2, 2), nn.ReLU, lambda: kind(2, 2, 2, groups=groups))


# What the finder must find, as a number of independent symmetric generators: the null space says how many there are.
CASES: dict[str, tuple[int, Callable[[], Built]]] = {
    "abs": (3, around(torch.abs)),
    "square": (3, around(torch.square)),
    "cube": (3, around(lambda x: x**3)),
    "clamp from zero": (3, around(lambda x: x.clamp(min=0))),
    "clamp at one": (0, around(lambda x: x.clamp(-1, 1))),
    "negative": (6, around(torch.neg)),
    "doubled": (6, around(lambda x: 2 * x)),
    "rows by their own numbers": (3, around(lambda x: x * torch.tensor([1.0, 2.0, 3.0]).to(x))),
    "one added": (0, around(lambda x: torch.relu(x) + 1)),
    "subtracted from one": (0, around(lambda x: 1 - torch.relu(x))),
    "sigmoid": (0, around(torch.sigmoid)),
    "softmax": (0, around(lambda x: x.softmax(-1))),
    "exp": (0, around(lambda x: (x / 4).exp())),
    "where": (3, around(lambda x: torch.where(x > 0, x, 0.1 * x))),
    "zeros where a mask is set": (2, around(lambda x: x.masked_fill(torch.tensor([True, False, False]), 0.0).abs())),
    "glu": (3, around(lambda x: functional.glu(x), 6, 3)),
    "maximum of branches": (3, both(torch.maximum)),
    "minimum of branches": (3, both(torch.minimum)),
    "sum of branches": (6, both(torch.add)),
    "difference of branches": (6, both(torch.sub)),
    "product of branches": (6, both(torch.mul)),
    "quotient of branches": (3, both(lambda x, y: x / (1 + y.square()))),
    "sum over tokens": (6, over_tokens(lambda x: x.sum(1))),
    "mean over tokens": (6, over_tokens(lambda x: x.mean(1))),
    "largest of tokens": (3, over_tokens(lambda x: x.amax(1))),
    "largest of tokens, and where": (3, over_tokens(lambda x: x.max(1).values)),
    "smallest of tokens": (3, over_tokens(lambda x: x.amin(1))),
    "norm over tokens": (3, over_tokens(lambda x: x.norm(dim=1))),
    "variance over tokens": (3, over_tokens(lambda x: x.var(1))),
    "deviation over tokens": (3, over_tokens(lambda x: x.std(1))),
    "largest of units": (
        1,
        lambda: sequential((2,), (2,), nn.Linear(2, 3), Call(lambda x: x.amax(1, keepdim=True)), nn.Linear(1, 2)),
    ),
    "running sum": (6, over_tokens(lambda x: x.cumsum(1)[:, -1:])),
    "bilinear map": (6, lambda: regression(Bilinear(), (2,), (2,))),
    "cosine similarity": (2, lambda: regression(Directions(), (2,), (2,))),
    "transposed convolution": (2, deconvolved(nn.ConvTranspose1d)),
    "transposed convolution of squares": (2, deconvolved(nn.ConvTranspose2d)),
    "transposed convolution in groups": (2, deconvolved(nn.ConvTranspose1d, groups=2)),
    "average pooling": (2, images(conv(1, 2), nn.ReLU, lambda: nn.AvgPool1d(2), conv(2, 2))),
    "largest of a pool": (2, images(conv(1, 2), lambda: nn.MaxPool1d(2), conv(2, 2))),
    "upsampled": (2, images(conv(1, 2), nn.ReLU, lambda: nn.Upsample(scale_factor=2), conv(2, 2))),
    "padded": (2, images(conv(1, 2), nn.ReLU, lambda: nn.ZeroPad1d(1), conv(2, 2))),
    "padded with ones": (0, images(conv(1, 2), nn.ReLU, lambda: nn.ConstantPad1d(1, 1.0), conv(2, 2, 2))),
    "instance norm without eps": (2, images(
        conv(2, 2), lambda: nn.InstanceNorm1d(2, eps=0.0), nn.Tanh, conv(2, 2), channels=2)),
    "instance norm": (0, images(conv(2, 2), lambda: nn.InstanceNorm1d(2, eps=0.1), nn.ReLU, conv(2, 2), channels=2)),
    "instance norm with a gain": (2, images(
        conv(2, 2), lambda: nn.InstanceNorm1d(2, eps=0.1, affine=True), nn.ReLU, conv(2, 2), channels=2)),
    "group norm": (0, images(
        conv(2, 2), lambda: nn.GroupNorm(1, 2, eps=0.1, affine=False), nn.ReLU, conv(2, 2), channels=2)),
    "group norm without eps": (1, images(
        conv(2, 2), lambda: nn.GroupNorm(1, 2, eps=0.0, affine=False), nn.Tanh, conv(2, 2), channels=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_finder_agrees_with_null_spaces(name: str) -> None:
    expected, build = CASES[name]
    torch.manual_seed(0)
    model, loss, batch = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a candidate that the numbers refute is a rule that lets too much through
        result = nf.check_completeness(model, loss, batch)
    assert result.discovery.decided, result.discovery.gap
    assert (result.discovered, result.detected, result.missing, result.false) == (expected, expected, 0, 0)


# The loss jumps, or some units do not count, which the null space of gradients knows nothing of.
NOTHING = {
    "where, compared with one": around(lambda x: torch.where(x > 1, x, 0.1 * x)),
    "ones where a mask is set": around(lambda x: x.relu().masked_fill(torch.tensor([True, False, False]), 1.0)),
    "rounded": around(lambda x: (4 * x).round() + x.relu()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_the_finder_lets_nothing_through(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not nf.find_symmetries(*NOTHING[name]())


# How exact an exact symmetry has to be.


def nearly_homogeneous(share: float) -> Built:
    """A ReLU with a share of something that is no ReLU."""
    return around(lambda x: x.relu() + share * x.tanh())()


@pytest.mark.parametrize(
    ("dtype", "share", "accepted"),
    [
        (None, 1e-15, True),
        (None, 1e-8, False),
        (None, 1e-6, False),
        (None, 1e-4, False),
        (torch.float32, 1e-8, True),
        (torch.float32, 1e-3, False),
    ],
)
def test_only_rounding_is_accepted(
    dtype: torch.dtype | None, share: float, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong rule, planted, proposes what is a symmetry only up to a share."""
    monkeypatch.setitem(RULES, "aten::tanh", RULES["aten::relu"])
    torch.manual_seed(0)
    explanation = nf.explain(*nearly_homogeneous(share), dtype=dtype)
    kept, rejected = ([one.name for one in found] for found in (explanation.found, explanation.rejected))
    assert (kept, rejected) == ((["0 -> 2"], []) if accepted else ([], ["0 -> 2"]))


@pytest.mark.parametrize(("size", "accepted"), [(10.0, True), (0.02, False)])
def test_what_is_approximate_is_not_far_off(size: float, accepted: bool) -> None:
    """Beside small activations an eps is no small number."""
    model, loss, (x, y) = sequential((3,), (4,), nn.Linear(3, 4), nn.LayerNorm(4, eps=1e-4), nn.Tanh())
    with torch.no_grad():
        model[0].weight *= size
        model[0].bias *= size
    explanation = nf.explain(model, loss, (x, y), approximate=True)
    assert [len(explanation.found), len(explanation.rejected)] == ([1, 0] if accepted else [0, 1])
    assert not nf.explain(model, loss, (x, y)).found


def test_an_analysis_warns_of_what_the_numbers_refute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten::tanh", RULES["aten::relu"])
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    model, loss, batch = sequential((3,), (2,), *layers)
    with pytest.warns(UserWarning, match=r"0 -> 2: the graph allows this symmetry, the numbers do not"):
        analysis = nf.analyze(model, loss, [batch], nf.SGD(0.1, 2), progress=False)
    assert [report.name for report in analysis.reports] == ["2 -> 4"]


# Noise: what functions of PyTorch do with parameters, against the gradients of single examples.


class Applied(nn.Module):
    """A function of activations and two parameters, after a linear map."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.map, self.function = nn.Linear(3, 4), function
        self.p, self.q = (nn.Parameter(torch.rand(4) + 0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.map(x), self.p, self.q)


def in_place(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    x = x + 0
    x += p
    x -= q
    x *= p
    x /= q
    return x


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add": lambda x, p, q: torch.add(x, p, alpha=2) + q,
    "add, reversed": lambda x, p, q: p + x + q.add(x),
    "sub": lambda x, p, q: torch.sub(x, p) - q,
    "sub, reversed": lambda x, p, q: p - x + torch.rsub(x, q),
    "subtract": lambda x, p, q: torch.subtract(x, p).subtract(q),
    "mul": lambda x, p, q: torch.mul(x, p) * q,
    "multiply": lambda x, p, q: torch.multiply(p, x).multiply(q),
    "div": lambda x, p, q: torch.div(x, p) / q,
    "divide": lambda x, p, q: torch.divide(x, p).true_divide(q),
    "div, reversed": lambda x, p, q: p / (1 + x.square()) + q.div(2 + x.cos()),
    "pow": lambda x, p, q: x.abs().add(0.5).pow(p) + q * x,
    "pow, function": lambda x, p, q: torch.pow(x.abs() + 0.5, p) * q,
    "pow, operator": lambda x, p, q: (x.abs() + 0.5) ** p + q * x,
    "pow, of the parameter": lambda x, p, q: p ** x.tanh() + q.pow(x.tanh()),
    "maximum": lambda x, p, q: torch.maximum(x, p - 1) * q,
    "maximum, method": lambda x, p, q: x.maximum(p) + q * x,
    "minimum": lambda x, p, q: torch.minimum(x, p) * q,
    "where": lambda x, p, q: torch.where(x > 0, p, x) * q,
    "lerp": lambda x, p, q: torch.lerp(x, p, 0.3) * q,
    "lerp, weight": lambda x, p, q: torch.lerp(x, x.square(), p) + q * x,
    "lerp, method": lambda x, p, q: x.lerp(p, q),
    "addcmul": lambda x, p, q: torch.addcmul(x, p, q, value=0.5) * p,
    "addcmul, method": lambda x, p, q: p.addcmul(x, q),
    "addcdiv": lambda x, p, q: torch.addcdiv(x, p, q, value=0.5) * p,
    "atan2": lambda x, p, q: torch.atan2(x, p) * q,
    "atan2, method": lambda x, p, q: p.atan2(x) + q * x,
    "hypot": lambda x, p, q: torch.hypot(x, p) * q,
    "copysign": lambda x, p, q: torch.copysign(p, x) + q * x,
    "in place": in_place,
    "several": lambda x, p, q: (x * p + q) / (1 + p * q) - torch.where(x > 0, x, q),
}


@pytest.mark.parametrize("tokens", [False, True], ids=["vectors", "tokens"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_noise_of_parameters_in_functions_of_entries(name: str, tokens: bool) -> None:
    torch.manual_seed(0)
    shape = (5,) if tokens else ()
    model, loss, batch = regression(Applied(ELEMENTWISE[name]), (*shape, 3), (*shape, 4))
    model, batch = model.double(), tuple(one.double() for one in batch)
    noise = nf.estimate_noise(model, loss, [batch], {}, exact=False, progress=False)
    # Each is done in passing, as its rule says, not example by example, unless in place.
    assert set(noise.fallback) == ({"p", "q"} if name == "in place" else set())
    stack = oracles.stacked(model, loss, batch)
    checks.noise_is(noise, oracles.statistics(model, stack, {}))
    for parameter, gradient in stack.items():
        torch.testing.assert_close(noise.mean[parameter], gradient.mean(0), rtol=1e-10, atol=1e-12)


# Dropout: it stays in the measurement, and goes where measurements are compared.


class Dropped(nn.Module):
    """A dropout of some kind between linear maps of tokens."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x)))


DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.5),
    "dropout, torch's": lambda x: torch.dropout(x, 0.5, True),
    "dropout, by name": lambda x: functional.dropout(input=x, p=0.5),
    "dropout of channels": lambda x: functional.dropout1d(x, 0.5),
    "dropout of channels of images": lambda x: functional.dropout2d(x[..., None], 0.5)[..., 0],
    "dropout of channels of volumes": lambda x: functional.dropout3d(x[..., None, None], 0.5)[..., 0, 0],
    "features, torch's": lambda x: torch.feature_dropout(x, 0.5, True),
    "alpha": lambda x: functional.alpha_dropout(x, 0.5, training=True),
    "alpha, torch's": lambda x: torch.alpha_dropout(x, 0.5, True),
    "alpha of features": lambda x: functional.feature_alpha_dropout(x, 0.5, training=True),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x, None, 0.5),
    "attention, by name": lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_measured_and_is_no_reason_to_fall_back(name: str) -> None:
    torch.manual_seed(0)
    model, loss, batch = regression(Dropped(DROPOUTS[name]), (5, 3), (5, 3), count=4)
    model, batch = model.double(), tuple(one.double() for one in batch)
    assert not torch.equal(loss(model, batch), loss(model, batch))
    noise = nf.estimate_noise(model, loss, [tuple(one.repeat(50, 1, 1) for one in batch)], {}, exact=False)
    assert not noise.fallback
    # The same four examples with other draws of dropout, which makes most of the noise.
    stack = oracles.stacked(model, loss, tuple(one.repeat(100, 1, 1) for one in batch))
    torch.testing.assert_close(noise.trace, oracles.statistics(model, stack, {}).trace, rtol=0.3, atol=0)

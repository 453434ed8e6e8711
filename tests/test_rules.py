"""Rules of single operations: the finder against null spaces, and noise against single examples."""

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
from noetherflow.noise.ops import convolution
from zoo import Call, regression, sequential

Built = tuple[nn.Module, Any, Any]


def around(function: Callable[[Tensor], Tensor], hidden: int = 3, out: int | None = None) -> Callable[[], Built]:
    """A function of hidden units, between two linear maps."""
    return lambda: sequential(
        (2,), (2,), nn.Linear(2, hidden), Call(function), nn.Linear(hidden if out is None else out, 2)
    )


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
    # Each is measured in one pass, as its rule says, not example by example.
    assert not noise.fallback
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


# Transposed convolutions: rules of their own, and the function without a rule for the rest.

TRANSPOSED: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "one dimension": ((4, 5), lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1)),
    "two dimensions": (
        (4, 3, 5),
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(1, 2)),
    ),
    "three dimensions": ((4, 2, 3, 2), lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False)),
    "in groups": ((4, 3, 3), lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2)),
    "to a single place": ((4, 1, 1), lambda: nn.ConvTranspose2d(4, 3, 2)),
}
# Left to what happens without a rule: the kernel fits into the output more often than the input has places, groups of
# several images, padding that differs between both sides.
WIDER: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "wide output padding": ((4, 4), lambda: nn.ConvTranspose1d(4, 2, 3, padding=2, output_padding=2, dilation=3)),
    "several images, in groups": ((2, 4, 4), lambda: Images(nn.ConvTranspose1d(4, 2, 3, groups=2))),
    "several images, a convolution in groups": ((2, 4, 4), lambda: Images(nn.Conv1d(4, 2, 3, groups=2))),
    "an even kernel, padded": ((4, 5), lambda: nn.Conv1d(4, 2, 4, padding="same")),
}


class Images(nn.Module):
    """An example has several images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1))


class ByName(nn.Module):
    """Arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 2)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        rest = {"dilation": 1, "groups": 2, "output_padding": 1, "stride": 2}
        return functional.conv_transpose1d(input=x, weight=self.weight, bias=self.bias, **rest)


TRANSPOSED["by name"] = (4, 5), ByName
TRANSPOSED["several images"] = (2, 4, 3, 3), lambda: Images(nn.ConvTranspose2d(4, 3, 2, stride=2, padding=1))


def up(
    case: tuple[tuple[int, ...], Callable[[], nn.Module]],
) -> tuple[nn.Module, nf.Loss, Tensor, dict[str, nf.Symmetry]]:
    torch.manual_seed(0)
    shape, build = case
    model, batch = build().double(), torch.randn(5, *shape, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return (y.tanh() + y.square().cos()).reshape(len(x), -1).square().mean(1)

    symmetries: dict[str, nf.Symmetry] = {}
    for name, parameter in model.named_parameters():
        for dim in range(parameter.ndim):
            symmetries[f"{name} {dim}"] = nf.DiagonalSymmetry(plus=nf.Axis(name, dim))
            symmetries[f"{name} {dim} Gram"] = nf.MatrixSymmetry(plus=nf.Axis(name, dim))
    return model, loss, batch, symmetries


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_noise_of_a_transposed_convolution(
    name: str, variances: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter against a loop over examples; without the fallback, so that the rule is what is measured."""
    monkeypatch.setenv("NOETHERFLOW_KERNELS", kernels)
    monkeypatch.setattr("noetherflow.noise.ops.convolution.other", lambda *_: NotImplemented)
    model, loss, batch, symmetries = up(TRANSPOSED[name])
    meter = nf.NoiseMeter(model, symmetries, variances=variances)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    assert not meter.unmeasured
    step = oracles.examples_of_step(model, loss, batch)
    checks.noise_is(meter.noise, oracles.pooled(model, [step], symmetries))
    for parameter, gradient in oracles.stacked(model, loss, batch).items():
        torch.testing.assert_close(model.get_parameter(parameter).grad, gradient.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's own, of a copy
@pytest.mark.parametrize("name", WIDER)
def test_what_the_rules_of_convolutions_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batch, symmetries = up(WIDER[name])
    meter = nf.NoiseMeter(model, symmetries)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    assert not meter.unmeasured
    checks.noise_is(meter.noise, oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], symmetries))
    # The twin: nothing else would measure it.
    monkeypatch.setattr("noetherflow.noise.ops.convolution.other", lambda *_: NotImplemented)
    with pytest.raises(nf.SettingsError, match="conv"), nf.NoiseMeter(model, symmetries).step(batch):
        loss(model, batch).mean().backward()


def test_a_function_without_a_rule_says_when_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = nn.Bilinear(3, 4, 2), (torch.randn(5, 3), torch.randn(5, 4))
    monkeypatch.setattr("noetherflow.noise.ops.other._MOST", 5 * 26 - 1)
    sentence = "bilinear: its 5 examples together would have gradients of more than"
    with pytest.raises(nf.SettingsError, match=sentence), nf.NoiseMeter(model, {}).step(batch):
        model(*batch).square().mean().backward()
    monkeypatch.setattr("noetherflow.noise.ops.other._MOST", 5 * 26)
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        model(*batch).square().mean().backward()
    assert not meter.unmeasured


def test_the_sides_of_a_transposed_convolution_are_not_those_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the input taken for the image, where all shapes are the same."""
    tapped = convolution._tapped
    monkeypatch.setattr(convolution, "_tapped", lambda *args, **rest: tapped(*args, **{**rest, "transposed": False}))
    model, loss, batch, symmetries = up(((4, 3, 3), lambda: nn.ConvTranspose2d(4, 4, 3, padding=1)))
    meter = nf.NoiseMeter(model, symmetries)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    with pytest.raises(AssertionError):
        checks.noise_is(meter.noise, oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], symmetries))

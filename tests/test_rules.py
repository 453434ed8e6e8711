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

"""The gradient of every example where torch.func cannot form it, and examples that have none, in both ways."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import checks
import noetherflow as nf
import oracles
from users_models import OldProduct

WAYS = pytest.mark.parametrize("exact", [None, False], ids=["exact", "layer by layer"])
Loss = Callable[[nn.Module, Any], Tensor]


class Middle(nn.Module):
    """Three layers, of which the second is applied by a function of (model, input)."""

    def __init__(self, apply: Callable[["Middle", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.apply_b = apply

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.apply_b(self, torch.tanh(self.a(x))))).squeeze(-1)


class Table(nn.Module):
    """A table, whose rows are averaged, and a linear layer."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.out = table, nn.Linear(4, 1)

    def forward(self, *ids: Tensor) -> Tensor:
        h = self.table(*ids)
        return self.out(torch.tanh(h if h.ndim == 2 else h.mean(1))).squeeze(-1)


def squared(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return (model(*batch[:-1]) - batch[-1]).square()


def with_derivative(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss of a physics-informed network: the derivative of the output by the input enters."""
    x = batch[0].detach().clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return (out - batch[1]).square() + (slope.sum(1) - torch.sin(x[:, 0])).square()


def only_tensors(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss that refuses the tensors of torch.func by a TypeError."""
    if "BatchedTensor" in repr(batch[0]):
        raise TypeError("expected a tensor")
    return squared(model, batch)


def numbers(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, dtype=torch.float64), torch.randn(count, dtype=torch.float64)


def words() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0, 1, 1], [0, 0, 2], [3, 3, 3], [4, 0, 1], [5, 5, 0], [8, 8, 1]]), numbers()[1]


REFUSED: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[[], Any]]] = {
    "sparse table": (lambda: Table(nn.Embedding(9, 4, sparse=True)), squared, words),
    "sparse bags": (lambda: Table(nn.EmbeddingBag(9, 4, mode="mean", sparse=True)), squared, words),
    "sparse table under a reentrant checkpoint": (
        lambda: Middle(lambda net, h: checkpoint(lambda t: net.b(t) + net.table(t.argmax(1)), h, use_reentrant=True)),
        squared,
        numbers,
    ),
    "checkpoint": (lambda: Middle(lambda net, h: checkpoint(net.b, h, use_reentrant=False)), squared, numbers),
    "reentrant checkpoint": (lambda: Middle(lambda net, h: checkpoint(net.b, h, use_reentrant=True)), squared, numbers),
    "old-style function": (lambda: Middle(lambda net, h: OldProduct.apply(h, net.b.weight)), squared, numbers),
    "derivative in the loss": (lambda: Middle(lambda net, h: net.b(h)), with_derivative, numbers),
    "loss that looks at the kind of tensor": (lambda: Middle(lambda net, h: net.b(h)), only_tensors, numbers),
}


@WAYS
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_func_refuses_is_done_in_a_loop(name: str, exact: bool | None) -> None:
    build, loss, data = REFUSED[name]
    model, batch = build(), data()
    if "table under" in name:
        model.table = nn.Embedding(5, 5, sparse=True)
    model = model.double()
    stack = oracles.by_backward(model, loss, batch, 6)
    expected = oracles.statistics(model, stack, {})
    found = nf.estimate_noise(model, loss, [batch], {}, exact=exact)
    checks.noise_is(found, expected)
    # The check is not empty: a gradient that is a thousandth off is noticed.
    wrong = {n: g * (1.001 if n == "out.weight" or n == "c.weight" else 1.0) for n, g in stack.items()}
    with pytest.raises(AssertionError):
        checks.noise_is(found, oracles.statistics(model, wrong, {}))


def coupled(model: nn.Module, batch: Any, exact: bool | None) -> str:
    with pytest.raises(nf.CoupledExamplesError) as caught:
        nf.estimate_noise(model, squared, [batch], {}, exact=exact)
    return str(caught.value)


@WAYS
def test_a_function_that_normalises_over_the_batch(exact: bool | None) -> None:
    normalise = functools.partial(functional.batch_norm, running_mean=None, running_var=None, training=True)
    model = Middle(lambda net, h: normalise(net.b(h))).double()
    said = coupled(model, numbers(), exact)
    assert "MicrobatchMeter" in said
    assert "batch_norm" in said
    # With the statistics of training the examples are independent.
    mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    model = Middle(lambda net, h: functional.batch_norm(net.b(h), mean, variance, training=False)).double()
    assert nf.estimate_noise(model, squared, [numbers()], {}, exact=exact).trace > 0


@WAYS
@pytest.mark.filterwarnings("ignore:var")  # of PyTorch: there are no degrees of freedom
@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["certain", "dropout"])
def test_a_variance_over_a_single_example_is_no_number(drop: float, exact: bool | None) -> None:
    def normalised(net: Middle, h: Tensor) -> Tensor:
        h = functional.dropout(net.b(h), drop)
        return (h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()

    if drop and exact is False:  # the losses of single examples are not compared
        with pytest.raises(nf.NonFiniteError, match="per-example gradient"):
            nf.estimate_noise(Middle(normalised).double(), squared, [numbers()], {}, exact=False)
    else:
        assert "MicrobatchMeter" in coupled(Middle(normalised).double(), numbers(), exact)
    model = Middle(lambda net, h: functional.dropout(net.b(h), drop)).double()
    assert nf.estimate_noise(model, squared, [numbers()], {}, exact=exact).trace > 0


def test_parts_of_a_batch_are_compared_with_their_place() -> None:
    model, batch = Middle(lambda net, h: net.b(h)).double(), numbers()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parts = nf.estimate_noise(model, squared, [batch], {}, exact=True, max_bytes=2 * 3 * 8 * parameters)
    together = nf.estimate_noise(model, squared, [batch], {}, exact=True)
    torch.testing.assert_close(parts.trace, together.trace, rtol=1e-12, atol=0)


@WAYS
def test_bags_that_offsets_cut(exact: bool | None) -> None:
    model = Table(nn.EmbeddingBag(9, 4)).double()
    batch = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 1, 2]), torch.tensor([0, 2, 5, 8]), numbers(4)[1]
    with pytest.raises(nf.LossError, match="MicrobatchMeter"):
        nf.estimate_noise(model, squared, [batch], {}, exact=exact)


@WAYS
def test_complex_parameters_are_refused(exact: bool | None) -> None:
    model = Middle(lambda net, h: net.b(h) * net.phase.real)
    model.phase = nn.Parameter(torch.ones(5, dtype=torch.complex128))
    with pytest.raises(nf.SettingsError, match=r"phase.*view_as_complex"):
        nf.estimate_noise(model.double(), squared, [numbers()], {}, exact=exact)

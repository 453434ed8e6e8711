"""What people do to models: hooks, wrappers, branches, masks, other types. It works, or it is refused in a sentence."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import map as higher_order_map
from torch._higher_order_ops import while_loop
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import noetherflow as nf
from animals import squared
from noetherflow.detect.rules import RULES

X, Y = (torch.randn(6, size, generator=torch.Generator().manual_seed(size)) for size in (4, 2))
HIDDEN = nf.DiagonalSymmetry([nf.Axis("a.weight", 0), nf.Axis("a.bias", 0)], [nf.Axis("b.weight", 1)])


class Net(nn.Module):
    """Two linear maps and what a function makes of them."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
        self.mask = nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.function = function or (lambda net, x: net.b(net.act(net.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hidden(net: Net, x: Tensor) -> Tensor:
    return net.act(net.a(x))


class Rectified(torch.autograd.Function):
    """A ReLU with a backward pass by hand."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient * (x > 0)


class StraightThrough(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


def with_hook(name: str, hook: Callable[..., Any]) -> Net:
    net = Net()
    getattr(net.a, name)(hook)
    return net


def doubled_before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        return self.module(*args)


def chosen_by_a_mask(net: Net, x: Tensor) -> Tensor:
    """Positions at which the batch is positive, as labels choose tokens."""
    kept = x[:, 0] > 0
    y = net.b(hidden(net, x))
    return torch.zeros_like(y).masked_scatter(kept[:, None].expand_as(y), y[kept])


def through_a_frozen_mask(net: Net, x: Tensor) -> Tensor:
    kept = hidden(net, x)[:, net.mask]
    return net.b(torch.cat([kept, kept[:, :1]], 1))


def times_a_number_of_the_batch(net: Net, x: Tensor) -> Tensor:
    return net.b(hidden(net, x) * x.square().sum().item())


def copied(net: Net, x: Tensor) -> Tensor:
    return net.b(checkpoint(net.act, net.a(x), use_reentrant=False))


def copied_reentrantly(net: Net, x: Tensor) -> Tensor:
    return net.b(checkpoint(net.act, net.a(x), use_reentrant=True))


WORKS: dict[str, Callable[[], nn.Module]] = {
    "forward hook": lambda: with_hook("register_forward_hook", lambda module, args, result: 2 * result),
    "forward pre-hook": lambda: with_hook("register_forward_pre_hook", doubled_before),
    "hook of a gradient": lambda: with_hook("register_full_backward_hook", lambda *_: None),
    "pre-hook of a gradient": lambda: with_hook("register_full_backward_pre_hook", lambda *_: None),
    "torch.compile": lambda: torch.compile(Net(), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(Net()),
    "a wrapper": lambda: Wrapper(Net()),
    "an average of models": lambda: torch.optim.swa_utils.AveragedModel(Net()),
    "custom autograd function": lambda: Net(lambda net, x: net.b(Rectified.apply(net.a(x)))),
    "checkpoint": lambda: Net(copied),
    "reentrant checkpoint": lambda: Net(copied_reentrantly),
    "vmap inside": lambda: Net(lambda net, x: net.b(torch.vmap(torch.relu)(net.a(x)))),
    "a mask of the batch": lambda: Net(chosen_by_a_mask),
    "a number of the batch": lambda: Net(times_a_number_of_the_batch),
}
# PyTorch says so when inputs need no gradient, which does not matter here.
HOOKS = "ignore:Full backward hook is firing:UserWarning"


@pytest.mark.filterwarnings(HOOKS)
@pytest.mark.parametrize("build", WORKS.values(), ids=WORKS)
def test_the_hidden_units_are_found(build: Callable[[], nn.Module]) -> None:
    model = build()
    (symmetry,) = nf.find_symmetries(model, squared, (X, Y)).values()
    prefix = next(name for name, _ in model.named_parameters() if name.endswith("a.weight")).removesuffix("a.weight")
    assert {(axis.name, axis.dim) for axis in symmetry.plus} == {(prefix + "a.weight", 0), (prefix + "a.bias", 0)}
    assert [(axis.name, axis.dim) for axis in symmetry.minus] == [(prefix + "b.weight", 1)]


def test_a_frozen_mask_is_known() -> None:
    """Units 0 and 2 are kept, and unit 0 is read twice."""
    explanation = nf.explain(Net(through_a_frozen_mask), squared, (X, Y))
    minus = [
        sorted(index for axis in each.minus for index in range(axis.start or 0, axis.stop or 3))
        for each in explanation.symmetries.values()
        if each.minus
    ]
    assert sorted(minus) == [[0, 2], [1]]


BREAKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a number of the parameters": (
        lambda: Net(lambda net, x: net.b(hidden(net, x) * net.a.weight.norm().item())),
        r"item|linear",
    ),
    "a number of the batch that is added": (
        lambda: Net(lambda net, x: net.b(hidden(net, x) + x.max().item())),
        r"add",
    ),
    "a sparse tensor": (lambda: Net(lambda net, x: net.b(hidden(net, x).to_sparse().to_dense())), r"to_sparse"),
}


@pytest.mark.parametrize(("build", "reason"), BREAKS.values(), ids=BREAKS)
def test_what_lets_nothing_through_is_named(build: Callable[[], nn.Module], reason: str) -> None:
    explanation = nf.explain(build(), squared, (X, Y))
    assert not explanation.symmetries
    assert not explanation.rejected
    reasons = {(note.parameter, note.axis): note.reason for note in explanation.axes}
    assert re.search(reason, reasons["a.weight", 0]), reasons


def test_a_straight_through_gradient_is_refuted_by_its_gradients() -> None:
    """The sign does not change under a scaling, but the pretended gradient does not know."""
    model = Net(lambda net, x: net.b(StraightThrough.apply(net.a(x))))
    with pytest.warns(UserWarning, match=r"the graph allows this symmetry, the numbers do not"):
        assert not nf.find_symmetries(model, squared, (X, Y))


def by_branch(net: Net, x: Tensor) -> Tensor:
    return net.b(torch.cond(x.sum() > 0, lambda h: 2 * h, lambda h: 3 * h, (hidden(net, x),)))


def by_loop(net: Net, x: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.long)
    _, h = while_loop(lambda count, _: count < 3, lambda count, h: (count + 1, 0.9 * h), (start, hidden(net, x)))
    return net.b(h)


def by_row(net: Net, x: Tensor) -> Tensor:
    return net.b(higher_order_map(lambda row: 2 * row, hidden(net, x)))


@pytest.mark.parametrize("function", [by_branch, by_loop, by_row])
def test_a_graph_inside_the_graph_is_opaque_or_refused_in_a_sentence(function: Callable[[Net, Tensor], Tensor]) -> None:
    try:
        explanation = nf.explain(Net(function), squared, (X, Y))
    except nf.TraceError as error:
        assert "by hand" in str(error)  # noqa: PT017 - both are right
    else:
        assert not explanation.symmetries
        assert not explanation.rejected
        reasons = {(note.parameter, note.axis): note.reason for note in explanation.axes}
        assert re.search("cond|while_loop|map", reasons["a.weight", 0]), reasons


def lengths_of_the_batch(net: Net, x: Tensor) -> Tensor:
    count = int((x > 0).sum())
    return net.b(hidden(net, x)[:, : count % 3 + 1].sum(1, keepdim=True).expand(-1, 3))


def positions_that_parameters_choose(net: Net, x: Tensor) -> Tensor:
    h = hidden(net, x)
    return net.b(h[h[:, 0].nonzero().squeeze(1)].sum(0).expand(len(x), 3))


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a shape that the batch decides": lambda: Net(lengths_of_the_batch),
    "positions that parameters choose": lambda: Net(positions_that_parameters_choose),
    "numpy": lambda: Net(lambda net, x: net.b(hidden(net, x)) + torch.from_numpy(net.a.weight.detach().numpy()).sum()),
    "a branch": lambda: Net(lambda net, x: net.b(hidden(net, x)) if net.a(x).sum() > 0 else net.b(net.a(x))),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_what_is_no_graph_is_refused_in_a_sentence(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(nf.TraceError, match=r"by hand"):
        nf.find_symmetries(build(), squared, (X, Y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normed", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_leaves_the_scale_of_its_weight(normed: Any, training: bool) -> None:
    """W / sigma(W) is the same for all multiples of W; the power iteration of train mode writes into buffers."""
    model = nn.Sequential(normed(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).train(training)
    (symmetry,) = nf.find_symmetries(model, squared, (X, Y)).values()
    assert isinstance(symmetry, nf.ScalarSymmetry)
    assert not symmetry.minus
    assert len(symmetry.plus) == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_that_is_used_twice(training: bool) -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(4, 3), norm, nn.ReLU(), norm, nn.Linear(3, 2)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not nf.find_symmetries(model, squared, (X, Y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_of_any_type(dtype: torch.dtype) -> None:
    batch = tuple(tensor.to(dtype) for tensor in (X, Y))
    assert len(nf.find_symmetries(Net().to(dtype), squared, batch)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_proof_in_sixteen_bits_works_or_is_refused_in_a_sentence(dtype: torch.dtype) -> None:
    try:
        found = nf.find_symmetries(Net(), squared, (X, Y), dtype=dtype)
    except nf.SettingsError as error:
        assert "float64" in str(error)  # noqa: PT017 - both are right
    else:
        assert len(found) == 1


def test_an_empty_batch_is_refused_in_a_sentence() -> None:
    with pytest.raises(nf.NoetherflowError, match=r"empty"):
        nf.find_symmetries(Net(), squared, (X[:0], Y[:0]))


def test_labelled_tokens_only() -> None:
    """The loss of the tokens that have a label: as many as the batch says."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(self.table(tokens))))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, kept = model(batch[0]), batch[1] != -100
        losses = logits.new_zeros(kept.shape)
        losses[kept] = functional.cross_entropy(logits[kept], batch[1][kept], reduction="none")
        return losses.sum(1)

    tokens = torch.arange(12).reshape(3, 4) % 7
    labels = torch.where(tokens % 2 == 0, tokens % 3, -100)
    found = nf.find_symmetries(Tagger(), loss, (tokens, labels))
    assert {name: type(symmetry) for name, symmetry in found.items()} == {
        "table -> inner": nf.MatrixSymmetry,
        "inner -> head": nf.DiagonalSymmetry,
    }


def test_a_rule_that_fails_lets_nothing_through_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(operation: nf.Operation) -> nf.ScalingExponents:
        return operation.args[7]

    assert list(nf.find_symmetries(Net(), squared, (X, Y))) == ["a -> b"]
    monkeypatch.setitem(RULES, "aten::relu", failing)
    with pytest.warns(UserWarning, match=r"relu \(act\): the exponent rule of aten::relu failed \(IndexError.*missing"):
        assert not nf.find_symmetries(Net(), squared, (X, Y))


def test_a_loss_without_a_derivative_is_refused_in_a_sentence() -> None:
    def stepped(net: Net, x: Tensor) -> Tensor:
        return net.b(torch.relu(net.a(x))) + torch.heaviside(net.b.bias, x.new_ones(()))

    with pytest.raises(nf.TraceError, match=r"cannot be proved.*derivative for aten::heaviside"):
        nf.find_symmetries(Net(stepped), squared, (X, Y))


@pytest.mark.parametrize("returned", [None, (), [nf.ScalingExponents((6, 3))] * 2])
def test_a_rule_that_returns_no_exponents_is_told_so(returned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten::relu", lambda operation: returned)
    with pytest.warns(UserWarning, match=r"aten::relu failed \(TypeError: expected ScalingExponents for 1 results"):
        assert not nf.find_symmetries(Net(), squared, (X, Y))


@pytest.mark.parametrize("key", ["relu", "aten::", "aten::relu.default", "a::b::c"])
def test_a_key_has_a_namespace_and_no_overload(key: str) -> None:
    with pytest.raises(nf.SettingsError, match=rf"namespace.*got {re.escape(repr(key))}"):
        nf.exponent_rule(key)

"""What callers give: weights that a forward pass reaches by another road, loaders, losses that raise, empty models."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf
from cases import mlp, squared_error
from noetherflow import _given
from noetherflow._model_function import ModelFunction

BATCH = (
    torch.randn(8, 4, generator=torch.Generator().manual_seed(5)),
    torch.randn(8, 3, generator=torch.Generator().manual_seed(6)),
)
HIDDEN = nf.DiagonalSymmetry([nf.Axis("a.weight", 0), nf.Axis("a.bias", 0)], [nf.Axis("b.weight", 1)])


class Net(nn.Module):
    """A layer with ReLU, whose first map is called in a way that is given."""

    def __init__(self, road: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.call = (road(self.a),)  # in a tuple, so that a module is not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.call[0](x)))


def by_list(layer: nn.Linear) -> Any:
    kept = [layer.weight, layer.bias]
    return lambda x: F.linear(x, *kept)


def by_closure(layer: nn.Linear) -> Any:
    weight, bias = layer.weight, layer.bias
    return lambda x: x @ weight.T + bias


def by_partial(layer: nn.Linear) -> Any:
    return functools.partial(F.linear, weight=layer.weight, bias=layer.bias)


def derived(layer: nn.Linear) -> Any:
    doubled = 2 * layer.weight
    return lambda x: F.linear(x, doubled, layer.bias)


def under_a_checkpoint(layer: nn.Linear) -> Any:
    call = by_list(layer)
    return lambda x: checkpoint(call, x.detach().requires_grad_(), use_reentrant=True)


def kept_data(layer: nn.Linear) -> Any:
    weight = layer.weight.data
    return lambda x: F.linear(x, weight, layer.bias)


def shapes_only(layer: nn.Linear) -> Any:
    """Reads the shape, the type and the device of a kept weight."""
    kept = layer.weight

    def call(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(kept)[0] + kept.new_zeros(4)
        x.to(kept)
        return layer(x + zeros).view(-1, kept.shape[0]) + torch.ones(6, 4).view_as(kept)[:, 0] - 1

    return call


def through_the_attribute(layer: nn.Linear) -> Any:
    return lambda x: F.linear(x, layer.weight, layer.bias)


ASKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "find": lambda model, loss: list(nf.find_symmetries(model, loss, BATCH)),
    "verify": lambda model, loss: nf.verify_symmetry(model, loss, BATCH, HIDDEN),
    "analyze": lambda model, loss: nf.analyze(model, loss, [BATCH], nf.SGD(lr=0.1, batch_size=4), {}, progress=False),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("road", [by_list, by_closure, by_partial, derived, under_a_checkpoint])
def test_a_parameter_that_is_reached_by_another_road_is_named(road: Any, ask: str) -> None:
    more = "" if road is derived else " and 1 more"
    with pytest.raises(nf.HiddenParameterError, match=rf"reaches parameter 'a\.weight'{more} by another road.*self\.a"):
        ASKS[ask](Net(road), squared_error)


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("road", [lambda layer: layer, lambda layer: layer.forward, through_the_attribute, shapes_only])
def test_modules_in_lists_attributes_and_shapes_are_no_other_road(road: Any, ask: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if road is shapes_only and ask == "find":
            assert nf.explain(Net(road), squared_error, BATCH)
            return
        outcome = ASKS[ask](Net(road), squared_error)
    assert {"find": outcome == ["a -> b"], "verify": ask == "verify" and outcome < 1e-12}.get(ask, True)


def test_a_loss_that_holds_the_model_itself_is_no_other_road() -> None:
    net = Net(lambda layer: layer)
    assert list(nf.find_symmetries(net, lambda model, batch: squared_error(net, batch), BATCH)) == ["a -> b"]


def test_recurrent_layers_with_flat_weights_are_no_other_road() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x[:, None])[0][:, -1])

    assert nf.explain(Recurrent(), squared_error, BATCH)


def test_memory_of_a_parameter_without_a_gradient_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"the memory of \['a\.weight'\] is read by another road"):
        assert nf.find_symmetries(Net(kept_data), squared_error, BATCH) == {}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_tensor_that_is_trained_and_no_parameter_is_warned_of(reentrant: bool | None) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 6), nn.Linear(6, 3), [nn.Linear(6, 6)]

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            if reentrant is None:
                return self.b(torch.relu(self.kept[0](hidden)))
            return self.b(torch.relu(checkpoint(self.kept[0], hidden, use_reentrant=reentrant)))

    with pytest.warns(UserWarning, match=r"shapes \[\(6, 6\), \(6,\)\] that require gradients .*nn\.ModuleList"):
        _given.require_loss(Hidden(), squared_error, BATCH, "the loss")


def test_constants_of_a_loss_are_no_weights() -> None:
    teacher, net = mlp(4, 3), Net(lambda layer: layer)

    class Teaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.scale = mlp(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return (self.scale * (model(batch[0]) - self.teacher(batch[0]))).square().sum(1)

    def without_gradient(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            goal = teacher(batch[0])
        return (model(batch[0]) - goal).square().sum(1)

    def with_gradient(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - teacher(batch[0])).square().sum(1)

    def of_inputs(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        z = x * torch.ones(4, requires_grad=True)
        return model(z).square().sum(1) + torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (Teaching(), without_gradient, of_inputs):
            _given.require_loss(net, loss, BATCH, "the loss")
    with pytest.warns(UserWarning, match=r"or call requires_grad_\(False\) if they are constants"):
        _given.require_loss(net, with_gradient, BATCH, "the loss")


def test_other_roads_leave_the_model_as_it_was() -> None:
    net = Net(by_list)
    net.register_buffer("count", torch.zeros(()))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(nf.HiddenParameterError):
        nf.find_symmetries(net, squared_error, BATCH)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reentrant_checkpoint_gives_gradients_of_single_layers() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(lambda h: torch.relu(self.c(h)), self.a(x), use_reentrant=True))

    function = ModelFunction(Inner(), squared_error).observe(BATCH)
    everything = function.gradient(function.params, BATCH)[1]
    single = {"c.weight": function.params["c.weight"]}
    torch.testing.assert_close(function.gradient(single, BATCH)[1]["c.weight"], everything["c.weight"])
    assert everything["c.weight"].abs().max() > 0


# Loaders, losses and models.


def typo(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch[1]).square().sum(1)


def endless() -> Iterator[Any]:
    while True:
        yield BATCH


DATA = TensorDataset(*BATCH)
BATCHES = {
    "got a DataLoader, expected one batch: next(iter(loader))": DataLoader(DATA, 4),
    "got a TensorDataset, expected one batch: next(iter(DataLoader(dataset": DATA,
    "got an iterator (generator), expected one batch: next(batches)": endless(),
}
RESCALING = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)])
TAKES_A_BATCH: dict[str, Callable[..., Any]] = {
    "find": nf.find_symmetries,
    "explain": nf.explain,
    "verify": lambda model, loss, batch: nf.verify_symmetry(model, loss, batch, RESCALING),
}


@pytest.mark.parametrize("call", TAKES_A_BATCH)
@pytest.mark.parametrize("message", BATCHES)
def test_a_loader_in_the_place_of_a_batch_is_refused(message: str, call: str) -> None:
    with pytest.raises(nf.SettingsError) as caught:
        TAKES_A_BATCH[call](mlp(4, 6, 3), squared_error, BATCHES[message])
    assert str(caught.value).startswith(message)
    TAKES_A_BATCH[call](mlp(4, 6, 3), squared_error, next(iter(DataLoader(DATA, 4))))


@pytest.mark.parametrize("call", TAKES_A_BATCH)
def test_a_loss_that_raises_is_quoted_with_its_cause(call: str) -> None:
    with pytest.raises(nf.LossError, match=r"^loss\(model, batch\) raised TypeError: .*indices") as caught:
        TAKES_A_BATCH[call](mlp(4, 6, 3), typo, BATCH)
    assert isinstance(caught.value.__cause__, TypeError)

    def refuses(model: nn.Module, batch: Any) -> Tensor:
        raise nf.EmptyDataError("of the user")

    with pytest.raises(nf.EmptyDataError, match=r"^of the user$"):
        TAKES_A_BATCH[call](mlp(4, 6, 3), refuses, BATCH)


def test_a_batch_in_the_place_of_a_loader_is_refused() -> None:
    sgd = nf.SGD(lr=0.1, batch_size=4)
    for loader, words in ((BATCH, "tuple of 2"), (list(BATCH), "list of 2")):
        with pytest.raises(nf.SettingsError, match=rf"got a batch \({words}\) in the place of a loader.*\[batch\]"):
            nf.analyze(mlp(4, 6, 3), squared_error, loader, sgd, progress=False)
    with pytest.raises(nf.LossError, match="raised TypeError"):
        nf.analyze(mlp(4, 6, 3), typo, [BATCH], sgd, progress=False)
    assert nf.analyze(mlp(4, 6, 3), squared_error, [BATCH], sgd, progress=False).reports


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), r"the model \(ReLU\) has no parameters, so it has no symmetries"),
        (mlp(4, 6, 3).to("meta"), r"'0\.weight' is on the meta device and holds no numbers"),
        (nn.Sequential(nn.LazyLinear(3)), r"'0\.weight' of a lazy layer has no shape yet"),
    ],
)
def test_models_without_numbers_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(nf.SettingsError, match=message):
        nf.find_symmetries(model, squared_error, BATCH)
    with pytest.raises(nf.SettingsError, match=message):
        nf.verify_symmetry(model, squared_error, BATCH, nf.ScalarSymmetry([nf.Axis("0.weight", 0)], []))


def test_data_in_another_type_than_the_model_is_converted() -> None:
    batch = tuple(tensor.double() for tensor in BATCH)
    with pytest.raises(RuntimeError, match="dtype"):
        squared_error(mlp(4, 6, 3), batch)
    _given.require_loss(mlp(4, 6, 3), squared_error, batch, "the loss")
    with pytest.raises(nf.HiddenParameterError):
        _given.require_loss(Net(by_list), squared_error, batch, "the loss")


@pytest.mark.parametrize("call", TAKES_A_BATCH)
@pytest.mark.parametrize("inside", [False, True])
def test_a_conditional_of_pytorch_is_refused_in_a_sentence(inside: bool, call: str) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            layer = self[2] if inside else torch.sin
            return torch.cond(x.sum() > 0, lambda h: layer(h), lambda h: h.cos(), (hidden,))

    with pytest.raises(nf.TraceError, match=r"not with gradients at other values of the parameters .*torch\.cond"):
        TAKES_A_BATCH[call](Branching(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)), branching_loss, BATCH)


def branching_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().sum(1)


def test_a_batch_that_requires_gradients_is_no_weight() -> None:
    batch = tuple(tensor.double().requires_grad_() for tensor in BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _given.require_loss(mlp(4, 6, 3), squared_error, batch, "the loss")
        assert nf.verify_symmetry(mlp(4, 6, 3), squared_error, batch, RESCALING) < 1e-12

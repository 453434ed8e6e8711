"""An equilibrium of a model moves that model inside a wrapper, and the other way round."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checks
import noetherflow as nf
from cases import Case, case, squared_error

SGD = nf.SGD(0.1, 5, 0.02)


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def first_block_compiled(model: nn.Module) -> nn.Module:
    """The prefix stands in the middle of the names of this block."""
    first, *rest = model.children()
    return nn.Sequential(torch.compile(first, backend="eager"), *rest)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in DDP": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "DDP, compiled": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "a block compiled": first_block_compiled,
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def equilibrium_of(one: Case, model: nn.Module, symmetries: dict[str, nf.Symmetry]) -> nf.Equilibrium:
    return nf.solve_equilibrium(nf.estimate_noise(model, one.loss, one.loader(), symmetries), SGD, model)


@wrapped
@pytest.mark.usefixtures("_group")
def test_an_equilibrium_of_the_inner_model_moves_the_wrapped_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    one = case("diagonal")
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)
    before = copy.deepcopy(one.params)
    outer = wrap(one.model)
    optimizer = torch.optim.AdamW(outer.parameters(), lr=0.0, weight_decay=0.0)
    one.loss(outer, one.batch).mean().backward()
    optimizer.step()
    with nf.rebalance_(outer, equilibrium, one.loss, one.batch, optimizer=optimizer):
        torch.testing.assert_close(one.params, equilibrium.params)
        # A backward pass through the wrapper goes on to work.
        optimizer.zero_grad()
        one.loss(outer, one.batch).mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.params.items())


@wrapped
@pytest.mark.usefixtures("_group")
def test_an_equilibrium_of_the_wrapped_model_moves_the_inner_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    one = case("diagonal")
    outer = wrap(one.model)
    outer_names = {id(parameter): name for name, parameter in outer.named_parameters()}
    names = {name: outer_names[id(parameter)] for name, parameter in one.model.named_parameters()}
    assert names["0.weight"] != "0.weight"
    symmetries = {"hidden": one.symmetries["hidden"].rename(names)}
    equilibrium = equilibrium_of(one, outer, symmetries)
    assert equilibrium.params.keys() == set(names.values())
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    torch.testing.assert_close(one.params, {name: equilibrium.params[names[name]] for name in names})


@pytest.mark.parametrize("outside", [True, False])
def test_adapters_are_moved_inside_and_outside_their_peft_model(outside: bool) -> None:
    one = case("diagonal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers
        outer = peft.get_peft_model(one.model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    for name, parameter in outer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    outer.double()
    inner = outer.get_base_model()
    measured, moving = (inner, outer) if outside else (outer, inner)
    down, up = (next(name for name, _ in measured.named_parameters() if f"0.lora_{part}" in name) for part in "AB")
    symmetries = {"rank": nf.MatrixSymmetry(nf.Axis(down, 0), nf.Axis(up, 1))}
    equilibrium = equilibrium_of(one, measured, symmetries)
    losses = one.loss(outer, one.batch).detach()
    nf.rebalance_(moving, equilibrium, one.loss, one.batch)
    assert equilibrium.distance["rank"] > 0.1
    torch.testing.assert_close(dict(measured.named_parameters()), equilibrium.params)
    torch.testing.assert_close(one.loss(outer, one.batch).detach(), losses, rtol=1e-9, atol=1e-12)


def test_weights_below_adapters_are_frozen_and_stay() -> None:
    """peft freezes the model that it wraps; the names of the weights under adapters change."""
    one = case("diagonal, coupled layers")
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)
    before = copy.deepcopy(one.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        outer = peft.get_peft_model(one.model, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(nf.ParameterNameError, match="the equilibrium names"):
        nf.rebalance_(outer, equilibrium, one.loss, one.batch)
    assert torch.equal(one.model[2].weight, before["2.weight"])


class Modules(nn.Module):
    """A model that has an attribute of the name that wrappers use, beside a parameter of the inner name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.add_module("0", nn.Linear(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) + self.get_submodule("0")(x)[:, :3]


def test_names_that_fit_as_they_are_are_taken_as_they_are() -> None:
    one, model = case("diagonal"), Modules().double()
    names = {name: f"module.{name}" for name in one.params}
    symmetries = {"hidden": one.symmetries["hidden"].rename(names)}
    outside = model.get_submodule("0").weight.detach().clone()
    equilibrium = equilibrium_of(one, model, symmetries)
    nf.rebalance_(model, equilibrium, squared_error, one.batch)
    torch.testing.assert_close(dict(model.named_parameters()), equilibrium.params)
    assert torch.equal(model.get_submodule("0").weight, outside)


def test_names_that_fit_several_parameters_without_prefixes_are_refused() -> None:
    one = case("diagonal")
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)
    with pytest.raises(nf.ParameterNameError, match=r"the equilibrium names \['2.weight', '2.bias'\]"):
        nf.rebalance_(Modules().double(), equilibrium, one.loss, one.batch)


def test_an_equilibrium_under_another_name_of_a_tied_weight_moves_that_weight() -> None:
    one = case("a tied weight, named by its alias")
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)
    first = one.model.first
    del one.model.first
    one.model.first = first  # registered last now: the canonical name is that of the second layer
    assert next(one.model.named_parameters())[0] == "second.weight"
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    torch.testing.assert_close(one.model.first.weight.detach(), equilibrium.params["first.weight"])
    assert one.model.first.weight is one.model.second.weight

"""A move changes no example's loss, or does not happen."""

import dataclasses

import pytest
import torch
from torch import nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, mlp, rescaling

SGD = nf.SGD(0.1, 5, 0.02)


def equilibrium_of(one: Case) -> nf.Equilibrium:
    return nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("one", cases(), ids=str)
def test_the_model_lands_on_the_equilibrium(one: Case) -> None:
    equilibrium = equilibrium_of(one)
    losses = one.loss(one.model, one.batch).detach()
    change = nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert 0 <= change < 1e-11
    torch.testing.assert_close(dict(one.model.named_parameters()), equilibrium.params, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.loss(one.model, one.batch).detach(), losses, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("one", [one for one in cases() if one.wrong], ids=str)
def test_a_move_that_changes_a_loss_is_undone(one: Case) -> None:
    equilibrium = equilibrium_of(one)
    name, wrong = next(iter(one.wrong.items()))
    wrong = wrong.rename({alias: oracles.canonical(one.model, alias) for alias in wrong.names})
    x = wrong.identity(one.params) + 0.3
    false = dataclasses.replace(equilibrium, symmetries={name: wrong}, coordinates={name: x})
    before = state(one.model)
    with pytest.raises(nf.FunctionChangedError, match=r"example \d+ would change from"):
        nf.rebalance_(one.model, false, one.loss, one.batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_the_change_is_relative_to_the_loss_or_to_the_mean_whichever_is_larger() -> None:
    """By value, for a move that is no symmetry, losses of both signs, and a tolerance that lets everything pass."""
    one = case("diagonal")

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return one.loss(model, batch) - 3.0

    wrong, x = one.wrong["hidden"], torch.full((5,), 0.2, dtype=torch.float64)
    false = dataclasses.replace(equilibrium_of(one), symmetries={"hidden": wrong}, coordinates={"hidden": x})
    before = loss(one.model, one.batch).tolist()
    found = nf.rebalance_(one.model, false, loss, one.batch, tolerance=1e9)
    after = loss(one.model, one.batch).tolist()
    mean = sum(map(abs, before)) / len(before)
    changes = [abs(b - a) / max(abs(a), mean) for a, b in zip(before, after, strict=True)]
    assert min(before) < 0 < max(before)
    assert found == pytest.approx(max(changes), rel=1e-9)
    moved = wrong.act(-x, {name: p.detach() for name, p in one.model.named_parameters()})
    torch.testing.assert_close(moved, case("diagonal").params)


def test_a_tolerance_below_rounding_refuses_every_move() -> None:
    one = case("diagonal")
    before = state(one.model)
    with pytest.raises(nf.FunctionChangedError, match="stays as it was"):
        nf.rebalance_(one.model, equilibrium_of(one), one.loss, one.batch, tolerance=0.0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


@pytest.mark.parametrize("successes", [1, 2])
def test_an_error_in_the_users_loss_leaves_the_model_as_it_was(successes: int) -> None:
    """The loss is computed before the move, once more for the type of the computation, and after the move."""
    one = case("diagonal")
    calls = []

    def fragile(model: nn.Module, batch: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > successes:
            raise RuntimeError("out of memory")
        return one.loss(model, batch)

    before = state(one.model)
    with pytest.raises(RuntimeError, match="out of memory"):
        nf.rebalance_(one.model, equilibrium_of(one), fragile, one.batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_a_move_that_makes_losses_nan_is_undone() -> None:
    one = case("diagonal")
    equilibrium = equilibrium_of(one)
    equilibrium.coordinates["hidden"].fill_(2000.0)
    before = state(one.model)
    with pytest.raises(nf.NoetherflowError):
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_a_float32_model_is_moved_within_its_own_precision() -> None:
    net = mlp(4, 8, 3)
    data = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(4)]
    loss, symmetries = case("diagonal").loss, {"hidden": rescaling(0)}
    noise = nf.estimate_noise(net, loss, data, symmetries)
    before = net[0].weight.detach().clone()
    change = nf.rebalance_(net, nf.solve_equilibrium(noise, SGD, net), loss, data[0])
    assert change < 1e-5
    assert (net[0].weight - before).abs().max() > 1e-2
    assert net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["diagonal", "matrix", "dense, eigenvalues 1 and -2", "a tied weight in both roles"])
def test_momentum_moves_like_a_gradient(name: str) -> None:
    """Momentum that is a gradient before the move is the gradient of the moved model after it, by autograd."""
    one = case(name)
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.0, momentum=0.9)
    one.loss(one.model, one.batch).mean().backward()
    optimizer.step()  # the first step makes the gradient the momentum, and a learning rate of 0 moves nothing
    named = dict(one.model.named_parameters())
    before = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in named.items()}
    nf.rebalance_(one.model, equilibrium_of(one), one.loss, one.batch, optimizer=optimizer)
    one.model.zero_grad()
    one.loss(one.model, one.batch).mean().backward()
    for parameter in named.values():
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad, rtol=1e-9, atol=1e-12)
    gaps = [(optimizer.state[p]["momentum_buffer"] - before[key]).abs().max() for key, p in named.items()]
    assert max(gaps) > 1e-3  # or it would not matter how it moves


def test_momentum_that_is_not_there_yet_needs_no_move() -> None:
    one = case("diagonal")
    optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
    nf.rebalance_(one.model, equilibrium_of(one), one.loss, one.batch, optimizer=optimizer)
    assert not optimizer.state


def test_the_state_of_another_optimizer_is_refused_before_anything_moves() -> None:
    one = case("diagonal")
    before = state(one.model)
    adam = torch.optim.Adam(one.model.parameters())
    with pytest.raises(nf.SettingsError, match="Adam"):
        nf.rebalance_(one.model, equilibrium_of(one), one.loss, one.batch, optimizer=adam)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_a_model_of_other_names_is_refused() -> None:
    one, other = case("diagonal"), case("a tied weight, named by its alias")
    with pytest.raises(nf.ParameterNameError):
        nf.rebalance_(other.model, equilibrium_of(one), other.loss, other.batch)


def test_dropout_does_not_look_like_a_change() -> None:
    one = case("diagonal")
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("3.weight", 1))}
    noise = nf.estimate_noise(net, one.loss, one.loader(), symmetry)
    assert nf.rebalance_(net, nf.solve_equilibrium(noise, SGD, net), one.loss, one.batch) < 1e-11
    assert net.training


def test_statistics_of_batches_stay_what_they_were() -> None:
    """The losses before and after are two more passes in train mode, which would move them."""
    one = case("diagonal")
    net = nn.Sequential(one.model[0], nn.BatchNorm1d(5).double(), nn.ReLU(), one.model[2]).eval()
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], nf.Axis("3.weight", 1))}
    equilibrium = nf.solve_equilibrium(nf.estimate_noise(net, one.loss, one.loader(), symmetry), SGD, net)
    net.train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    nf.rebalance_(net, equilibrium, one.loss, one.batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    one.loss(net, one.batch)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_a_later_move_is_relative_to_where_the_model_is_then() -> None:
    """The group element is applied to the parameters as they are, so a frozen snapshot is not written back."""
    one = case("diagonal")
    equilibrium = equilibrium_of(one)
    with torch.no_grad():
        one.model[2].bias += 1.0
    bias = one.model[2].bias.detach().clone()
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert torch.equal(one.model[2].bias, bias)

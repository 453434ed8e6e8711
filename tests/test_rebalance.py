"""A move changes no example's loss, or does not happen."""

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
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert 0 <= moved.change < 1e-11
    torch.testing.assert_close(dict(one.model.named_parameters()), equilibrium.params, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.loss(one.model, one.batch).detach(), losses, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("one", [one for one in cases() if one.wrong], ids=str)
def test_a_move_that_changes_a_loss_is_undone(one: Case) -> None:
    equilibrium = equilibrium_of(one)
    name, wrong = next(iter(one.wrong.items()))
    wrong = wrong.rename({alias: oracles.canonical(one.model, alias) for alias in wrong.names})
    x = wrong.identity(one.params) + 0.3
    false = checks.moved_by(equilibrium, one.model, {name: wrong}, {name: x})
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
    false = checks.moved_by(equilibrium_of(one), one.model, {"hidden": wrong}, {"hidden": x})
    before = loss(one.model, one.batch).tolist()
    found = nf.rebalance_(one.model, false, loss, one.batch, tolerance=1e9).change
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
    wrong = {"length": nf.ScalarSymmetry(plus=nf.Axis("0.weight", 0))}
    x = {"length": torch.tensor(600.0).double()}  # the square of e^600 overflows
    equilibrium = checks.moved_by(equilibrium_of(one), one.model, wrong, x)
    before = state(one.model)
    with pytest.raises(nf.NonFiniteError, match="rebalance_: the loss of example 0"):
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())


def test_a_float32_model_is_moved_within_its_own_precision() -> None:
    net = mlp(4, 8, 3)
    data = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(4)]
    loss, symmetries = case("diagonal").loss, {"hidden": rescaling(0)}
    noise = nf.estimate_noise(net, loss, data, symmetries)
    before = net[0].weight.detach().clone()
    moved = nf.rebalance_(net, nf.solve_equilibrium(noise, SGD, net), loss, data[0])
    assert moved.change < 1e-5
    assert (net[0].weight - before).abs().max() > 1e-2
    assert net[0].weight.dtype == torch.float32


def test_a_model_of_other_names_is_refused() -> None:
    one, other = case("diagonal"), case("a tied weight, named by its alias")
    with pytest.raises(nf.ParameterNameError):
        nf.rebalance_(other.model, equilibrium_of(one), other.loss, other.batch)


def test_dropout_does_not_look_like_a_change() -> None:
    one = case("diagonal")
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("3.weight", 1))}
    noise = nf.estimate_noise(net, one.loss, one.loader(), symmetry)
    assert nf.rebalance_(net, nf.solve_equilibrium(noise, SGD, net), one.loss, one.batch).change < 1e-11
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["diagonal", "matrix"])
def test_a_cell_that_is_run_twice_moves_once(name: str, dtype: torch.dtype) -> None:
    """The second call says that the model is there already, and moves nothing."""
    one = case(name)
    net, batch = one.model.to(dtype), tuple(tensor.to(dtype) for tensor in one.batch)
    noise = nf.estimate_noise(net, one.loss, [batch], one.symmetries)
    equilibrium = nf.solve_equilibrium(noise, SGD, net)
    nf.rebalance_(net, equilibrium, one.loss, batch)
    before = state(net)
    with pytest.raises(nf.EquilibriumError, match="at this equilibrium already") as caught:
        nf.rebalance_(net, equilibrium, one.loss, batch)
    assert "no longer those that were measured" in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])  # a parameter that would move, and one that would not
def test_a_model_that_was_trained_since_is_not_moved(name: str) -> None:
    one = case("diagonal")
    equilibrium = equilibrium_of(one)
    with torch.no_grad():
        tensor = one.model.get_parameter(name)
        tensor.view(-1)[0] += 1e-6 * tensor.abs().max()
    before = state(one.model)
    with pytest.raises(nf.EquilibriumError, match="Measure the noise and solve again, or undo") as caught:
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert repr(name) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    with torch.no_grad():
        for key, parameter in one.model.named_parameters():
            parameter.copy_(case("diagonal").params[key])
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)


def test_a_model_of_other_shapes_is_not_moved() -> None:
    one = case("diagonal")
    equilibrium = equilibrium_of(one)
    one.model[2] = nn.Linear(5, 4).double()
    with pytest.raises(nf.EquilibriumError, match="no longer those that were measured"):
        nf.rebalance_(one.model, equilibrium, one.loss, (one.batch[0], torch.zeros(24, 4).double()))


def test_a_parameter_that_was_frozen_since_is_not_moved() -> None:
    one = case("diagonal")
    equilibrium = equilibrium_of(one)
    one.model[2].bias.requires_grad_(False)  # no symmetry acts on this bias
    one.model[0].weight.requires_grad_(False)
    before = state(one.model)
    with pytest.raises(nf.FrozenParameterError, match=r"moves \['0.weight'\], which do not require gradients"):
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.model.state_dict().items())
    one.model[0].weight.requires_grad_(True)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_a_model_in_16_bits_is_moved_in_float64_and_rounded_once(dtype: torch.dtype, rounding: float) -> None:
    """`change` is the difference of the losses as the model computes them; weights are those nearest in their type."""
    one = case("diagonal")
    net, batch = one.model.to(dtype), tuple(tensor.to(dtype) for tensor in one.batch)
    noise = nf.estimate_noise(net, one.loss, [batch], one.symmetries, dtype=torch.float64)
    equilibrium = nf.solve_equilibrium(noise, SGD, net)
    losses = one.loss(net, batch).detach().double()
    moved = nf.rebalance_(net, equilibrium, one.loss, batch)
    after = one.loss(net, batch).detach().double()
    assert moved.change == pytest.approx(((after - losses).abs() / losses.clamp_min(losses.mean())).max().item())
    assert moved.change < 20 * rounding
    for name, parameter in net.named_parameters():
        assert parameter.dtype is dtype
        exact = equilibrium.params[name]
        assert ((parameter.double() - exact).abs() <= rounding * exact.abs() + torch.finfo(dtype).tiny).all()


def test_symmetries_at_rest_move_nothing_and_their_parameters_are_not_touched() -> None:
    one = case("scalar and diagonal on shared tensors")
    names = {"second": one.symmetries["second"]}
    x = {"second": torch.zeros(4).double()}
    equilibrium = checks.moved_by(equilibrium_of(one), one.model, names, x)
    versions = [parameter._version for parameter in one.model.parameters()]
    assert nf.rebalance_(one.model, equilibrium, one.loss, one.batch).change == 0.0
    assert [parameter._version for parameter in one.model.parameters()] == versions
    x["second"][0] = 0.1
    equilibrium = checks.moved_by(equilibrium, one.model, names, x)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    written = [parameter._version > old for parameter, old in zip(one.model.parameters(), versions, strict=True)]
    assert written == [False, True, True]

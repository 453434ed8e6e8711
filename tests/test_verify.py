"""Certificates: symmetries leave rounding, everything else shows."""

import pytest
import torch
from torch import nn

import checks
import noetherflow as nf
from cases import Case, case, cases, mlp, rescaling, squared_error


@pytest.mark.parametrize("one", cases(), ids=str)
def test_a_symmetry_leaves_only_rounding(one: Case) -> None:
    checks.symmetry_holds(one)


@pytest.mark.parametrize("one", [one for one in cases() if one.wrong], ids=str)
def test_a_false_declaration_shows(one: Case) -> None:
    for symmetry in one.wrong.values():
        residual = nf.verify_symmetry(one.model, one.loss, one.batch, symmetry)
        assert residual.loss > 1e-3
        assert residual.gradient > 1e-6  # rounding leaves 1e-16


def test_smooth_units_have_no_rescaling() -> None:
    one = case("diagonal")
    smooth = mlp(4, 5, 3, activation=nn.Tanh).double()
    residual = nf.verify_symmetry(smooth, squared_error, one.batch, rescaling(0))
    assert residual > 1e-3


def test_the_worst_example_is_named() -> None:
    one = case("diagonal")
    wrong = one.wrong["hidden"]
    x, y = one.batch
    weights = torch.zeros(len(x)).double()
    weights[3] = 1.0

    def only_the_fourth(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return squared_error(model, batch[:2]) * batch[2]

    assert nf.verify_symmetry(one.model, only_the_fourth, (x, y, weights), wrong).example == 3


def test_a_model_in_float32_is_checked_in_float64_and_left_alone() -> None:
    one = case("diagonal, coupled layers")
    model = one.model.float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for symmetry in one.symmetries.values():
        assert nf.verify_symmetry(model, one.loss, one.batch, symmetry) < 1e-11
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.float32 and tensor.grad is None for tensor in model.parameters())


def test_dropout_breaks_a_rotation_but_no_rescaling() -> None:
    one = case("diagonal")
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    plus, minus = (nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)), nf.Axis("3.weight", 1)
    assert nf.verify_symmetry(net, one.loss, one.batch, nf.DiagonalSymmetry(plus, minus)) < 1e-11
    linear = nn.Sequential(net[0], nn.Identity(), net[2], net[3])
    rotation = nf.MatrixSymmetry(plus, minus)
    assert nf.verify_symmetry(linear, one.loss, one.batch, rotation) > 1e-3
    assert nf.verify_symmetry(linear.eval(), one.loss, one.batch, rotation) < 1e-11


def test_random_state_and_gradients_are_as_they_were() -> None:
    one = case("diagonal")
    one.loss(one.model, one.batch).sum().backward()
    gradients = [p.grad.clone() for p in one.model.parameters()]
    state = torch.get_rng_state()
    nf.verify_symmetry(one.model, one.loss, one.batch, one.symmetries["hidden"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(one.model.parameters(), gradients, strict=True))


def test_a_loss_that_becomes_nan_is_changed_beyond_measure() -> None:
    one = case("diagonal")
    start = one.model[0].weight.detach().norm()

    def fragile(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        moved = (model[0].weight.norm() - start).abs() > 1e-6
        return squared_error(model, batch) * torch.where(moved, torch.nan, 1.0)

    assert nf.verify_symmetry(one.model, fragile, one.batch, one.symmetries["hidden"]).loss == torch.inf


def test_a_loss_that_jumps_shows_only_in_finite_moves_and_one_that_pretends_only_in_gradients() -> None:
    """Both parts are needed: each sees what the other does not."""
    one = case("diagonal")
    start = one.model[0].weight.detach().norm()

    def jumps(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return squared_error(model, batch) + ((model[0].weight.norm() - start).abs() > 1e-6)

    def pretends(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        size = model[0].weight.square().sum()
        return squared_error(model, batch) + size - size.detach()

    jump, pretence = (
        nf.verify_symmetry(one.model, loss, one.batch, one.symmetries["hidden"]) for loss in (jumps, pretends)
    )
    assert jump.loss > 1e-2
    assert jump.gradient < 1e-12
    assert pretence.loss < 1e-12
    assert pretence.gradient > 1e-3
    assert (float(jump), float(pretence)) == (jump.loss, pretence.gradient)

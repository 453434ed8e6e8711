"""The state of an optimizer moves with the parameters, and training continues where it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases

SGD = nf.SGD(0.1, 5, 0.02)
Optimizer = torch.optim.Optimizer
Make = Callable[[Any], Optimizer]
SCALINGS = [one.name for one in cases() if all(s.action is nf.Action.SCALES_ENTRIES for s in one.symmetries.values())]

# Every option of the optimizers that changes their state or the way in which they write it.
FLAVOURS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "SGD, Nesterov": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, foreach=True),
    "SGD, fused": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "Adam, foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW, AMSGrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "AdamW, two groups": lambda params: torch.optim.AdamW(
        [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim <= 1], "lr": 0.001}]
    ),
}


def step(one: Case, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    one.loss(one.model, one.batch).mean().backward()
    optimizer.step()


def started(make: Make, name: str, steps: int = 3) -> tuple[Case, Optimizer]:
    one = case(name)
    optimizer = make(list(one.model.parameters()))
    for _ in range(steps):
        step(one, optimizer)
    return one, optimizer


def equilibrium_of(one: Case) -> nf.Equilibrium:
    return nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)


def move(one: Case, optimizer: Optimizer | None, **more: Any) -> dict[str, Tensor]:
    """Move to the equilibrium, which is returned as parameters."""
    equilibrium = equilibrium_of(one)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer, **more)
    return equilibrium.params


def state_of(one: Case, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """A copy of the state by parameter name."""
    return {name: copy.deepcopy(optimizer.state[p]) for name, p in one.model.named_parameters() if p in optimizer.state}


def group_element(one: Case, equilibrium: nf.Equilibrium) -> Tensor:
    """The group element as a matrix on all parameters flattened, from generators that are built entry by entry."""
    element = torch.eye(sum(p.numel() for p in one.model.parameters()), dtype=torch.float64)
    for name, symmetry in equilibrium.symmetries.items():
        generator = oracles.generator(symmetry, one.model, equilibrium.coordinates[name])
        element = torch.linalg.matrix_exp(generator) @ element
    return element


@pytest.mark.parametrize("make", FLAVOURS.values(), ids=FLAVOURS)
@pytest.mark.parametrize("name", SCALINGS)
def test_averages_of_gradients_and_of_their_squares_follow_a_scaling_exactly(make: Make, name: str) -> None:
    """With f the quotient of the weights, entry by entry: averages are divided by f, those of squares by f^2."""
    one, optimizer = started(make, name)
    before, weights = state_of(one, optimizer), copy.deepcopy(one.params)
    move(one, optimizer)
    factors = {key: one.params[key] / weights[key] for key in weights}
    assert max((f - 1).abs().max() for f in factors.values()) > 0.05  # or it would not matter how the state moves
    after = state_of(one, optimizer)
    powers = {"momentum_buffer": -1, "exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2, "step": 0}
    assert after.keys() == before.keys() == weights.keys()
    for key, entries in before.items():
        assert after[key].keys() == entries.keys() != set()
        for kind, tensor in entries.items():
            expected = tensor * factors[key] ** powers[kind] if powers[kind] else tensor
            torch.testing.assert_close(after[key][kind], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["diagonal", "matrix", "dense, eigenvalues 1 and -2", "a tied weight in both roles"])
def test_momentum_moves_like_a_gradient(name: str) -> None:
    """Momentum that is a gradient before the move is the gradient of the moved model after it, by autograd."""
    one, optimizer = started(lambda params: torch.optim.SGD(params, lr=0.0, momentum=0.9), name, steps=1)
    before = state_of(one, optimizer)
    move(one, optimizer)
    one.model.zero_grad()
    one.loss(one.model, one.batch).mean().backward()
    after = state_of(one, optimizer)
    for key, parameter in one.model.named_parameters():
        torch.testing.assert_close(after[key]["momentum_buffer"], parameter.grad, rtol=1e-9, atol=1e-12)
    gaps = [(after[key]["momentum_buffer"] - before[key]["momentum_buffer"]).abs().max() for key in before]
    assert max(gaps) > 1e-3  # or it would not matter how it moves


@pytest.mark.parametrize("name", ["matrix", "slices of packed matrices"])
def test_second_moments_of_mixed_rows_are_the_diagonal_of_the_transported_covariance(name: str) -> None:
    one, optimizer = started(FLAVOURS["AdamW, AMSGrad"], name)
    before, equilibrium = state_of(one, optimizer), equilibrium_of(one)
    inverse = torch.linalg.inv(group_element(one, equilibrium))
    with pytest.warns(UserWarning, match="are estimates after the move, because a symmetry mixes rows") as caught:
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    mixed = {key for s in one.symmetries.values() if s.action is nf.Action.MIXES_ROWS for key in s.names}
    assert all((repr(key) in str(caught[0].message)) == (key in mixed) for key in before)
    after = state_of(one, optimizer)
    for kind in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        old = oracles.flat({key: entries[kind] for key, entries in before.items()})
        new = oracles.flat({key: entries[kind] for key, entries in after.items()})
        covariance = inverse @ old.diag() @ inverse.mT
        expected = inverse @ old if kind == "exp_avg" else covariance.diagonal()
        torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-15)
        assert (new - old).abs().max() > 1e-2 * old.abs().max()
    step(one, optimizer)


def test_variances_of_a_tensor_in_two_roles_are_mixed_along_both_axes() -> None:
    """Rows grow as columns shrink: w -> e^x w e^-x, and a variance is a sum of squares times variances."""
    symmetry = nf.MatrixSymmetry(plus=nf.Axis("w", 0), minus=nf.Axis("w", 1))
    x = torch.tensor([[0.5, 0.2, 0.0], [0.2, -0.3, 0.1], [0.0, 0.1, 0.4]], dtype=torch.float64)
    variances = {"w": torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3), "u": torch.ones(2)}
    rows, columns = torch.linalg.matrix_exp(x), torch.linalg.matrix_exp(-x)
    # Row by row, the matrix of w -> A w B is the Kronecker product of A and the transpose of B.
    element = torch.kron(rows.contiguous(), columns.mT.contiguous())
    expected = (element.square() @ variances["w"].flatten()).view(3, 3)
    mixed = symmetry.act_on_variances(x, variances)
    torch.testing.assert_close(mixed["w"], expected)
    assert mixed["u"] is variances["u"]


def test_a_state_that_is_reset_starts_like_a_new_optimizer() -> None:
    """Step count included: the first step after the move has the bias correction of a first step."""
    one, optimizer = started(FLAVOURS["AdamW"], "matrix")
    with pytest.warns(UserWarning, match="starts afresh, step count included") as caught:
        move(one, optimizer, second_moments="reset")
    assert len(caught) == 1
    assert all((repr(key) in str(caught[0].message)) == (key != "1.bias") for key in one.params)
    assert state_of(one, optimizer).keys() == {"1.bias"}
    twin = copy.deepcopy(one)
    new = FLAVOURS["AdamW"](list(twin.model.parameters()))
    step(one, optimizer)
    step(twin, new)
    for key, tensor in one.params.items():
        assert torch.equal(tensor, twin.params[key]) == (key != "1.bias")
        assert optimizer.state[one.model.get_parameter(key)]["step"] == (4 if key == "1.bias" else 1)


def test_under_a_scaling_nothing_is_reset() -> None:
    one, optimizer = started(FLAVOURS["AdamW"], "diagonal")
    move(one, optimizer, second_moments="reset")
    assert all(entries["step"] == 3 for entries in state_of(one, optimizer).values())


def test_a_scaling_that_shares_tensors_with_a_rotation_keeps_the_state_that_only_it_moves() -> None:
    one, optimizer = started(FLAVOURS["AdamW"], "slices of packed matrices")
    only = {"ReLU head": one.symmetries["ReLU head"]}
    x = {"ReLU head": torch.tensor([0.3, -0.2]).double()}
    equilibrium = checks.moved_by(equilibrium_of(one), one.model, only, x)
    before = state_of(one, optimizer)["inner.weight"]["exp_avg_sq"]
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    after = state_of(one, optimizer)["inner.weight"]["exp_avg_sq"]
    assert torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2:], before[2:] * torch.tensor([[-0.6], [0.4]]).double().exp())


@pytest.mark.parametrize("second_moments", ["transport", "reset"])
def test_second_moments_of_mixed_entries_always_start_afresh(second_moments: str) -> None:
    one, optimizer = started(FLAVOURS["Adam"], "dense, eigenvalues 1 and -2")
    with pytest.warns(UserWarning, match=r"\['u', 'w'\] starts afresh"):
        move(one, optimizer, second_moments=second_moments)
    assert not optimizer.state


@pytest.mark.parametrize("make", FLAVOURS.values(), ids=FLAVOURS)
@pytest.mark.parametrize("name", ["diagonal", "matrix"])
def test_before_the_first_step_there_is_nothing_to_move(make: Make, name: str) -> None:
    one, optimizer = started(make, name, steps=0)
    move(one, optimizer)
    assert not optimizer.state
    step(one, optimizer)


def test_parameters_that_the_optimizer_does_not_train_have_no_state() -> None:
    one = case("diagonal")
    optimizer = torch.optim.AdamW(one.model[0].parameters())
    step(one, optimizer)
    before, bias = state_of(one, optimizer), one.params["0.bias"].clone()
    factor = move(one, optimizer)["0.bias"] / bias
    after = state_of(one, optimizer)
    assert after.keys() == before.keys() == {"0.weight", "0.bias"}
    torch.testing.assert_close(after["0.bias"]["exp_avg"], before["0.bias"]["exp_avg"] / factor)
    assert (factor - 1).abs().max() > 0.05


def test_state_in_another_type_keeps_its_type() -> None:
    one, optimizer = started(FLAVOURS["AdamW"], "diagonal")
    for entries in optimizer.state.values():
        entries["exp_avg_sq"] = entries["exp_avg_sq"].float()
    before, weights = state_of(one, optimizer), copy.deepcopy(one.params)
    move(one, optimizer)
    after = state_of(one, optimizer)["0.weight"]["exp_avg_sq"]
    exact = before["0.weight"]["exp_avg_sq"].double() * (weights["0.weight"] / one.params["0.weight"]) ** 2
    assert after.dtype is torch.float32
    assert ((after - exact).abs() <= 1.2e-7 * exact).all()


class Kept(torch.optim.SGD):
    """An optimizer with an entry of its own in the state."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for state in self.state.values():
            state["curvature"] = torch.ones(3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            torch.optim.RMSprop,
            "SGD, Adam and AdamW moves with the parameters, got RMSprop",
        ),
        (lambda _: torch.optim.SGD(nn.Linear(4, 5).parameters()), "holds none of the model's 4 parameters"),
        (lambda params: Kept(params, lr=0.0, momentum=0.9), r"keeps \['curvature'\] for '0.weight'"),
    ],
)
def test_an_optimizer_whose_state_is_unknown_is_refused_before_anything_moves(make: Make, words: str) -> None:
    one = case("diagonal")
    optimizer = make(list(one.model.parameters()))
    step(one, optimizer)
    before = {name: tensor.clone() for name, tensor in one.params.items()}
    state = state_of(one, optimizer)
    with pytest.raises(nf.SettingsError, match=words):
        move(one, optimizer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.params.items())
    assert str(state_of(one, optimizer)) == str(state)


def test_a_misspelt_choice_is_refused() -> None:
    one = case("diagonal")
    with pytest.raises(nf.SettingsError, match=r"second_moments must be one of \('transport', 'reset'\), got 'rest'"):
        move(one, None, second_moments="rest")

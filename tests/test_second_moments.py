"""Second moments as Adam keeps them: averages by hand, and no data once they are read; tables and files."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from same import differences, require_same

Optimizer = torch.optim.Optimizer
EXACT = {"rtol": 1e-12, "atol": 0.0}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def hidden() -> dict[str, nf.Symmetry]:
    into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
    return {"hidden": nf.DiagonalSymmetry(into, out_of)}


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 7) -> list[dict[str, Tensor]]:
    """The gradients of every step."""
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator).double()).square().mean().backward()
        history.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return history


def by_dimension(model: nn.Module, **more: Any) -> list[dict[str, Any]]:
    """Weights with decay, and biases with other betas and without decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1, **more}, {"params": vectors, "weight_decay": 0.0}]


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.9)),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), fused=True),
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True),
    "no average of squares": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.0)),
    "two groups": lambda model: torch.optim.AdamW(by_dimension(model, betas=(0.8, 0.95)), lr=0.01),
    "named": lambda model: torch.optim.AdamW(reversed([*model.named_parameters()]), lr=0.01),
}


def averaged(history: list[dict[str, Tensor]], beta: float, name: str) -> Tensor:
    """The average of squares with weights (1 - beta) beta^k, which are divided by their sum."""
    weights = [(1 - beta) * beta**k for k in range(len(history))][::-1]
    squares = [gradients[name].square() for gradients in history]
    return sum(w * square for w, square in zip(weights, squares, strict=True)) / sum(weights)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_average_of_squares_is_that_of_the_gradients(maker: str) -> None:
    model = network()
    optimizer = MAKERS[maker](model)
    history = trained(model, optimizer)
    moments = nf.second_moments(optimizer, model, hidden())
    betas = {id(p): group["betas"][1] for group in optimizer.param_groups for p in group["params"]}
    assert set(moments.steps.values()) == {7}
    for name, parameter in model.named_parameters():
        expected = averaged(history, betas[id(parameter)], name)
        torch.testing.assert_close(moments.values[name], expected, **EXACT)
        # The twin: what the optimizer holds is smaller, until it is corrected.
        raw = optimizer.state[parameter]["exp_avg_sq"]
        assert betas[id(parameter)] == 0.0 or not torch.allclose(raw, expected, rtol=0.1)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_state_dict_and_a_file_hold_what_the_optimizer_holds(maker: str, tmp_path: Path) -> None:
    model = network()
    optimizer = MAKERS[maker](model)
    trained(model, optimizer)
    live = nf.second_moments(optimizer, model, hidden())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for source in (optimizer.state_dict(), tmp_path / "optimizer.pt", str(tmp_path / "optimizer.pt"), tmp_path):
        saved = nf.second_moments(source, copy.deepcopy(model), hidden())
        require_same(dataclasses.replace(saved, values={n: saved.values[n] for n in live.values}).values, live.values)
        assert (saved.steps, saved.eps, saved.without) == (live.steps, live.eps, live.without)
    # A snapshot: what the optimizer does next does not change it.
    before = {name: tensor.clone() for name, tensor in live.values.items()}
    trained(model, optimizer, 1)
    require_same(live.values, before)


def test_a_parameter_without_a_step_is_left_out_and_named() -> None:
    model = nn.ModuleDict({"used": network(), "idle": nn.Linear(4, 3).double()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model["used"], optimizer)
    idle = {"idle": nf.DiagonalSymmetry([nf.Axis("idle.weight", 0)], [nf.Axis("idle.weight", 1, 0, 3)])}
    for source in (optimizer, optimizer.state_dict()):
        moments = nf.second_moments(source, model)
        assert moments.without == ("idle.weight", "idle.bias")
        assert list(moments.values) == [f"used.{name}" for name, _ in model["used"].named_parameters()]
        assert "left out: idle.weight, idle.bias" in str(moments)
        with pytest.raises(nf.ParameterNameError, match=r"'idle' acts on \['idle.weight'\], which have taken no step"):
            nf.second_moments(source, model, idle)
        with pytest.raises(nf.ParameterNameError, match="have taken no step"):
            moments.for_symmetries(idle)
    # A parameter that no group holds is not trained at all.
    partly = torch.optim.AdamW(model["used"].parameters(), lr=0.01)
    trained(model["used"], partly)
    assert nf.second_moments(partly, model).without == ()
    with pytest.raises(nf.ParameterNameError, match="not among the optimizer's parameters"):
        nf.second_moments(partly, model, idle)


def test_a_state_after_zero_steps_is_no_state() -> None:
    """As of a parameter whose state was made and never used: a / (1 - beta^0) is no average."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer)
    optimizer.state[model[2].bias]["step"].zero_()
    for source in (optimizer, optimizer.state_dict()):
        moments = nf.second_moments(source, model, hidden())
        assert (moments.without, "2.bias" in moments.values) == (("2.bias",), False)


def test_symmetries_are_attached_later_and_restricted() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer)
    two = hidden() | {"out": nf.ScalarSymmetry(plus=nf.Axis("2.bias", 0))}
    moments = nf.second_moments(optimizer, model)
    assert moments.symmetries == {}
    later = moments.for_symmetries(two)
    require_same(later, nf.second_moments(optimizer, model, two))
    assert list(later.select("out").symmetries) == ["out"]
    with pytest.raises(nf.ParameterNameError, match=r"no symmetries \['in'\]"):
        later.select("in")
    with pytest.raises(nf.ParameterNameError, match=r"acts on \['0.mass'\]"):
        moments.for_symmetries({"in": nf.ScalarSymmetry(plus=nf.Axis("0.mass", 0))})
    with pytest.raises(nf.ParameterShapeError):
        moments.for_symmetries({"in": nf.DiagonalSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.bias", 0)])})


def test_a_tied_weight_has_any_of_its_names() -> None:
    model = network()
    model.add_module("again", model[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(nn.Sequential(model[0], model[1], model[2]), optimizer)
    axes = nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("again.weight", 1)])
    expected = nf.second_moments(optimizer, model, hidden())
    require_same(nf.second_moments(optimizer, model, {"hidden": axes}), expected)
    require_same(nf.second_moments(optimizer, model).for_symmetries({"hidden": axes}, model), expected)
    with pytest.raises(nf.ParameterNameError, match=r"again\.weight"):
        nf.second_moments(optimizer, model).for_symmetries({"hidden": axes})


# Where eps matters.


def by_hand(v: dict[str, Tensor], eps: float) -> float:
    """What the force v / (sqrt v + eps) lacks of sqrt v, as a share of it, entry by entry."""
    taken = total = 0.0
    for name in ("0.weight", "0.bias", "2.weight"):
        for value in v[name].flatten().tolist():
            total += value**0.5
            taken += value**0.5 - value / (value**0.5 + eps) if value else 0.0
    return taken / total if total else 0.0


@pytest.mark.parametrize("eps", [1e-30, 0.01, 0.3, 1e3])
def test_the_share_of_the_force_that_eps_takes_away(eps: float) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=eps)
    trained(model, optimizer)
    moments = nf.second_moments(optimizer, model, hidden())
    share = moments.taken_by_eps()["hidden"]
    assert share == pytest.approx(by_hand(moments.values, eps), rel=1e-9, abs=1e-15)
    assert ("eps matters" in str(moments)) is (share > 0.01)
    assert f"{share:.1%}" in str(moments)
    assert "<table>" in moments._repr_html_()


def test_shares_are_strictly_between_nothing_and_everything_for_an_eps_in_between() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer)
    moments = nf.second_moments(optimizer, model, hidden())
    every = torch.cat([moments.values[name].flatten() for name in ("0.weight", "0.bias", "2.weight")])
    median = float(every.sqrt().median())
    middle = dataclasses.replace(moments, eps=dict.fromkeys(moments.eps, median))
    assert 0.3 < middle.taken_by_eps()["hidden"] < 0.6
    silent = {name: torch.zeros_like(tensor) for name, tensor in moments.values.items()}
    assert dataclasses.replace(moments, values=silent).taken_by_eps() == {"hidden": 0.0}


def test_the_table_counts_parameters_and_steps() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, 12)
    moments = nf.second_moments(optimizer, model, hidden())
    text = str(moments)
    assert text.startswith("Second moments of Adam (4 parameters, 23 entries, 12 steps)")
    plus = sum(moments.values[name].sqrt().sum() for name in ("0.weight", "0.bias"))
    assert f"{plus:.3g}" in text
    assert f"{moments.values['2.weight'].sqrt().sum():.3g}" in text
    older = dataclasses.replace(moments, steps=moments.steps | {"0.bias": 2000})
    assert "12 to 2,000 steps" in str(older)


def test_the_moments_are_the_same_after_a_file(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer)
    moments = nf.second_moments(optimizer, model, hidden())
    moments.save(tmp_path / "v.safetensors")
    loaded = nf.SecondMoments.load(tmp_path / "v.safetensors")
    require_same(loaded, moments)
    assert list(differences(dataclasses.replace(moments, eps=moments.eps | {"0.bias": 1e-7}), moments))
    settings = nf.AdamW.from_optimizer(optimizer)
    require_same(nf.solve_equilibrium(loaded, settings, model), nf.solve_equilibrium(moments, settings, model))

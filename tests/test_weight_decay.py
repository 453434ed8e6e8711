"""Weight decay by parameter: how settings get the names, and what they refuse."""

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases

DECAYS = {"0.weight": 0.02, "0.bias": 0.0, "2.weight": 0.02, "2.bias": 0.0}


def recipe(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]


def by_group(net: nn.Module, model: nn.Module | None = None) -> nf.SGD:
    return nf.SGD.from_optimizer(torch.optim.SGD(recipe(net), lr=0.1), batch_size=5, model=model)


def results(one: Case, sgd: nf.SGD) -> dict[str, Any]:
    """What every public function makes of the settings."""
    noise = checks.noise_of(one)
    there = nf.solve_equilibrium(noise, sgd, one.model)
    flow = nf.NoetherFlow(sgd)
    arguments = (one.model, one.loss, one.loader(), sgd, one.symmetries)
    simulated = [
        nf.simulate(one.model, one.loss, one.batch, dynamics, steps=3, symmetries=one.symmetries).params
        for dynamics in (sgd, nf.Langevin(sgd), flow)
    ]
    return {
        "drift": nf.drift(noise, sgd, one.model),
        "expected_step": nf.expected_step(noise, sgd, one.model),
        "potential": {"": nf.potential(noise, sgd, one.model)},
        "solve_equilibrium": there.params,
        "equilibrate": nf.equilibrate(*arguments, progress=False).params,
        "analyze": nf.analyze(*arguments, progress=False).equilibrium.params,
    } | dict(zip(("sgd", "langevin", "flow"), simulated, strict=True))


def test_two_groups_are_used_everywhere_like_a_mapping() -> None:
    one = case("diagonal")
    optimizer = torch.optim.SGD(recipe(one.model), lr=0.1)
    expected = results(one, nf.SGD(0.1, 5, DECAYS))
    torch.testing.assert_close(results(one, nf.SGD.from_optimizer(optimizer, batch_size=5)), expected, rtol=0, atol=0)
    single = results(one, nf.SGD(0.1, 5, 0.02))
    for function, values in expected.items():
        assert any(not torch.equal(value, single[function][name]) for name, value in values.items()), function


def test_equal_numbers_for_all_parameters_are_a_number() -> None:
    one = case("diagonal, coupled layers")
    equal = results(one, nf.SGD(0.1, 5, dict.fromkeys(one.params, 0.02)))
    torch.testing.assert_close(results(one, nf.SGD(0.1, 5, 0.02)), equal, rtol=1e-12, atol=1e-15)


def test_names_come_from_the_model_or_from_the_optimizer_or_later() -> None:
    net = case("diagonal").model
    assert by_group(net, model=net).weight_decay == DECAYS
    named = [
        {"params": [(n, p) for n, p in net.named_parameters() if (p.ndim > 1) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, 0.02), (False, 0.0))
    ]
    assert nf.SGD.from_optimizer(torch.optim.SGD(named, lr=0.1), batch_size=5) == nf.SGD(0.1, 5, DECAYS)
    later = by_group(net)
    assert "by group: 0.02, 0.0" in repr(later)
    assert later.named_by(net) == nf.SGD(0.1, 5, DECAYS)
    assert later.named_by(net).named_by(net) == later.named_by(dict(net.named_parameters())) == later.named_by(net)
    assert dataclasses.replace(copy.deepcopy(later), lr=0.2).named_by(net) == nf.SGD(0.2, 5, DECAYS)


def test_groups_of_equal_weight_decay_are_a_number() -> None:
    net = case("diagonal").model
    groups = [{"params": [parameter]} for parameter in net.parameters()] + [{"params": [], "lr": 5.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.02)
    for model in (None, net):
        assert nf.SGD.from_optimizer(optimizer, batch_size=5, model=model) == nf.SGD(0.1, 5, 0.02)
    # A parameter in no group does not move, so the number is not that of all parameters.
    some = torch.optim.SGD(net[0].parameters(), lr=0.1, weight_decay=0.02)
    assert nf.SGD.from_optimizer(some, batch_size=5, model=net).weight_decay == {"0.weight": 0.02, "0.bias": 0.02}
    net[2].requires_grad_(False)
    assert nf.SGD.from_optimizer(some, batch_size=5, model=net).weight_decay == 0.02


def test_a_tied_weight_has_any_of_its_names_and_a_single_weight_decay() -> None:
    one = case("a tied weight, named by its alias")
    decays = {"second.weight": 0.3, "out.weight": 0.1, "out.bias": 0.0}
    resolved = nf.SGD(0.1, 5, decays).named_by(one.model)
    assert resolved.weight_decay == {"first.weight": 0.3, "out.weight": 0.1, "out.bias": 0.0}
    assert by_group(one.model).named_by(one.model).gamma_of("first.weight") == 0.01
    nf.drift(checks.noise_of(one), nf.SGD(0.1, 5, decays), one.model)
    assert nf.SGD(0.1, 5, decays | {"first.weight": 0.3}).named_by(one.model) == resolved
    with pytest.raises(nf.SettingsError, match=r"'second\.weight'.* 0\.3 and 0\.1|'first\.weight'.* 0\.3 and 0\.1"):
        nf.SGD(0.1, 5, decays | {"first.weight": 0.1}).named_by(one.model)


def test_settings_keep_no_model_in_memory() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    sgd, reference = by_group(net), weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert reference() is None
    with pytest.raises(nf.SettingsError, match="none of these tensors"):
        sgd.named_by(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_settings_without_names_say_how_to_get_them() -> None:
    one = case("diagonal")
    sgd, noise = by_group(one.model), checks.noise_of(one)
    remedy = r"from_optimizer\(optimizer, batch_size=\.\.\., model=model\)"
    for function in (nf.drift, nf.expected_step, nf.potential, nf.solve_equilibrium):
        for elsewhere in (one.params, copy.deepcopy(one.model)):
            with pytest.raises(nf.SettingsError, match=remedy):
                function(noise, sgd, elsewhere)
        function(noise, sgd, dict(one.model.named_parameters()))
    with pytest.raises(nf.SettingsError, match=remedy):
        sgd.gamma_of("0.weight")
    with pytest.raises(nf.SettingsError, match=remedy):
        pickle.dumps(sgd)


def test_a_parameter_without_weight_decay_is_refused_where_a_symmetry_moves_it() -> None:
    one = case("diagonal, coupled layers")
    noise = checks.noise_of(one)
    last = noise.select("layer 4")
    held = [p for name, p in one.model.named_parameters() if not name.startswith("0.")]
    optimizer = torch.optim.SGD([{"params": [p], "weight_decay": 0.01 * k} for k, p in enumerate(held)], lr=0.1)
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=5)
    for function in (nf.drift, nf.expected_step, nf.potential, nf.solve_equilibrium):
        with pytest.raises(nf.SettingsError, match=r"'0\.weight' has no weight decay.*requires_grad_\(False\)"):
            function(noise, sgd, one.model)
        function(last, sgd, one.model)
    with pytest.raises(nf.SettingsError, match=r"'0\.weight' has no weight decay"):
        nf.analyze(one.model, one.loss, one.loader(), sgd, one.symmetries, progress=False)
    # What does not move adds nothing to differences of the potential.
    full = nf.SGD(0.1, 5, {"0.weight": 1.0, "0.bias": 1.0} | dict(sgd.named_by(one.model).weight_decay))
    x = {"layer 4": torch.full((6,), 0.3)}
    change, expected = (
        nf.potential(last, settings, one.model, x) - nf.potential(last, settings, one.model) for settings in (sgd, full)
    )
    torch.testing.assert_close(change, expected)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"momentum": 0.0}, {"momentum": 0.9}], r"share momentum, got \[0\.0, 0\.9\]"),
        ([{}, {"momentum": 0.0, "dampening": 0.1}], "dampening"),
        ([{}, {"maximize": True}], "maximize"),
        ([{}, {"weight_decay": float("inf")}], "weight_decay of group 1"),
    ],
)
def test_groups_that_differ_otherwise_are_refused(groups: list[dict[str, Any]], words: str) -> None:
    layer = nn.Linear(2, 2)
    held = [group | {"params": [p]} for group, p in zip(groups, layer.parameters(), strict=True)]
    with pytest.raises(nf.SettingsError, match=words):
        nf.SGD.from_optimizer(torch.optim.SGD(held, lr=0.1), batch_size=1)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(nf.SettingsError, match="hold none of these tensors"):
        nf.SGD.from_optimizer(optimizer, batch_size=1, model=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("decay", "words"),
    [
        ({"w": -0.1}, r"weight_decay\['w'\] must be a finite number, 0 or more, got -0\.1"),
        ({"w": 0.1, "u": float("nan")}, r"weight_decay\['u'\]"),
        ({"w": "much"}, r"weight_decay\['w'\]"),
        ({3: 0.1}, "names of parameters, got the key 3"),
        ([0.1], "weight_decay must be"),
    ],
)
def test_a_weight_decay_out_of_range_is_refused(decay: Any, words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.SGD(0.1, 4, decay)


def test_settings_by_parameter_have_no_single_gamma() -> None:
    sgd = nf.SGD(0.1, 4, {"w": 0.02, "u": 0.0})
    assert (sgd.gamma_of("w"), sgd.gamma_of("u"), nf.SGD(0.1, 4, 0.02).gamma_of("w")) == (0.01, 0.0, 0.01)
    with pytest.raises(nf.SettingsError, match=r"gamma_of\(name\)"):
        _ = sgd.gamma
    with pytest.raises(nf.SettingsError, match=r"'v' has no weight decay: weight_decay names \['u', 'w'\]"):
        sgd.gamma_of("v")


def test_settings_are_values() -> None:
    given = {"w": 0.02, "u": 0.0}
    sgd = nf.SGD(0.1, 4, given)
    given["w"] = 5.0
    assert sgd == nf.SGD(0.1, 4, {"u": 0.0, "w": 0.02}) == pickle.loads(pickle.dumps(sgd)) == copy.deepcopy(sgd)
    assert len({sgd, nf.SGD(0.1, 4, {"u": 0.0, "w": 0.02}), nf.SGD(0.1, 4, 0.02), nf.SGD(0.1, 4)}) == 3
    assert sgd != nf.SGD(0.1, 4, {"w": 0.02, "u": 0.01})


@pytest.mark.parametrize(("optimizer", "shown"), [(torch.optim.SGD, "SGD"), (torch.optim.Adam, "Adam")])
def test_an_optimizer_in_the_place_of_settings_is_answered_with_the_remedy(
    optimizer: Callable[..., Any], shown: str
) -> None:
    one = case("diagonal")
    noise, wrong = checks.noise_of(one), optimizer(one.model.parameters(), lr=0.1)
    calls: list[Callable[[], Any]] = [
        *(lambda f=f: f(noise, wrong, one.model) for f in (nf.drift, nf.expected_step, nf.potential)),
        lambda: nf.solve_equilibrium(noise, wrong, one.params),
        lambda: nf.equilibrate(one.model, one.loss, one.loader(), wrong),
        lambda: nf.analyze(one.model, one.loss, one.loader(), wrong),
        lambda: nf.simulate(one.model, one.loss, one.batch, wrong, steps=1),
        lambda: nf.Langevin(wrong),
        lambda: nf.NoetherFlow(wrong),
    ]
    for call in calls:
        with pytest.raises(nf.SettingsError, match=rf"{shown}.*from_optimizer\(optimizer, batch_size=\.\.\.\)"):
            call()
    with pytest.raises(nf.SettingsError, match=r"got float: give nf\.SGD\(lr=\.\.\., batch_size=\.\.\.\)"):
        nf.drift(noise, 0.1, one.model)


@pytest.mark.parametrize("dynamics", [nf.GradientDescent, nf.GradientFlow])
def test_gradient_descent_and_flow_have_a_single_weight_decay(dynamics: Callable[..., Any]) -> None:
    with pytest.raises(nf.SettingsError, match=r"single weight_decay.*\['w'\]"):
        dynamics(0.1, weight_decay={"w": 0.1})


def as_dense(one: Case) -> dict[str, nf.Symmetry]:
    """A generator of the first symmetry as a matrix on all parameters."""
    symmetry = next(iter(one.symmetries.values()))
    basis = oracles.coordinates(symmetry, one.params)
    x = sum((0.5 + 0.2 * k) * b for k, b in enumerate(basis))
    return {"dense": nf.DenseSymmetry(oracles.generator(symmetry, one.model, x), tuple(one.params))}


def test_a_generator_that_mixes_entries_of_each_tensor_separately_decays_exactly() -> None:
    one = case("matrix")
    one = dataclasses.replace(one, symmetries=as_dense(one))
    generator = one.symmetries["dense"].generator
    assert not torch.equal(generator, torch.diag(generator.diagonal()))
    checks.step_matches_torch(one, 2, one.decays, replacement=True)
    checks.equilibrium_matches_scipy(one, one.decays)
    checks.potential_matches_definition(one, one.decays)


def test_a_generator_that_mixes_parameters_of_different_weight_decay_is_refused() -> None:
    class Sum(nn.Module):
        """A scale-invariant function of two coordinates in a rotated basis."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.3, 0.4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.a + self.b) * (self.a - self.b)

    one = Case("mixing", Sum(), lambda m, x: (m(x) - 1).square().sum(1), torch.randn(8, 1).double(), {})
    one = dataclasses.replace(
        one, symmetries={"mix": nf.DenseSymmetry(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), names=("a", "b"))}
    )
    assert nf.verify_symmetry(one.model, one.loss, one.batch, one.symmetries["mix"]) < 1e-11
    noise = nf.estimate_noise(one.model, one.loss, [one.batch], one.symmetries)
    mixed, equal = ({"a": 0.1, "b": decay} for decay in (0.2, 0.1))
    for function in (nf.drift, nf.expected_step, nf.potential, nf.solve_equilibrium):
        function(noise, nf.SGD(0.1, 2, equal), one.model)
        with pytest.raises(nf.SettingsError, match="mixes entries of parameters with different weight decay"):
            function(noise, nf.SGD(0.1, 2, mixed), one.model)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_forces_of_a_single_weight_decay_are_those_of_the_mapping(one: Case) -> None:
    noise = checks.noise_of(one)
    rates = nf.drift(noise, nf.SGD(0.1, 5, 0.3), one.model)
    torch.testing.assert_close(rates, nf.drift(noise, nf.SGD(0.1, 5, dict.fromkeys(one.params, 0.3)), one.model))

"""Parameter groups with other learning rates and decays, anchored to `torch.optim` by enumeration of minibatches."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
import oracles
from cases import Case, case, cases

COUNT, TIGHT = 4, {"rtol": 1e-9, "atol": 1e-13}
# The average of squares of gradients stays as it is, and its correction for the start is over.
HELD, LONG = 1 - 1e-12, 1e14
# So small that it counts only where there is no gradient, and Adam would divide zero by zero.
EPS = 1e-30
SCALINGS = [one for one in cases() if all(s.action is nf.Action.SCALES_ENTRIES for s in one.symmetries.values())]


def rates_of(one: Case, values: tuple[float, ...] = (0.1, 0.03, 0.2)) -> dict[str, float]:
    """A learning rate for each parameter."""
    return dict(zip(one.params, itertools.cycle(values), strict=False))


def groups(model: nn.Module, lr: Mapping[str, float], decay: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr[n], "weight_decay": decay[n]} for n, p in model.named_parameters()]


def conserved(one: Case, model: nn.Module, steps: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """The charges of parameters over the square roots of their step sizes."""
    params = {
        name: tensor.detach() / torch.as_tensor(steps[oracles.canonical(model, name)], dtype=torch.float64).sqrt()
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    return {name: symmetry.charge(params) for name, symmetry in one.symmetries.items()}


def few(one: Case) -> tuple[Tensor, ...]:
    return tuple(tensor[:COUNT] for tensor in one.batch)


def mean_change(
    one: Case, make: Any, batch_size: int, steps: Mapping[str, Tensor | float], *, replacement: bool
) -> dict[str, Tensor]:
    """The mean over every minibatch of what a step of an optimizer does to each charge."""
    x, y = few(one)
    total: dict[str, Tensor] = {}
    batches = oracles.minibatches(COUNT, batch_size, replacement=replacement)
    for chosen in batches:
        model, index = copy.deepcopy(one.model), torch.tensor(chosen)
        optimizer = make(model)
        one.loss(model, (x[index], y[index])).mean().backward()
        before = conserved(one, model, steps)
        optimizer.step()
        for name, charge in conserved(one, model, steps).items():
            total[name] = total.get(name, 0) + (charge - before[name]) / len(batches)
    return total


def second_moments(one: Case, batch_size: int, *, replacement: bool) -> dict[str, Tensor]:
    """E g_S^2 of every entry, over every minibatch."""
    stack = oracles.stacked(one.model, one.loss, few(one))
    batches = oracles.minibatches(COUNT, batch_size, replacement=replacement)
    return {
        name: torch.stack([grads[list(chosen)].mean(0).square() for chosen in batches]).mean(0)
        for name, grads in stack.items()
    }


def adamw_at(
    model: nn.Module, v: Mapping[str, Tensor], lr: Mapping[str, float], decay: Mapping[str, float]
) -> torch.optim.AdamW:
    """AdamW whose average of squares is v, and without an average of gradients."""
    optimizer = torch.optim.AdamW(groups(model, lr, decay), betas=(0.0, HELD), eps=EPS)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(LONG, dtype=torch.float64),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": v[name].clone(),
        }
    return optimizer


@pytest.mark.parametrize("one", cases(), ids=str)
@pytest.mark.parametrize(("batch_size", "replacement"), [(1, True), (2, True), (2, False), (4, False)])
def test_a_step_of_sgd_with_groups(one: Case, batch_size: int, replacement: bool) -> None:
    lr, decay = rates_of(one), {name: 4 * value for name, value in one.decays.items()}
    optimizer = torch.optim.SGD(groups(one.model, lr, decay), lr=9.0)
    size = {} if replacement else {"replacement": False, "dataset_size": COUNT}
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=batch_size, model=one.model, **size)
    noise = nf.estimate_noise(one.model, one.loss, [few(one)], one.symmetries)
    expected, rates = nf.expected_step(noise, sgd, one.model), nf.drift(noise, sgd, one.model)
    measured = mean_change(
        one, lambda model: torch.optim.SGD(groups(model, lr, decay), lr=9.0), batch_size, lr, replacement=replacement
    )
    finite = nf.SGD(sgd.lr, batch_size, sgd.weight_decay, finite_step=True, **size)
    finite_rates = nf.drift(noise, finite, one.model)
    for name, symmetry in noise.symmetries.items():
        if torch.isnan(expected[name]).any():
            # The twin: parameters on one side of the symmetry have several learning rates, and it has no charge.
            assert torch.isnan(rates[name]).all()
            assert symmetry.action is not nf.Action.SCALES_ENTRIES
            continue
        unit = 1.0 if len(one.params) > 1 else lr[next(iter(lr))]
        scale = 1.0 if isinstance(sgd.lr, Mapping) else 1 / unit
        torch.testing.assert_close(measured[name], scale * expected[name], **TIGHT)
        # What a step of finite size adds to the drift: the charge of the mean gradient of loss and weight decay.
        mean = {p: lr[p] ** 0.5 * (noise.mean[p] + decay[p] * one.params[p]) for p in symmetry.names}
        torch.testing.assert_close(measured[name], rates[name] + symmetry.charge(mean), **TIGHT)
        of_loss = {p: lr[p] ** 0.5 * noise.mean[p] for p in symmetry.names}
        torch.testing.assert_close(finite_rates[name], rates[name] + symmetry.charge(of_loss), **TIGHT)


@pytest.mark.parametrize("one", SCALINGS, ids=str)
@pytest.mark.parametrize(("batch_size", "replacement"), [(1, True), (2, True), (2, False)])
def test_a_step_of_adamw_with_groups(one: Case, batch_size: int, replacement: bool) -> None:
    lr, decay = rates_of(one), {name: 40 * value for name, value in one.decays.items()}
    v = second_moments(one, batch_size, replacement=replacement)
    steps = {name: lr[name] / (tensor.sqrt() + EPS) for name, tensor in v.items()}
    size = {} if replacement else {"replacement": False, "dataset_size": COUNT}
    adamw = nf.AdamW.from_optimizer(adamw_at(one.model, v, lr, decay), batch_size=batch_size, model=one.model, **size)
    noise = nf.estimate_noise(one.model, one.loss, [few(one)], one.symmetries)
    expected, rates = nf.expected_step(noise, adamw, one.model), nf.drift(noise, adamw, one.model)
    measured = mean_change(one, lambda model: adamw_at(model, v, lr, decay), batch_size, steps, replacement=replacement)
    for name, symmetry in noise.symmetries.items():
        scale = (symmetry.charge_of(symmetry.grams(one.params)).abs().max() / min(lr.values())).item()
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-8, atol=1e-12 * (1 + scale))
        # The drift neglects the square of the weight decay, and what decay and mean gradient do together.
        both, mean = ({} for _ in range(2))
        for p in symmetry.names:
            mean[p] = steps[p].sqrt() * noise.mean[p]
            both[p] = mean[p] + lr[p] * decay[p] * one.params[p] / steps[p].sqrt()
        rest = symmetry.charge(both) - symmetry.charge(mean)
        torch.testing.assert_close(measured[name], rates[name] + rest, rtol=1e-8, atol=1e-12 * (1 + scale))


def test_groups_with_the_learning_rate_of_another_group_are_wrong() -> None:
    one = case("diagonal")
    lr, decay = rates_of(one), one.decays
    noise = nf.estimate_noise(one.model, one.loss, [few(one)], one.symmetries)
    measured = mean_change(
        one, lambda model: torch.optim.SGD(groups(model, lr, decay), lr=9.0), 2, lr, replacement=True
    )["hidden"]
    for wrong in (rates_of(one, (0.03, 0.1, 0.2)), dict.fromkeys(lr, 0.1)):
        found = nf.expected_step(noise, nf.SGD(wrong, 2, decay), one.model)["hidden"]
        assert (found - measured).norm() > 0.1 * measured.norm()


def test_names_of_groups_come_from_model_optimizer_or_later() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    recipe = [
        {"params": [net[0].weight, net[2].weight], "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.99)},
        {"params": [net[0].bias, net[2].bias], "lr": 0.3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(recipe)
    adamw = nf.AdamW.from_optimizer(optimizer, model=net)
    assert adamw.lr == {"0.weight": 0.1, "2.weight": 0.1, "0.bias": 0.3, "2.bias": 0.3}
    assert adamw.decay_of("0.bias") == 0.0
    assert adamw.betas_of("2.weight") == (0.8, 0.99)
    assert adamw.betas_of("2.bias") == (0.9, 0.999)
    assert nf.AdamW.from_optimizer(optimizer).named_by(net) == adamw
    with pytest.raises(nf.SettingsError, match=r"model=model"):
        nf.AdamW.from_optimizer(optimizer).lr_of("0.weight")
    with pytest.raises(nf.SettingsError, match=r"'1\.bias' has no learning rate"):
        adamw.lr_of("1.bias")
    assert nf.AdamW.from_optimizer(torch.optim.Adam(net.parameters(), weight_decay=0.1)).decoupled is False
    assert nf.AdamW.from_optimizer(torch.optim.AdamW(net.parameters())) == nf.AdamW()


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad=True divides by the largest v"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "maximize=True"),
        (lambda p: torch.optim.AdamW([{"params": [q], "eps": 1e-8 * k} for k, q in enumerate(p, 1)]), "share eps"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "got SGD.*nf.SGD.from_optimizer"),
        (lambda p: torch.optim.RMSprop(p), "got RMSprop.*not covered"),
    ],
)
def test_what_adamw_does_not_cover_is_refused(optimizer: Any, words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.AdamW.from_optimizer(optimizer(list(nn.Linear(2, 2).parameters())))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": {"w": -1.0}}, r"lr\['w'\]"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": {3: 0.1}}, "the key 3"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "replacement": False}, "dataset_size"),
    ],
)
def test_settings_of_adamw_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.AdamW(**settings)


def test_the_noise_of_examples_needs_the_batch_size() -> None:
    one = case("diagonal")
    noise = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries)
    for function in (nf.drift, nf.potential, nf.solve_equilibrium, nf.expected_step):
        with pytest.raises(nf.SettingsError, match=r"nf\.AdamW\(\.\.\., batch_size=\.\.\.\)"):
            function(noise, nf.AdamW(), one.model)
        function(noise, nf.AdamW(batch_size=4), one.model)


def test_a_symmetry_that_mixes_entries_has_no_charge_under_adamw() -> None:
    one = case("matrix")
    noise = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries)
    adamw = nf.AdamW(batch_size=4)
    assert torch.isnan(nf.drift(noise, adamw, one.model)["rotation"]).all()
    equilibrium = nf.solve_equilibrium(noise, adamw, one.model)
    assert equilibrium.status is nf.Status.NO_CHARGE
    assert "DiagonalSymmetry along the same axes" in equilibrium.message
    assert not equilibrium.coordinates["rotation"].any()
    # The scalings in it have a charge.
    rotation = one.symmetries["rotation"]
    scalings = {"scalings": nf.DiagonalSymmetry(rotation.plus, rotation.minus)}
    scaled = nf.solve_equilibrium(nf.estimate_noise(one.model, one.loss, one.loader(), scalings), adamw, one.model)
    assert scaled.status is nf.Status.CONVERGED


def test_a_dead_neuron_and_eps_of_zero() -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[1], one.model[0].bias[1] = 0.0, -1.0
    noise = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries)
    settings = [nf.AdamW(lr=0.01, weight_decay=0.1, eps=eps, batch_size=4) for eps in (0.0, 1e-30)]
    zero, small = (nf.expected_step(noise, adamw, one.model)["hidden"] for adamw in settings)
    assert torch.isfinite(zero).all()
    torch.testing.assert_close(zero, small, rtol=1e-9, atol=1e-12)
    # The solver leaves a neuron without a gradient where it is, whatever eps.
    for adamw in (*settings, nf.AdamW(lr=0.01, weight_decay=0.1, eps=1e-8, batch_size=4)):
        equilibrium = nf.solve_equilibrium(noise, adamw, one.model)
        assert equilibrium.status is nf.Status.SINGULAR
        assert equilibrium.coordinates["hidden"][1] == 0.0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda v: {n: t.float() for n, t in v.items()}, nf.ParameterShapeError, "expected float64"),
        (lambda v: {n: -t for n, t in v.items()}, nf.ParameterShapeError, "below 0"),
        (lambda v: {n: t for n, t in v.items() if n != "0.weight"}, nf.ParameterNameError, r"0\.weight"),
        (lambda v: v | {"0.weight": v["0.weight"].T.contiguous()}, nf.ParameterShapeError, "same number of rows"),
        (lambda v: v | {"0.weight": torch.cat([v["0.weight"]] * 2, 1)}, nf.ParameterShapeError, "another model"),
    ],
)
def test_second_moments_made_by_hand_are_checked(change: Any, error: type[Exception], words: str) -> None:
    one = case("diagonal")
    v = change({name: tensor.square() + 1 for name, tensor in one.params.items()})
    moments = nf.SecondMoments(v, dict.fromkeys(v, 1), one.symmetries)
    for function in (nf.drift, nf.potential, nf.solve_equilibrium):
        with pytest.raises(error, match=words):
            function(moments, nf.AdamW(), one.model)


def test_what_a_limit_of_sgd_and_a_mean_step_do_not_take() -> None:
    one = case("diagonal")
    v = {name: tensor.square() + 1 for name, tensor in one.params.items()}
    with pytest.raises(nf.SettingsError, match=r"noise of single examples.*drift\(\)"):
        nf.expected_step(nf.SecondMoments(v, dict.fromkeys(v, 1), one.symmetries), nf.AdamW(), one.model)
    for limit in (nf.Langevin, nf.NoetherFlow):
        with pytest.raises(nf.SettingsError, match="finite_step=True has no meaning"):
            limit(nf.SGD(0.1, 4, finite_step=True))
        with pytest.raises(nf.SettingsError, match="single learning rate"):
            limit(nf.SGD(rates_of(one), 4))
        with pytest.raises(nf.SettingsError, match=r"nf\.SGD alone, got nf\.AdamW"):
            limit(nf.AdamW(batch_size=4))
    for settings in (nf.AdamW(batch_size=4), nf.SGD(0.1, 4, finite_step=True)):
        with pytest.raises(nf.SettingsError, match="microbatches=True measures differences"):
            nf.equilibrate(one.model, one.loss, one.loader(), settings, one.symmetries, microbatches=True)


def test_settings_are_plain_numbers() -> None:
    half, two = torch.tensor(0.5), torch.tensor(2)
    adamw = nf.AdamW(lr=half, betas=[0.9, 0.5], eps=half, weight_decay={"w": two})
    assert adamw == nf.AdamW(lr=0.5, betas=(0.9, 0.5), eps=0.5, weight_decay={"w": 2})
    assert isinstance(adamw.lr, float)
    with pytest.raises(nf.SettingsError, match="decoupled"):
        nf.AdamW(decoupled="x")


def test_settings_are_values() -> None:
    rates = {"w": 0.1}
    for settings in (nf.AdamW(lr=rates), nf.SGD(rates, 4)):
        assert hash(settings) == hash(copy.deepcopy(settings))
        rates["w"] = 9.0
        assert settings.lr == {"w": 0.1}
        rates["w"] = 0.1
    with pytest.raises(nf.SettingsError, match="no single learning rate"):
        assert nf.SGD(rates, 4).effective_lr
    with pytest.raises(nf.SettingsError, match="plain SGD"):
        nf.SGD(0.1, 4, momentum=0.9, finite_step=True)

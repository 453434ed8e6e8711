"""The factors of two, anchored outside: every minibatch of a small data set through `torch.optim.SGD`."""

import pytest
import torch

import checks
import noetherflow as nf
from cases import Case, case, cases


@pytest.mark.parametrize("one", cases(), ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_mean_move_of_one_step_with_replacement(one: Case, batch_size: int, weight_decay: float) -> None:
    checks.step_matches_torch(one, batch_size, weight_decay, replacement=True)


@pytest.mark.parametrize("one", cases(), ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_mean_move_of_one_step_with_a_weight_decay_for_each_parameter(one: Case, batch_size: int) -> None:
    checks.step_matches_torch(one, batch_size, {n: 4 * decay for n, decay in one.decays.items()}, replacement=True)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_a_single_weight_decay_is_not_that_of_groups(one: Case) -> None:
    decays = {name: 4 * decay for name, decay in one.decays.items()}
    measured = checks.mean_move(one, nf.SGD(0.1, 2, decays), 4, replacement=True)
    noise = nf.estimate_noise(one.model, one.loss, [tuple(t[:4] for t in one.batch)], one.symmetries)
    single = nf.SGD(0.1, 2, weight_decay=sum(decays.values()) / len(decays))
    for name, step in nf.expected_step(noise, single, one.model).items():
        # The scale-invariant model has a single parameter.
        assert torch.allclose(step, measured[name], rtol=1e-3, atol=0) == (len(decays) == 1)


@pytest.mark.parametrize("name", ["diagonal", "matrix", "scalar, plus only"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_mean_move_of_one_step_without_replacement(name: str, batch_size: int, weight_decay: float) -> None:
    checks.step_matches_torch(case(name), batch_size, weight_decay, replacement=False, count=5)


def test_without_the_finite_population_factor_the_mean_move_is_wrong() -> None:
    one = case("diagonal")
    noise = nf.estimate_noise(one.model, one.loss, [tuple(t[:5] for t in one.batch)], one.symmetries)
    ignorant = nf.expected_step(noise, nf.SGD(0.1, 3), one.model)
    measured = checks.mean_move(one, nf.SGD(0.1, 3), 5, replacement=False)
    gap = (ignorant["hidden"] - measured["hidden"]).abs().max()
    assert gap > 0.1 * measured["hidden"].abs().max()


def test_a_full_batch_without_replacement_leaves_only_the_finite_step_of_gradient_descent() -> None:
    one = case("diagonal")
    sgd = nf.SGD(0.1, 5, replacement=False, dataset_size=5)
    noise = nf.estimate_noise(one.model, one.loss, [tuple(t[:5] for t in one.batch)], one.symmetries)
    step = nf.expected_step(noise, sgd, one.model)["hidden"]
    torch.testing.assert_close(step, 0.01 * one.symmetries["hidden"].charge(noise.mean))
    assert not nf.drift(noise, sgd, one.model)["hidden"].any()


def test_the_settings_in_numbers() -> None:
    sgd = nf.SGD(lr=0.3, batch_size=6, weight_decay=0.02, momentum=0.75)
    assert sgd.gamma == 0.01
    assert sgd.effective_lr == pytest.approx(1.2)
    assert sgd.temperature == pytest.approx(0.1)
    few = nf.SGD(lr=0.3, batch_size=6, replacement=False, dataset_size=11)
    assert few.sampling_factor == pytest.approx(0.5)
    assert few.temperature == pytest.approx(0.3 / 24)
    # The size of a data set counts only without replacement; of one example there is nothing to draw.
    assert nf.SGD(lr=0.3, batch_size=6, dataset_size=11).sampling_factor == 1.0
    assert nf.SGD(lr=0.3, batch_size=1, replacement=False, dataset_size=1).temperature == 0.0
    assert nf.SGD(lr=0.3, batch_size=1, replacement=False, dataset_size=2).sampling_factor == 1.0
    plain = nf.SGD(lr=0.3, batch_size=6)
    assert (plain.weight_decay, plain.momentum, plain.replacement) == (0.0, 0.0, True)
    assert plain.temperature == pytest.approx(0.3 / 12)


def test_momentum_multiplies_the_drift_per_step_by_its_square() -> None:
    checks.momentum_walk_matches_theory()


def test_the_settings_of_an_optimizer_are_read() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=torch.tensor(0.5), weight_decay=0.1, momentum=0.5)
    assert nf.SGD.from_optimizer(optimizer, batch_size=8) == nf.SGD(0.5, 8, weight_decay=0.1, momentum=0.5)
    few = nf.SGD.from_optimizer(optimizer, batch_size=8, replacement=False, dataset_size=100)
    assert few == nf.SGD(0.5, 8, 0.1, 0.5, replacement=False, dataset_size=100)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda p: torch.optim.Adam(p), "Adam"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1), "dampening"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.SGD([{"params": [q], "momentum": 0.1 * k} for k, q in enumerate(p, 1)]), "share"),
    ],
)
def test_an_optimizer_of_another_kind_is_refused(optimizer: object, words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.SGD.from_optimizer(optimizer(list(torch.nn.Linear(2, 2).parameters())), batch_size=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"replacement": False}, "dataset_size"),
        ({"replacement": False, "dataset_size": 3}, "dataset_size"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        nf.SGD(**({"lr": 0.1, "batch_size": 4} | settings))

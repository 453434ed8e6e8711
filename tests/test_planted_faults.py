"""Faults that were planted on purpose, each with the check that must fail."""

from collections.abc import Callable

import pytest
import torch

import checks
import noetherflow as nf
from cases import Case, case
from noetherflow import _spd
from noetherflow.symmetry import Grams
from noetherflow.symmetry.axes import AxisSymmetry

Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[], None]


def gamma_is_weight_decay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nf.SGD, "gamma", property(lambda sgd: sgd.weight_decay))


def temperature_is_lr_over_batch_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nf.SGD, "share", property(lambda sgd: 2 / sgd.batch_size))


def noise_is_not_centred(patch: pytest.MonkeyPatch) -> None:
    right = nf.NoiseMoments.of.__func__

    def uncentred(cls: type[nf.NoiseMoments], gradients: object, symmetries: object, **more: object) -> object:
        doubled = {name: torch.cat([tensor, -tensor]) for name, tensor in gradients.items()}
        moments = right(cls, doubled, symmetries, **more)
        honest = right(cls, gradients, symmetries, **more)
        halves = {name: Grams(*(side / 2 for side in sides)) for name, sides in moments.scatter.items()}
        squares = {name: square / 2 for name, square in moments.square_scatter.items()}
        for name in honest.scatter:
            honest.scatter[name] = halves[name]
        honest.square_scatter.update(squares)
        return honest

    patch.setattr(nf.NoiseMoments, "of", classmethod(uncentred))


def plus_and_minus_are_swapped_in_the_charge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AxisSymmetry, "charge_of", lambda self, grams: grams.minus - grams.plus)


def plus_and_minus_are_swapped_in_the_noise(patch: pytest.MonkeyPatch) -> None:
    right = nf.NoiseMoments.grams.fget
    patch.setattr(
        nf.NoiseMoments,
        "grams",
        property(lambda noise: {name: Grams(*reversed(sides)) for name, sides in right(noise).items()}),
    )


def inverse_acts_with_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AxisSymmetry, "_signed", lambda self: [(axis, 1.0) for axis in self.plus + self.minus])


def mean_is_arithmetic(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_spd, "riccati", lambda left, right: (torch.linalg.inv(left) + right) / 2)


def settings_ignore_momentum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nf.SGD, "effective_lr", property(lambda sgd: sgd.lr))


def population_is_infinite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nf.SGD, "sampling_factor", property(lambda sgd: 1.0))


def one_step(name: str, **settings: float) -> Check:
    return lambda: checks.step_matches_torch(case(name), 2, settings.get("weight_decay", 0.3), replacement=True)


def of_case(check: Callable[..., None], name: str, *more: float) -> Check:
    return lambda: check(case(name), *more)


FAULTS: list[tuple[Plant, Check]] = [
    (gamma_is_weight_decay, one_step("diagonal")),
    (gamma_is_weight_decay, of_case(checks.potential_matches_definition, "diagonal", 0.02)),
    (gamma_is_weight_decay, of_case(checks.equilibrium_matches_scipy, "matrix", 0.02)),
    (temperature_is_lr_over_batch_size, one_step("diagonal")),
    (temperature_is_lr_over_batch_size, of_case(checks.potential_matches_definition, "matrix", 0.02)),
    (temperature_is_lr_over_batch_size, of_case(checks.equilibrium_matches_scipy, "diagonal", 0.02)),
    (noise_is_not_centred, one_step("diagonal")),
    (noise_is_not_centred, of_case(checks.moments_match_covariance, "diagonal")),
    (noise_is_not_centred, of_case(checks.moments_match_covariance, "matrix")),
    (plus_and_minus_are_swapped_in_the_charge, of_case(checks.moments_match_covariance, "diagonal")),
    (plus_and_minus_are_swapped_in_the_noise, one_step("matrix")),
    (plus_and_minus_are_swapped_in_the_noise, of_case(checks.equilibrium_matches_scipy, "matrix", 0.0)),
    (inverse_acts_with_the_wrong_sign, of_case(checks.symmetry_holds, "diagonal")),
    (inverse_acts_with_the_wrong_sign, of_case(checks.no_drift_after_rebalance, "matrix", 0.0)),
    (mean_is_arithmetic, lambda: checks.riccati_solves(8, 100.0, 0)),
    (mean_is_arithmetic, of_case(checks.equilibrium_matches_scipy, "matrix", 0.02)),
    (mean_is_arithmetic, of_case(checks.no_drift_after_rebalance, "matrix", 0.0)),
    (settings_ignore_momentum, checks.momentum_walk_matches_theory),
    (population_is_infinite, lambda: checks.step_matches_torch(case("diagonal"), 3, 0.0, replacement=False, count=5)),
]


def names(fault: tuple[Plant, Check]) -> str:
    return fault[0].__name__.replace("_", " ")


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=map(names, FAULTS))
def test_a_planted_fault_is_caught(plant: Plant, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    check()  # without the fault all is well
    plant(monkeypatch)
    with pytest.raises((AssertionError, nf.NoetherflowError)):
        check()


FORGOTTEN = [one for one in ("diagonal", "diagonal, coupled layers", "matrix", "convolution, flatten, linear")]


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_forgotten_bias_is_caught_everywhere(name: str) -> None:
    one = case(name)
    forgetful = Case(one.name, one.model, one.loss, one.batch, one.symmetries | one.wrong)
    with pytest.raises(AssertionError):
        checks.symmetry_holds(forgetful)
    with pytest.raises(nf.NotASymmetryError, match="bias"):
        checks.noise_of(forgetful)

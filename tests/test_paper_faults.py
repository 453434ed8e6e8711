"""Frauds and mistakes planted into the experiments, each of which must cost every affected figure a claim."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow import linear
from noetherflow.linear import NoiseFactors, TwoLayer
from noetherflow.paper import experiment
from paper_runs import outcome


def failed(name: str, config: Any, found: Any) -> list[str]:
    return [claim.text for claim in experiment.load(name).claims(config, found) if not claim.holds]


# Gradient descent passed off as SGD: what SGD gave is replaced by what gradient descent gave.


def f1_still(found: Any) -> Any:
    start = found.sgd.charges["length"][:1]
    return found._replace(sgd=replace(found.sgd, charges={"length": start.expand(found.sgd.charges["length"].shape)}))


def f5_still(found: Any) -> Any:
    return {name: runs._replace(sgd=runs.gd) for name, runs in found.items()}


def f7_still(found: Any) -> Any:
    return [measured._replace(rate=1e-9, fixed_point_error=0.3) for measured in found]


def f8_still(found: Any) -> Any:
    depths = [
        one._replace(middle=one.middle_start, ends=one.ends_start, imbalance=one.imbalance_start)
        for one in found.depths
    ]
    return found._replace(depths=depths)


def f9_still(found: Any) -> Any:
    generic = found["generic"]
    here = experiment.load("f9").grams(generic.equilibrium)
    return found | {
        "generic": generic._replace(measured={lr: here.expand(g.shape) for lr, g in generic.measured.items()})
    }


STILL: dict[str, Callable[[Any], Any]] = {
    "f1": f1_still,
    "f2": lambda found: found._replace(cooled=found.gd),
    "f3": lambda found: found._replace(sgd=found.gd, sgd_sharpness=found.gd_sharpness),
    "f4": lambda found: found._replace(warmup=found.control),
    "f5": f5_still,
    "f6": lambda found: found._replace(sgd=found.gd),
    "f7": f7_still,
    "f8": f8_still,
    "f9": f9_still,
}


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_gradient_descent_passed_off_as_sgd(name: str) -> None:
    config, found = outcome(name)
    assert failed(name, config, STILL[name](found))


# A wrong factor of two in sigma^2, for the figures whose numbers depend on it.


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("name", ["f3", "f7"])
def test_a_wrong_factor_of_two_in_the_prediction(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = outcome(name)
    if name == "f7":
        # Predictions were made with the run.
        found = [measured._replace(predicted=factor * measured.predicted) for measured in found]
    right = nf.SGD.temperature.fget
    monkeypatch.setattr(nf.SGD, "temperature", property(lambda sgd: factor * right(sgd)))
    assert failed(name, config, found)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("name", ["f1", "f5"])
def test_a_wrong_factor_of_two_in_the_noise(name: str, factor: float) -> None:
    """The claims are told a batch size that is not the run's, and nothing else of it."""
    config, found = outcome(name)
    assert any("growth" in text for text in failed(name, replace(config, batch_size=factor * config.batch_size), found))


def test_a_wrong_factor_of_two_in_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nf.SGD.temperature.fget
    monkeypatch.setattr(nf.SGD, "temperature", property(lambda sgd: 2 * right(sgd)))
    module, config = experiment.load("f2"), outcome("f2")[0]
    assert any("decay rate" in text for text in failed("f2", config, module.run(config)))


# Noise that is not centred: it counts the mean gradient a second time.


def test_uncentred_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = outcome("f1")
    (kick,) = [claim for claim in experiment.load("f1").claims(config, found) if "kick" in claim.text]
    assert not kick.admits(kick.wrong["uncentred noise"])
    # A run whose examples have no mean gradient, passed off as centring that was forgotten.
    shift = config.kick_mean**2 / config.kick_batch_size
    assert any("kick" in text for text in failed("f1", config, found._replace(kicks=found.kicks + shift)))
    monkeypatch.undo()


# Trace factors swapped in the closed forms.


def swapped_equilibrium(target: Tensor, input_cov: Tensor, noise_cov: Tensor, hidden: int) -> TwoLayer:
    u, w = linear.two_layer_equilibrium(target, input_cov, noise_cov, hidden)
    ratio = (input_cov.trace() / noise_cov.trace()).sqrt()
    return TwoLayer(u * ratio, w / ratio)


def swapped_factors(input_cov: Tensor, noise_cov: Tensor, error: Tensor | None = None) -> NoiseFactors:
    u, w = linear.noise_factors(input_cov, noise_cov, error)
    ratio = noise_cov.trace() / input_cov.trace()
    return NoiseFactors(u * ratio, w / ratio)


def swapped_deep(target: Tensor, input_cov: Tensor, noise_cov: Tensor, depth: int) -> list[Tensor]:
    weights = linear.deep_equilibrium(target, input_cov, noise_cov, depth)
    ratio = (input_cov.trace() / noise_cov.trace()).sqrt()
    return [weights[0] / ratio, *weights[1:-1], weights[-1] * ratio]


SWAPS: dict[str, dict[str, Callable[..., Any]]] = {
    "f2": {"two_layer_equilibrium": swapped_equilibrium},
    "f3": {"noise_factors": swapped_factors},
    "f4": {"two_layer_equilibrium": swapped_equilibrium},
    "f7": {"two_layer_equilibrium": swapped_equilibrium},
    "f8": {"deep_equilibrium": swapped_deep},
}


@pytest.mark.parametrize("name", SWAPS)
def test_swapped_trace_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = outcome(name)
    module = experiment.load(name)
    for function, fault in SWAPS[name].items():
        monkeypatch.setattr(module, function, fault)
    if name in ("f2", "f7", "f8"):
        # These make their predictions while they run; a shorter run is enough to see them miss.
        short = {"f2": {}, "f7": {"momenta": (), "lrs": ()}, "f8": {"steps": 20_000}}[name]
        config = replace(config, **short)
        found = module.run(config)
    assert failed(name, config, found)


def test_noise_that_does_not_matter_is_not_blamed() -> None:
    """The twin of all these: without a fault nothing fails."""
    assert not [text for name in experiment.FIGURES for text in failed(name, *outcome(name))]
    assert torch.get_num_threads() == 1

"""Faults planted into the experiments: in every affected figure at least one claim must fail."""

import sys
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
from noetherflow.paper.measure import slope
from paper_runs import outcome


def failed(name: str, config: Any, outcome: Any) -> list[str]:
    """Texts of the claims that do not hold."""
    return [claim.text for claim in experiment.load(name).claims(config, outcome) if not claim.holds]


# Gradient descent in place of SGD: replace the outcome of SGD by that of gradient descent.


def f1_still(result: Any) -> Any:
    start = result.sgd.charges["length"][:1]
    return result._replace(
        sgd=replace(result.sgd, charges={"length": start.expand(result.sgd.charges["length"].shape)})
    )


def f5_still(result: Any) -> Any:
    return {name: runs._replace(sgd=runs.gd) for name, runs in result.items()}


def f7_still(result: Any) -> Any:
    """Both sides stay where they started, and the rate is read off as the run reads it."""
    return [
        measured._replace(
            rate=-slope(measured.steps.double(), measured.departure[:1].log().expand(measured.steps.shape))
        )
        for measured in result
    ]


def f8_still(result: Any) -> Any:
    depths = [
        depth._replace(middle=depth.middle_start, ends=depth.ends_start, imbalance=depth.imbalance_start)
        for depth in result.depths
    ]
    return result._replace(depths=depths)


def f9_still(result: Any) -> Any:
    generic = result["generic"]
    equilibrium = experiment.load("f9").grams(generic.equilibrium)
    return result | {
        "generic": generic._replace(measured={lr: equilibrium.expand(g.shape) for lr, g in generic.measured.items()})
    }


def f10_still(result: Any) -> Any:
    return result._replace(pairs=[rest._replace(x=rest.x[:1].expand(rest.x.shape)) for rest in result.pairs])


def f12_still(result: Any) -> Any:
    return [
        replace(measured, curves=measured.curves[:1].expand(measured.curves.shape), ends=measured.curves[0])
        for measured in result
    ]


STILL: dict[str, Callable[[Any], Any]] = {
    "f1": f1_still,
    "f2": lambda result: result._replace(cooled=result.gd),
    "f3": lambda result: result._replace(sgd=result.gd, sgd_sharpness=result.gd_sharpness),
    "f4": lambda result: result._replace(warmup=result.control),
    "f5": f5_still,
    "f6": lambda result: result._replace(sgd=result.gd),
    "f7": f7_still,
    "f8": f8_still,
    "f9": f9_still,
    "f10": f10_still,
    "f12": f12_still,
}


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_gradient_descent_in_place_of_sgd(name: str) -> None:
    config, result = outcome(name)
    assert failed(name, config, STILL[name](result))


# A wrong factor of two in sigma^2, for the figures whose numbers depend on sigma^2.


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("name", ["f3", "f7"])
def test_a_wrong_factor_of_two_in_the_prediction(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config, result = outcome(name)
    if name == "f7":
        # F7 computes its predictions during the run.
        result = [measured._replace(predicted=factor * measured.predicted) for measured in result]
    temperature = nf.SGD.temperature.fget
    monkeypatch.setattr(nf.SGD, "temperature", property(lambda sgd: factor * temperature(sgd)))
    assert failed(name, config, result)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("name", ["f1", "f5"])
def test_a_wrong_factor_of_two_in_the_noise(name: str, factor: float) -> None:
    """The claims get a batch size that differs from that of the run."""
    config, result = outcome(name)
    assert any(
        "growth" in text for text in failed(name, replace(config, batch_size=factor * config.batch_size), result)
    )


def test_a_wrong_factor_of_two_in_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    temperature = nf.SGD.temperature.fget
    monkeypatch.setattr(nf.SGD, "temperature", property(lambda sgd: 2 * temperature(sgd)))
    module, config = experiment.load("f2"), experiment.load("f2").Config.quick()
    assert any("decay rate" in text for text in failed("f2", config, module.run(config)))


# Noise that is not centred counts the mean gradient twice.


@pytest.mark.parametrize("name", ["f1"])
def test_uncentred_noise(name: str) -> None:
    config, result = outcome(name)
    (kick,) = [claim for claim in experiment.load("f1").claims(config, result) if "kick" in claim.text]
    assert not kick.admits(kick.wrong["uncentred noise"])
    # Add the square of the mean gradient, which centring would subtract.
    shift = config.kick_mean**2 / config.kick_batch_size
    assert any("kick" in text for text in failed("f1", config, result._replace(kicks=result.kicks + shift)))


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


def patch_figure(monkeypatch: pytest.MonkeyPatch, name: str, function: str, replacement: Any) -> None:
    """Replace a function in every imported module of a figure that uses the function."""
    prefix = f"noetherflow.paper.{name}_"
    modules = [module for path, module in sys.modules.items() if path.startswith(prefix) and hasattr(module, function)]
    assert modules
    for module in modules:
        monkeypatch.setattr(module, function, replacement)


SWAPS: dict[str, dict[str, Callable[..., Any]]] = {
    "f2": {"two_layer_equilibrium": swapped_equilibrium},
    "f3": {"noise_factors": swapped_factors},
    "f4": {"two_layer_equilibrium": swapped_equilibrium},
    "f7": {"two_layer_equilibrium": swapped_equilibrium},
    "f8": {"deep_equilibrium": swapped_deep},
}


# Two of these run their experiment a second time at nearly its size; the other three are quick.
LONG = {"f2", "f7"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SWAPS])
def test_swapped_trace_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, result = outcome(name)
    module = experiment.load(name)
    for function, fault in SWAPS[name].items():
        patch_figure(monkeypatch, name, function, fault)
    if name in ("f2", "f7", "f8"):
        # These figures compute their predictions during the run. A shorter run suffices for the claims to fail.
        short = {"f2": {}, "f7": {"momenta": (), "lrs": ()}, "f8": {"steps": 20_000}}[name]
        config = replace(config, **short)
        result = module.run(config)
    assert failed(name, config, result)


# The formula of SGD in place of that of AdamW.


def test_the_formula_of_sgd_fails_every_claim_about_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    config, result = outcome("f10")
    module, problem = experiment.load("f10"), sys.modules["noetherflow.paper.f10_problem"]
    solve, lengths = problem.solve_equilibrium, module._lengths

    def as_sgd(moments: Any, settings: Any, params: Any) -> Any:
        return solve(moments, problem.formula_of_sgd(settings) if isinstance(settings, nf.AdamW) else settings, params)

    monkeypatch.setattr(problem, "solve_equilibrium", as_sgd)
    monkeypatch.setattr(module, "_lengths", lambda config: (lengths(config)[1], lengths(config)[1]))
    # The run solves for what is left of every neuron, and for the points of rest with changed settings.
    networks = {decay: left._replace(adamw=left.sgd) for decay, left in result.networks.items()}
    limits = {name: limit._replace(predicted=limit.sgd) for name, limit in result.limits.items()}
    wrong = set(failed("f10", config, result._replace(networks=networks, limits=limits)))
    texts = {claim.text for claim in module.claims(config, result)}
    of_adamw = {text for text in texts if "SGD:" not in text and "decay 1:" not in text}
    assert len(of_adamw) >= 8
    assert wrong >= of_adamw, of_adamw - wrong


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_without_a_fault_every_claim_holds(name: str) -> None:
    """The twin of all tests of this file."""
    assert failed(name, *outcome(name)) == []
    assert torch.get_num_threads() == 1

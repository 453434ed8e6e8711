"""Every exponent rule on a small network: the finder against null spaces, noise against single examples."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import checks
import noetherflow as nf
import oracles
from noetherflow.detect.rules import RULES
from noetherflow.discover import completeness
from rule_cases import CASES, RuleCase, linear, numbers, parameter, units, written

VARIANTS = [(key, name) for key, variants in CASES.items() for name in variants]


def built(case: RuleCase) -> Any:
    torch.manual_seed(0)
    return case.build()


def skip_without_package(key: str) -> None:
    namespace = key.partition("::")[0]
    if namespace != "aten":
        pytest.importorskip(namespace)


def symmetries_of(key: str, case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> dict[str, nf.Symmetry]:
    """The symmetries of a network, after its number was compared with null spaces and the rule was seen to run."""
    runs, kept = [], {}
    rule, find = RULES[key], nf.find_symmetries

    def counted(operation: nf.Operation) -> Any:
        runs.append(operation.key)
        return rule(operation)

    def recorded(*args: Any, **options: Any) -> dict[str, nf.Symmetry]:
        kept.update(find(*args, **options))
        return kept

    monkeypatch.setitem(RULES, key, counted)
    monkeypatch.setattr(completeness, "find_symmetries", recorded)
    model, loss, batch = built(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a candidate that the numbers refute is a rule that lets too much through
        if case.dtype is None and not case.coupled:
            result = nf.check_completeness(model, loss, batch)
            assert result.discovery.decided, result.discovery.gap
            counts = result.discovered, result.found, result.missing, result.false
            assert counts == (case.count + case.missing, case.count, case.missing, 0)
        else:
            recorded(model, loss, batch, dtype=case.dtype)
            assert sum(dimension(each, model) for each in kept.values()) == case.count
    assert runs
    return kept


def dimension(symmetry: nf.Symmetry, model: nn.Module) -> int:
    return len(oracles.coordinates(symmetry, dict(model.named_parameters())))


def moved_away(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with other parameters, none of them zero."""
    model = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(tensor * (0.3 * noise).exp() + 0.05 * noise.sign())
    return model


def converted(batch: Any, dtype: torch.dtype) -> Any:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)


def change_of_losses(symmetry: nf.Symmetry, model: nn.Module, loss: nf.Loss, batch: Any) -> float:
    """The largest change of a loss, relative to their mean, under the exponential of a matrix over all parameters."""
    with torch.no_grad():
        before = loss(model, batch)
        moved = copy.deepcopy(model)
        parameters = list(moved.parameters())
        theta = nn.utils.parameters_to_vector(parameters).double()
        generator = torch.Generator().manual_seed(4)
        for x in oracles.coordinates(symmetry, dict(model.named_parameters())):
            size = 0.4 * torch.randn((), generator=generator, dtype=torch.float64)
            theta = torch.linalg.matrix_exp(oracles.generator(symmetry, model, size * x)) @ theta
        nn.utils.vector_to_parameters(theta.to(parameters[0].dtype), parameters)
        return float((loss(moved, batch) - before).abs().max() / before.abs().mean())


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    registered = {key for key in RULES if key.startswith(("aten::", "transformers::"))}
    assert registered == set(CASES)
    assert all(CASES.values())


@pytest.mark.parametrize(("key", "name"), VARIANTS)
def test_the_finder_agrees_with_null_spaces_and_with_finite_transformations(
    key: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_package(key)
    case = CASES[key][name]
    assert bool(case.missing) == bool(case.reason)
    symmetries = symmetries_of(key, case, monkeypatch)
    model, loss, batch = built(case)
    dtype = case.dtype or torch.float64
    moved = moved_away(model, dtype)
    for symmetry in symmetries.values():
        change = change_of_losses(symmetry, moved, loss, converted(batch, dtype))
        assert change < (1e-9 if dtype == torch.float64 else 1e-4), symmetry


def test_a_transformation_that_is_no_symmetry_changes_losses() -> None:
    model, loss, batch = built(CASES["aten::relu"]["a layer"])
    axes = (nf.Axis("first.weight", 0),), (nf.Axis("last.weight", 1),)
    assert change_of_losses(nf.MatrixSymmetry(*axes), model, loss, batch) > 1e-3
    both = (nf.Axis("first.weight", 0), nf.Axis("first.bias", 0)), (nf.Axis("last.weight", 1),)
    model, batch = model.double(), converted(batch, torch.float64)
    assert change_of_losses(nf.DiagonalSymmetry(*both), model, loss, batch) < 1e-12


@pytest.mark.parametrize("key", CASES)
def test_noise_of_parameters_around_an_operation(key: str) -> None:
    """Noise of a network around each operation, against the gradients of single examples."""
    skip_without_package(key)
    case = next((each for each in CASES[key].values() if not (each.coupled or each.random or each.dtype)), None)
    if case is None:
        pytest.skip("an operation on the complete batch, or random, or without float64")
    model, loss, batch = built(case)
    model, batch = model.double(), converted(batch, torch.float64)
    expected = oracles.statistics(model, oracles.stacked(model, loss, batch), {})
    for exact in (False, None):
        noise = nf.estimate_noise(model, loss, [batch], {}, exact=exact, progress=False)
        checks.noise_is(noise, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p.cumsum(0),
        lambda p: p.sum(0),
        lambda p: p.amax(0),
        lambda p: p.sort(0).values,
        lambda p: p.topk(1).values,
        lambda p: p.index_select(0, torch.tensor([0])).squeeze(),
        lambda p: functional.cosine_similarity(p, p, 0) * p,
    ],
)
def test_numbers_without_axes(function: Callable[[Tensor], Tensor]) -> None:
    model = written(lambda m, x: m.last(x) * function(m.p.abs()[0]), numbers(2), p=parameter(1), last=linear(2, 2))
    # The scale of p is undone by the rows of the linear map.
    (symmetry,) = nf.find_symmetries(*model()).values()
    assert {axis.name for axis in symmetry.plus + symmetry.minus} == {"p", "last.weight", "last.bias"}


def test_dropout_that_is_switched_on_forbids_rotations() -> None:
    (symmetry,) = nf.find_symmetries(*units(lambda x: torch.dropout(x, 0.5, True))()).values()
    assert isinstance(symmetry, nf.DiagonalSymmetry)

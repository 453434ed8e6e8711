"""Residuals: of gradients and losses of any size, in every function that asks for them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import noetherflow as nf
from cases import Case, case, squared_error
from noetherflow import _verify
from noetherflow._residual import cosine, entangled, relative_change
from noetherflow.detect import proof
from noetherflow.noise import exact, layerwise

SIZES = (1e-170, 1e-160, 1.0, 1e155)


def vectors(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Gradients of three examples, a direction, and the cosines between them, from one norm."""
    torch.manual_seed(0)
    g = {"a": torch.randn(3, 2, 4).double(), "b": torch.randn(3, 5).double()}
    v = {"a": torch.randn(2, 4).double(), "b": torch.randn(5).double()}
    flat = torch.cat([g["a"].flatten(1), g["b"]], 1)
    along = torch.cat([v["a"].flatten(), v["b"]])
    expected = (flat @ along).abs() / (flat.norm(dim=1) * along.norm())
    return {n: x.to(dtype) for n, x in g.items()}, {n: x.to(dtype) for n, x in v.items()}, expected


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_a_cosine_does_not_depend_on_the_size_of_a_vector(size: float) -> None:
    g, v, expected = vectors()
    large, small = {n: x * size for n, x in g.items()}, {n: x / size for n, x in v.items()}
    torch.testing.assert_close(cosine(large, small, batched=True), expected)
    for index in range(3):
        torch.testing.assert_close(cosine({n: x[index] for n, x in large.items()}, small), expected[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cosine_of_vectors_in_another_type(dtype: torch.dtype) -> None:
    g, v, expected = vectors(dtype)
    found = cosine(g, {n: x.double() for n, x in v.items()}, batched=True)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 2 * torch.finfo(dtype).eps
    assert cosine(g, v, batched=True).dtype == torch.float32


def test_a_cosine_is_zero_without_a_gradient_and_infinite_for_a_gradient_that_is_not_finite() -> None:
    g, v, _ = vectors()
    g["a"][0], g["b"][0] = 0, 0
    g["a"][1, 0, 0], g["b"][2, 0] = torch.nan, torch.inf
    assert cosine(g, v, batched=True).tolist() == [0.0, torch.inf, torch.inf]
    assert cosine({n: x[0] for n, x in vectors()[0].items()}, {n: 0 * x for n, x in v.items()}) == 0


def test_a_change_is_relative_to_the_loss_or_to_the_mean() -> None:
    before, after = torch.tensor([1.0, 0.0, 5.0]).double(), torch.tensor([1.2, 0.1, 5.5]).double()
    for size in (1e-300, 1e-160, 1.0, 1e300):
        torch.testing.assert_close(
            relative_change(size * before, size * after), torch.tensor([0.1, 0.05, 0.1]).double()
        )
    assert relative_change(before, after * torch.nan).isinf().all()


def test_symmetries_that_share_an_entry_are_in_one_group() -> None:
    params = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "c": torch.zeros(2)}
    symmetries = {
        "top": nf.ScalarSymmetry(plus=nf.Axis("a", 0, start=0, stop=2)),
        "bottom": nf.ScalarSymmetry(plus=nf.Axis("a", 0, start=2), minus=nf.Axis("b", 0)),
        "left": nf.ScalarSymmetry(plus=nf.Axis("b", 1, start=0, stop=1)),
        "twice": nf.DiagonalSymmetry(plus=nf.Axis("c", 0), minus=nf.Axis("c", 0)),
    }
    groups, doubled = entangled(symmetries, params)
    assert groups == [["top"], ["bottom", "left"], ["twice"]]
    assert doubled == {"twice"}


# Gradients whose squares vanish or overflow, in every function that compares them with a direction.


def scaled(size: float) -> Any:
    return lambda model, batch: size * squared_error(model, batch)


def verified(one: Case, symmetry: nf.Symmetry, size: float) -> None:
    residual = nf.verify_symmetry(one.model, scaled(size), one.batch, symmetry)
    assert residual < 1e-11


def proved(one: Case, symmetry: nf.Symmetry, size: float) -> None:
    (residual,) = proof.prove([symmetry], one.model, scaled(size), one.batch, dtype=None)
    assert residual.gradient < 1e-11


def measured(one: Case, symmetry: nf.Symmetry, size: float) -> None:
    nf.estimate_noise(one.model, scaled(size), one.loader(), {"only": symmetry}, exact=True)


def rebalanced(one: Case, symmetry: nf.Symmetry, size: float) -> None:
    params = {name: tensor.double() for name, tensor in one.params.items()}
    noise = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(0.1, 5, 0.02), params)
    x = symmetry.identity(params) + 0.3
    moved = checks.moved_by(equilibrium, one.model, {"only": symmetry}, {"only": x})
    nf.rebalance_(one.model, moved, scaled(size), one.batch)


CALLERS = [verified, proved, measured, rebalanced]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("caller", CALLERS, ids=lambda one: one.__name__)
def test_a_symmetry_is_one_whatever_the_size_of_the_loss(caller: Any, size: float) -> None:
    one = case("diagonal")
    caller(one, one.symmetries["hidden"], size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("caller", CALLERS, ids=lambda one: one.__name__)
def test_a_false_symmetry_shows_whatever_the_size_of_the_loss(caller: Any, size: float) -> None:
    one = case("diagonal")
    with pytest.raises((AssertionError, nf.NotASymmetryError, nf.FunctionChangedError)):
        caller(one, one.wrong["hidden"], size)


@pytest.mark.parametrize("size", [1e-170, 1e-160, 1.0])
def test_the_fast_way_tells_symmetries_by_the_mean_gradient(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    one = case("diagonal")
    for symmetry, expected in ((one.symmetries["hidden"], True), (one.wrong["hidden"], False)):
        subject = exact.Subject.of(one.model, scaled(size), {"only": symmetry}, None)
        passed = layerwise.LayerwisePass(subject, variances=False, max_bytes=2**20)
        monkeypatch.setattr(exact.Subject, "require_symmetric", lambda *_: None)
        passed.check(one.batch, subject.losses_of(one.batch), random=False, where="the batch")
        measured, losses = passed._measure(one.batch, without_dropout=False)
        gradients = passed._gradients(measured)
        # Squares that vanish cannot be compared with those of single examples: then all is done example by example.
        gradients |= passed._exactly(measured.buffers, one.batch, len(losses), "the batch")
        assert passed._is_symmetric(measured.buffers, gradients, len(losses)) is expected


def unscaled(gradients: Any, direction: Any, *, batched: bool = False) -> Tensor:
    """As three of four copies of this function were."""
    axes = 1 if batched else 0
    along = sum((gradients[n] * direction[n]).flatten(axes).sum(-1) for n in direction)
    norms = sum(gradients[n].square().flatten(axes).sum(-1) for n in direction)
    length = sum(direction[n].square().sum() for n in direction)
    return (along.abs() / (norms * length).sqrt()).nan_to_num(nan=0.0)


@pytest.mark.parametrize(("caller", "where"), [(verified, _verify), (proved, proof), (measured, exact)])
def test_squares_that_vanish_are_noticed(monkeypatch: pytest.MonkeyPatch, caller: Any, where: Any) -> None:
    monkeypatch.setattr(where, "cosine", unscaled)
    with pytest.raises((AssertionError, nf.NotASymmetryError)):
        test_a_symmetry_is_one_whatever_the_size_of_the_loss(caller, 1e-170)


def test_a_residual_names_the_type_of_the_computation_and_travels_with_it() -> None:
    residual = nf.Residual(loss=1e-3, gradient=2e-3, example=4, precision=torch.bfloat16)
    for copied in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
        assert (copied.loss, copied.gradient, copied.example, copied.precision) == (1e-3, 2e-3, 4, torch.bfloat16)

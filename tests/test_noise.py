"""Noise moments against loops, whatever the batches look like and however they are cut."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, rescaling, squared_error

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    note: str = "kept as it is"


CONTAINERS = {
    "tuple": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y, "note": "text"}, lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"x": [x], "more": (y, None)}, lambda b: (b["x"][0], b["more"][0])),
    "named tuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (Record, lambda b: (b.x, b.y)),
    "BatchEncoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), lambda b: (b.x, b["y"])),
}


def assert_same(a: nf.NoiseMoments, b: nf.NoiseMoments) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, **checks.TIGHT)
    torch.testing.assert_close(a.scatter, b.scatter, **checks.TIGHT)
    torch.testing.assert_close(a.square_scatter, b.square_scatter, **checks.TIGHT)
    torch.testing.assert_close(a.total_scatter, b.total_scatter, **checks.TIGHT)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_moments_are_those_of_the_covariance_matrix(one: Case) -> None:
    checks.moments_match_covariance(one)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_variances_are_its_diagonal(one: Case) -> None:
    noise = checks.noise_of(one)
    _, sigma = oracles.covariance(one.model, one.loss, one.batch)
    sizes = [tensor.numel() for tensor in one.params.values()]
    expected = dict(zip(one.params, sigma.diagonal().split(sizes), strict=True))
    for name, variance in noise.variance.items():
        torch.testing.assert_close(variance.reshape(-1), expected[name], **checks.TIGHT)
    commuting = any(isinstance(s, nf.ScalarSymmetry | nf.DiagonalSymmetry) for s in one.symmetries.values())
    assert bool(noise.variance) == commuting


@pytest.mark.parametrize("kind", CONTAINERS)
def test_batches_of_every_kind(kind: str) -> None:
    one = case("diagonal")
    pack, unpack = CONTAINERS[kind]
    noise = nf.estimate_noise(
        one.model,
        lambda model, batch: one.loss(model, unpack(batch)),
        [pack(*batch) for batch in one.loader()],
        one.symmetries,
    )
    assert_same(noise, checks.noise_of(one))


def test_a_data_loader_in_any_order_gives_the_same() -> None:
    one = case("diagonal, coupled layers")
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*one.batch), batch_size=6, shuffle=True, generator=generator)
    assert_same(nf.estimate_noise(one.model, one.loss, loader, one.symmetries), checks.noise_of(one))


@pytest.mark.parametrize("one", cases(), ids=str)
def test_a_small_memory_limit_changes_nothing(one: Case) -> None:
    small = nf.estimate_noise(one.model, one.loss, [one.batch], one.symmetries, max_bytes=1)
    assert_same(small, checks.noise_of(one))


@pytest.mark.parametrize("one", cases(), ids=str)
def test_merging_is_exact_and_commutes(one: Case) -> None:
    parts = [nf.estimate_noise(one.model, one.loss, [batch], one.symmetries) for batch in one.loader(5)]
    whole = checks.noise_of(one)
    forwards = backwards = None
    for part in parts:
        forwards = part if forwards is None else forwards.merge(part)
    for part in reversed(parts):
        backwards = part if backwards is None else part.merge(backwards) if part.count % 2 else backwards.merge(part)
    assert_same(forwards, whole)
    assert_same(backwards, whole)


def test_moments_of_other_symmetries_are_not_merged() -> None:
    one = case("matrix")
    mine = checks.noise_of(one)
    axes = one.symmetries["rotation"]
    other = nf.estimate_noise(
        one.model, one.loss, one.loader(), {"rotation": nf.DiagonalSymmetry(axes.plus, axes.minus)}
    )
    with pytest.raises(nf.ParameterNameError, match="merged"):
        mine.merge(other)


def test_selected_symmetries_are_those_that_were_measured_in_the_order_given() -> None:
    one = case("scalar and diagonal on shared tensors")
    noise = checks.noise_of(one)
    part = noise.select("second", "ends")
    assert list(part.symmetries) == list(part.grams) == list(part.standard_errors) == ["second", "ends"]
    assert part.count == noise.count
    torch.testing.assert_close(part.trace, noise.trace, rtol=0, atol=0)
    sgd = nf.SGD(0.1, 5)
    rates, all_rates = nf.drift(part, sgd, one.model), nf.drift(noise, sgd, one.model)
    assert list(rates) == ["second", "ends"]
    for name, rate in rates.items():
        torch.testing.assert_close(rate, all_rates[name], rtol=0, atol=0)
    with pytest.raises(nf.ParameterNameError, match=r"no noise was measured for \['first layer'\]"):
        noise.select("first layer")


def test_without_symmetries_the_finder_is_asked() -> None:
    one = case("diagonal")
    found = nf.find_symmetries(one.model, one.loss, one.batch)
    for loader in (one.loader(), iter(one.loader())):  # an iterator cannot be gone through again: no batch is lost
        noise = nf.estimate_noise(one.model, one.loss, loader)
        assert noise.symmetries == found
        assert noise.count == 24
        given = nf.estimate_noise(one.model, one.loss, one.loader(), found)
        torch.testing.assert_close(noise.grams, given.grams, rtol=0, atol=0)


def test_swapping_plus_and_minus_turns_the_sign_of_everything() -> None:
    one = case("diagonal")
    axes = one.symmetries["hidden"]
    swapped = {"hidden": nf.DiagonalSymmetry(plus=axes.minus, minus=axes.plus)}
    sgd = nf.SGD(0.1, 2, weight_decay=0.1)
    there = nf.drift(checks.noise_of(one, swapped), sgd, one.model)["hidden"]
    here = nf.drift(checks.noise_of(one), sgd, one.model)["hidden"]
    torch.testing.assert_close(there, -here)


def test_a_tensor_without_an_example_dimension_is_shared() -> None:
    one = case("diagonal")
    x, y = one.batch

    def weighted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return ((model(batch["x"]) - batch["y"]).square() * batch["weights"]).sum(1)

    weights = torch.tensor([1.0, 0.5, 2.0]).double()
    shared = nf.estimate_noise(one.model, weighted, [{"x": x[:10], "y": y[:10], "weights": weights}], one.symmetries)

    def written_out(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((model(batch[0]) - batch[1]).square() * weights).sum(1)

    assert_same(shared, nf.estimate_noise(one.model, written_out, [(x[:10], y[:10])], one.symmetries))


def test_gradients_in_float32_are_accumulated_in_float64() -> None:
    one = case("diagonal, coupled layers")
    exact = checks.noise_of(one)
    narrow = [tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in b) for b in one.loader()]
    single = nf.estimate_noise(one.model.float(), one.loss, narrow, one.symmetries)
    assert single.trace.dtype == torch.float64
    torch.testing.assert_close(single.trace, exact.trace, rtol=1e-5, atol=0)
    assert (single.trace - exact.trace).abs() > 1e-14 * exact.trace
    wide = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries, dtype=torch.float64)
    # The parameters were rounded to float32 before they were widened.
    torch.testing.assert_close(wide.trace, exact.trace, rtol=1e-5, atol=0)


def test_a_constant_shift_of_all_gradients_does_not_disturb_the_noise() -> None:
    """Centring survives a mean a million times the spread."""
    symmetry = {"all": nf.ScalarSymmetry(plus=nf.Axis("w", 0))}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    shifted = noise + 1e6
    whole = nf.NoiseMoments.of({"w": noise}, symmetry)
    parts = [nf.NoiseMoments.of({"w": part}, symmetry) for part in shifted.split(7)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    torch.testing.assert_close(merged.grams["all"].plus, whole.grams["all"].plus, rtol=1e-8, atol=0)


def test_frozen_parameters_have_no_noise() -> None:
    one = case("diagonal")
    one.model[2].bias.requires_grad_(False)
    noise = checks.noise_of(one)
    assert "2.bias" not in noise.mean
    with_bias = checks.noise_of(case("diagonal"))
    bias = oracles.covariance(case("diagonal").model, one.loss, one.batch)[1].diagonal()[-3:].sum()
    torch.testing.assert_close(noise.trace, with_bias.trace - bias, **checks.TIGHT)


def test_standard_errors_cover_the_truth() -> None:
    """Over many samples of a population, the standardised error of N_+ - N_- has unit size."""
    generator = torch.Generator().manual_seed(0)
    symmetry = {"rows": nf.DiagonalSymmetry(plus=nf.Axis("w", 0), minus=nf.Axis("u", 0))}
    scale = torch.tensor([1.0, 2.0, 0.5]).double()
    scores = []
    for _ in range(400):
        w = 3.0 + scale[:, None] * torch.randn(200, 3, 2, generator=generator, dtype=torch.float64)
        u = torch.randn(200, 3, 2, generator=generator, dtype=torch.float64)
        moments = nf.NoiseMoments.of({"w": w, "u": u}, symmetry)
        grams, errors = moments.grams["rows"], moments.standard_errors["rows"]
        truth = 2 * (scale.square() - 1)
        scores.append((grams.plus - grams.minus - truth) / errors.net)
    spread = torch.stack(scores).square().mean().sqrt().item()
    assert 0.9 < spread < 1.15


def test_standard_errors_need_two_examples() -> None:
    one = case("diagonal")
    single = nf.estimate_noise(one.model, one.loss, [tuple(t[:1] for t in one.batch)], one.symmetries)
    assert single.standard_errors["hidden"].net.isnan().all()
    assert single.trace == 0
    assert checks.noise_of(one).standard_errors["hidden"].net.isfinite().all()


@pytest.mark.parametrize("name", ["diagonal", "matrix", "scalar, two sides", "dense, eigenvalues 1 and -2"])
def test_standard_errors_of_batches_are_nearly_those_of_all_examples(name: str) -> None:
    """They are taken about the mean gradient so far, which the first batches know roughly."""
    one = case(name)
    expected = oracles.statistics(one.model, oracles.stacked(one.model, one.loss, one.batch), one.symmetries).errors
    for found in (checks.noise_of(one), checks.noise_of(one, one_batch=True)):
        for label, errors in expected.items():
            for mine, theirs in zip(found.standard_errors[label], errors, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0.4, atol=0)


def test_two_examples_have_a_standard_error() -> None:
    one = case("diagonal")
    two = tuple(t[:2] for t in one.batch)
    noise = nf.estimate_noise(one.model, one.loss, [two], one.symmetries)
    checks.noise_is(noise, oracles.statistics(one.model, oracles.stacked(one.model, one.loss, two), one.symmetries))
    assert noise.standard_errors["hidden"].net.isfinite().all()


def test_nothing_of_the_model_is_touched() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    net[1].eval()
    one = case("diagonal")
    one.loss(net, one.batch).sum().backward()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    symmetry = nf.DiagonalSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], nf.Axis("4.weight", 1))
    noise = nf.estimate_noise(net, one.loss, one.loader(), {"hidden": symmetry})
    assert noise.trace > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert [module.training for module in net.modules()] == modes


def test_dropout_adds_noise_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    one = case("diagonal")
    x = one.batch[0][:1].expand(400, -1)
    y = one.batch[1][:1].expand(400, -1)
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("3.weight", 1))}
    assert nf.estimate_noise(net, one.loss, [(x, y)], symmetry).trace > 1e-3
    assert nf.estimate_noise(net.eval(), one.loss, [(x, y)], symmetry).trace < 1e-20


def test_a_loss_that_is_a_module_and_has_weights_of_its_own() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return self.scale.detach() * squared_error(model, batch)

    one = case("diagonal")
    noise = nf.estimate_noise(one.model, Weighted(), one.loader(), one.symmetries)
    torch.testing.assert_close(noise.trace, 4 * checks.noise_of(one).trace)


def test_a_rescaling_named_by_an_alias_is_measured_once() -> None:
    one = case("a tied weight, named by its alias")
    noise = checks.noise_of(one)
    assert noise.symmetries["hidden"].names == ("first.weight", "out.weight")
    assert rescaling(0) not in noise.symmetries.values()

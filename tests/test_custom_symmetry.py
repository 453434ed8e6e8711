"""Symmetries that a user wrote go through the package like those that it ships: from noise to rebalance."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, make, squared_error
from same import require_same


@dataclass(frozen=True)
class PairSymmetry(nf.AxisSymmetry):
    """Neighbouring rows in pairs, a coordinate for each pair: a group along axes with a layout of its own."""

    action = nf.Action.SCALES_ENTRIES
    per_row = True

    def dimension(self, v: nf.Params) -> int:
        return self.size(v) // 2

    def identity(self, v: nf.Params) -> Tensor:
        return v[self.names[0]].new_zeros(self.size(v) // 2)

    def reduce(self, rows: Tensor) -> Tensor:
        return rows.sum(-1).unflatten(-1, (-1, 2)).sum(-1)

    def gram(self, rows: Tensor) -> Tensor:
        return self.reduce(rows.square())

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.repeat_interleave(2).unsqueeze(-1) * rows

    def exponential(self, x: Tensor) -> Tensor:
        return x.exp()


@dataclass(frozen=True)
class HyperbolicSymmetry(nf.Symmetry):
    """u + v grows as u - v shrinks: a group that mixes two tensors entry by entry, written from nothing."""

    u: str
    v: str

    action = nf.Action.SCALES_EIGENSPACES

    @property
    def names(self) -> tuple[str, ...]:
        return self.u, self.v

    @property
    def eigenvalues(self) -> nf.Grams:
        return nf.Grams(torch.tensor([1.0]).double(), torch.tensor([-1.0]).double())

    def regions(self, v: nf.Params) -> tuple[nf.Axis, ...]:
        return nf.Axis(self.u, 0), nf.Axis(self.v, 0)

    def check(self, v: nf.Params) -> None:
        assert v[self.u].shape == v[self.v].shape

    def dimension(self, v: nf.Params) -> int:
        return 1

    def identity(self, v: nf.Params) -> Tensor:
        return v[self.u].new_zeros(())

    def act(self, x: Tensor, v: nf.Params) -> dict[str, Tensor]:
        u, w = v[self.u], v[self.v]
        return {**v, self.u: x.cosh() * u + x.sinh() * w, self.v: x.sinh() * u + x.cosh() * w}

    def generate(self, x: Tensor, v: nf.Params) -> dict[str, Tensor]:
        return {name: torch.zeros_like(t) for name, t in v.items()} | {self.u: x * v[self.v], self.v: x * v[self.u]}

    def grams(self, v: nf.Params, *, batched: bool = False) -> nf.Grams:
        return nf.Grams(*(((v[self.u] + sign * v[self.v]).square().sum() / 2).reshape(1) for sign in (1, -1)))

    def charge_of(self, grams: nf.Grams) -> Tensor:
        return (grams.plus - grams.minus).squeeze(0)

    def example_charges(self, v: nf.Params) -> nf.Grams:
        return nf.Grams(*((v[self.u] + sign * v[self.v]).square().flatten(1).sum(1) / 2 for sign in (1, -1)))

    def rename(self, names: Mapping[str, str]) -> "HyperbolicSymmetry":
        return replace(self, u=names.get(self.u, self.u), v=names.get(self.v, self.v))


class Difference(nn.Module):
    """(u.x)^2 - (v.x)^2, which hyperbolic rotations of (u, v) leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.u).square() - (x @ self.v).square())[:, None]


def pairs() -> Case:
    """Twelve neurons, rescaled in pairs: a subgroup of the rescaling of single neurons."""
    one = case("diagonal, coupled layers")
    axes = [
        ((nf.Axis(f"{layer}.weight", 0), nf.Axis(f"{layer}.bias", 0)), nf.Axis(f"{layer + 2}.weight", 1))
        for layer in (0, 2)
    ]
    return replace(one, symmetries={f"pairs {index}": PairSymmetry(*sides) for index, sides in enumerate(axes)})


def hyperbolic() -> Case:
    def build() -> Case:
        data = torch.randn(24, 4), torch.randn(24, 1)
        return Case("u^2 - v^2", Difference(), squared_error, data, {"boost": HyperbolicSymmetry("u", "v")})

    return make(build)


def generators(one: Case) -> list[Tensor]:
    """Every generator as a matrix on all parameters laid out one after the other, from the definition of the class."""
    params = {name: tensor.detach() for name, tensor in one.model.named_parameters()}
    matrices = []
    for symmetry in one.symmetries.values():
        for x in torch.eye(symmetry.dimension(params), dtype=torch.float64):
            columns = []
            for entry in torch.eye(len(oracles.flat(params)), dtype=torch.float64):
                parts = entry.split([tensor.numel() for tensor in params.values()])
                v = {name: part.reshape(params[name].shape) for name, part in zip(params, parts, strict=True)}
                columns.append(oracles.flat(symmetry.generate(x.reshape(symmetry.identity(params).shape), v)))
            matrices.append(torch.stack(columns, 1))
    return matrices


def brute_force(one: Case, lr: float, size: int, weight_decay: float) -> Tensor:
    """The parameters at scipy's minimum of the potential, with the covariance of a loop over examples."""
    theta = oracles.flat({name: tensor.detach() for name, tensor in one.model.named_parameters()})
    _, sigma = oracles.covariance(one.model, one.loss, one.batch)
    basis = generators(one)

    def element(weights: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(sum(w * q for w, q in zip(weights, basis, strict=True)))

    def potential(weights: object) -> tuple[float, object]:
        x = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        inverse = element(-x)
        phi = weight_decay * (element(x) @ theta).square().sum()
        phi = phi + lr / (2 * size) * (inverse @ sigma @ inverse).trace()
        (slope,) = torch.autograd.grad(phi, x)
        return phi.item(), slope.numpy()

    best = scipy.optimize.minimize(potential, [0.0] * len(basis), jac=True, method="BFGS", options={"gtol": 1e-12})
    return element(torch.tensor(best.x)) @ theta


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("build", [pairs, hyperbolic])
def test_a_custom_symmetry_goes_from_noise_to_rebalance(build: object, weight_decay: float) -> None:
    one, sgd = build(), nf.SGD(0.1, 5, weight_decay)
    for symmetry in one.symmetries.values():
        assert nf.verify_symmetry(one.model, one.loss, one.batch, symmetry) < 1e-11
    noise = checks.noise_of(one)
    _, sigma = oracles.covariance(one.model, one.loss, one.batch)
    nets = torch.cat([s.charge_of(noise.grams[name]).reshape(-1) for name, s in one.symmetries.items()])
    torch.testing.assert_close(nets, torch.stack([(sigma * q).sum() for q in generators(one)]), rtol=1e-9, atol=1e-12)
    before = nf.drift(noise, sgd, one.model)
    losses = one.loss(one.model, one.batch).detach()
    equilibrium = nf.solve_equilibrium(noise, sgd, one.model, throw=True)
    expected = brute_force(one, 0.1, 5, weight_decay)
    found = oracles.flat({name: equilibrium.params[name] for name, _ in one.model.named_parameters()})
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    torch.testing.assert_close(one.loss(one.model, one.batch).detach(), losses, rtol=1e-11, atol=1e-12)
    for name, rate in nf.drift(checks.noise_of(one), sgd, one.model).items():
        assert rate.abs().max() <= 1e-9 * before[name].abs().max()


@pytest.mark.parametrize("build", [pairs, hyperbolic])
def test_its_flow_ends_at_its_equilibrium(build: object) -> None:
    one, sgd = build(), nf.SGD(0.1, 5, 0.02)
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
    slowest = max(float(times.max()) for times in equilibrium.relaxation_steps.values())
    flow = nf.NoetherFlow(sgd, dt=slowest * sgd.lr / 20)
    end = nf.simulate(one.model, one.loss, one.batch, flow, steps=800, symmetries=one.symmetries).params
    for name, tensor in end.items():
        torch.testing.assert_close(tensor[0], equilibrium.params[name], rtol=1e-6, atol=1e-8)


def test_along_axes_the_layerwise_way_and_the_meter_give_the_numbers_of_single_examples() -> None:
    one = pairs()
    exact = checks.noise_of(one)
    quick = nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries, exact=False)
    torch.testing.assert_close(quick.grams, exact.grams, rtol=1e-9, atol=1e-12)
    meter = nf.NoiseMeter(one.model, one.symmetries)
    with meter.step(one.batch):
        one.loss(one.model, one.batch).mean().backward()
    for name, sides in exact.grams.items():
        for side, other in zip(sides, meter.noise.grams[name], strict=True):
            torch.testing.assert_close(other, side * 40 / 39, rtol=1e-9, atol=1e-12)


def test_it_is_reported_under_its_own_name() -> None:
    one = hyperbolic()
    report = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries).reports[0]
    assert (report.kind, report.dimension, report.status) == ("hyperbolic", 1, "converged")


@pytest.mark.parametrize("build", [pairs, hyperbolic])
def test_its_analysis_travels_in_a_file_and_in_a_pickle(build: object, tmp_path: Path) -> None:
    one = build()
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries)
    analysis.save(tmp_path / "analysis.safetensors")
    loaded = nf.Analysis.load(tmp_path / "analysis.safetensors")
    require_same(loaded, analysis)
    require_same(pickle.loads(pickle.dumps(analysis)), analysis)
    require_same(loaded.noise.merge(analysis.noise), analysis.noise.merge(analysis.noise))


def test_parameters_that_it_refuses_are_refused_by_a_file(tmp_path: Path) -> None:
    noise = checks.noise_of(hyperbolic())
    wrong = replace(noise, mean=noise.mean | {"u": noise.mean["u"][:2]})
    wrong.save(tmp_path / "noise.safetensors")
    with pytest.raises(nf.FileError, match="cannot be loaded: "):
        nf.NoiseMoments.load(tmp_path / "noise.safetensors")


def test_what_joins_entries_of_several_tensors_is_refused_by_the_meters() -> None:
    one = hyperbolic()
    for meter in (nf.NoiseMeter, nf.MicrobatchMeter):
        with pytest.raises(nf.SettingsError, match=r"HyperbolicSymmetry.*estimate_noise\(\.\.\., exact=True\)"):
            meter(one.model, one.symmetries)


def test_a_custom_generator_that_is_wrong_is_refused() -> None:
    @dataclass(frozen=True)
    class Rotation(HyperbolicSymmetry):
        def generate(self, x: Tensor, v: nf.Params) -> dict[str, Tensor]:
            return super().generate(x, v) | {self.u: -x * v[self.v]}

    one = hyperbolic()
    with pytest.raises(nf.NotASymmetryError):
        checks.noise_of(one, {"boost": Rotation("u", "v")})

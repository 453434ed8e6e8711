"""The equilibrium of symmetries that share tensors: against brute force, from several starts, and its refusals."""

import copy
from collections.abc import Iterator

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, make, squared_error
from noetherflow import _spd
from noetherflow.equilibrium.anderson import Anderson

SGD = nf.SGD(0.1, 5, 0.02)


def layers() -> Case:
    """Three linear layers in a row: two groups of matrices share the weight in the middle."""
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    rotations = {
        f"{k} -> {k + 1}": nf.MatrixSymmetry(nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k + 1}.weight", 1)) for k in (0, 1)
    }
    return Case("three linear layers", net, squared_error, (torch.randn(24, 3), torch.randn(24, 3)), rotations)


class Block(nn.Module):
    """A norm with a gain, read by two heads of dimension 2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.mT).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)).mean(1)


def attention() -> Case:
    net = Block()
    nn.init.normal_(net.norm.weight, 1.0, 0.2)
    data = torch.randn(20, 3, 4), torch.randn(20, 2)
    return Case("norm gain and heads", net, squared_error, data, nf.find_symmetries(net, squared_error, data))


def brute_force(one: Case, sgd: nf.SGD) -> float:
    """scipy's minimum of the potential, with the gradient of every example taken anew at every trial point."""
    origin = {name: tensor.detach() for name, tensor in one.model.named_parameters()}
    model = copy.deepcopy(one.model)
    identities = {name: symmetry.identity(origin) for name, symmetry in one.symmetries.items()}
    bases = {name: oracles.coordinates(symmetry, origin) for name, symmetry in one.symmetries.items()}
    sizes = [len(basis) for basis in bases.values()]

    def point(weights: Tensor) -> dict[str, Tensor]:
        params = origin
        for part, (name, symmetry) in zip(weights.split(sizes), one.symmetries.items(), strict=True):
            x = sum((w * b for w, b in zip(part, bases[name], strict=True)), identities[name])
            params = symmetry.act(x, params)
        return params

    def potential(weights: object) -> float:
        params = point(torch.tensor(weights, dtype=torch.float64))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(params[name])
        _, sigma = oracles.covariance(model, one.loss, one.batch)
        norm = sum(sgd.gamma_of(name) * tensor.square().sum() for name, tensor in params.items())
        return float(2 * norm + sgd.temperature * sigma.trace())

    lowest = float("inf")
    while True:
        # Started again from where it ended: finite differences end a search early.
        best = scipy.optimize.minimize(potential, [0.0] * sum(sizes), jac="3-point", method="BFGS")
        if best.fun > lowest * (1 - 1e-9):
            return lowest
        lowest, origin = best.fun, point(torch.tensor(best.x))


@pytest.mark.parametrize(("build", "by_parameter"), [(layers, False), (layers, True), (attention, False)])
def test_brute_force_does_not_get_lower(build: object, by_parameter: bool) -> None:
    one = make(build)
    # Without a zero among them, since scipy ends early in flat directions.
    sgd = nf.SGD(0.1, 5, {name: 0.01 + decay / 2 for name, decay in one.decays.items()}) if by_parameter else SGD
    found = nf.equilibrate(one.model, one.loss, one.loader(), sgd, one.symmetries, tolerance=1e-9)
    assert found.status is nf.Status.CONVERGED
    assert found.passes > 2
    assert found.potential_after == pytest.approx(brute_force(one, sgd), rel=1e-6)


def elsewhere(one: Case, scale: float) -> nn.Module:
    """The model at a random point of its orbit."""
    generator = torch.Generator().manual_seed(3)
    model = copy.deepcopy(one.model)
    params = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for symmetry in one.symmetries.values():
        x = scale * torch.randn(symmetry.identity(params).shape, generator=generator, dtype=torch.float64)
        params = symmetry.act((x + x.mT) / 2 if x.ndim == 2 else x, params)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(params[name])
    return model


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("build", [layers, attention])
def test_the_end_point_does_not_depend_on_the_start(build: object, weight_decay: float) -> None:
    one, sgd = make(build), nf.SGD(0.1, 5, weight_decay)
    ends = [
        nf.equilibrate(model, one.loss, one.loader(), sgd, one.symmetries, tolerance=1e-9)
        for model in (one.model, elsewhere(one, 0.5))
    ]
    assert [end.status for end in ends] == [nf.Status.CONVERGED] * 2
    assert ends[0].potential_after == pytest.approx(ends[1].potential_after, rel=1e-10)
    assert ends[0].trace_after == pytest.approx(ends[1].trace_after, rel=1e-7)
    for name, symmetry in one.symmetries.items():
        # Rotations of the rows turn a Gram matrix and keep its eigenvalues.
        grams = [torch.stack(symmetry.grams(end.params)) for end in ends]
        spectra = [torch.linalg.eigvalsh(gram) if gram.ndim == 3 else gram for gram in grams]
        torch.testing.assert_close(*spectra, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("build", [layers, attention])
def test_the_model_lands_there_with_its_function_and_without_drift(build: object) -> None:
    one = make(build)
    before = nf.drift(checks.noise_of(one), SGD, one.model)
    losses = one.loss(one.model, one.batch).detach()
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    nf.rebalance_(one.model, found, one.loss, one.batch)
    torch.testing.assert_close(dict(one.model.named_parameters()), found.params, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one.loss(one.model, one.batch).detach(), losses, rtol=1e-11, atol=1e-12)
    anew = checks.noise_of(one)
    assert anew.trace.item() == pytest.approx(found.trace_after, rel=1e-12)
    for name, rate in nf.drift(anew, SGD, one.model).items():
        assert rate.norm() <= 1e-6 * before[name].norm()
        torch.testing.assert_close(rate, found.drift[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_where_the_noise_at_a_point_is_enough_two_measurements_are(one: Case) -> None:
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    expected = nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)
    assert found.passes == 2
    torch.testing.assert_close(found.params, expected.params, rtol=1e-9, atol=1e-12)
    assert found.potential_after == pytest.approx(expected.potential_after, rel=1e-12)
    assert found.outcomes == expected.outcomes
    for name, times in found.relaxation_steps.items():
        torch.testing.assert_close(times, expected.relaxation_steps[name], rtol=1e-6, atol=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())


def test_too_few_passes_are_said() -> None:
    one = make(layers)
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, max_passes=3)
    assert (found.status, found.passes) == (nf.Status.NOT_CONVERGED, 3)
    assert "in 3 passes" in found.message
    assert found.potential_after < found.potential_before
    with pytest.raises(nf.EquilibriumError, match="in 3 passes"):
        nf.rebalance_(one.model, found, one.loss, one.batch)


def test_acceleration_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(layers)
    quick = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, tolerance=1e-9)
    monkeypatch.setattr(Anderson, "next", lambda self, x, image: dict(image))
    plain = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, tolerance=1e-9)
    assert plain.status is nf.Status.CONVERGED
    assert quick.passes < plain.passes
    assert quick.potential_after == pytest.approx(plain.potential_after, rel=1e-12)


def test_a_step_that_raises_the_potential_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(layers)
    monkeypatch.setattr(Anderson, "next", lambda self, x, image: {name: t + 2.0 for name, t in image.items()})
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, max_passes=60)
    assert found.status is nf.Status.CONVERGED
    assert found.potential_after < found.potential_before


def test_a_linear_iteration_ends_after_as_many_steps_as_it_has_rates() -> None:
    """On x -> A x + b Anderson acceleration is GMRES: exact after the dimension plus 1 steps."""
    matrix = torch.diag(torch.tensor([0.9, -0.5, 0.3]).double())
    shift = torch.tensor([1.0, 2.0, 3.0]).double()
    acceleration, x = Anderson(), {"x": torch.zeros(3).double()}
    for _ in range(4):
        x = acceleration.next(x, {"x": matrix @ x["x"] + shift})
    torch.testing.assert_close(
        x["x"], torch.linalg.solve(torch.eye(3).double() - matrix, shift), rtol=1e-10, atol=1e-10
    )


def test_coordinates_are_composed_up_to_a_rotation() -> None:
    a, b = (_spd.symmetric(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2))
    element = torch.linalg.matrix_exp(b) @ torch.linalg.matrix_exp(a)
    composed = torch.linalg.matrix_exp(_spd.compose(a, b))
    torch.testing.assert_close(composed @ composed, element.mT @ element)
    torch.testing.assert_close(_spd.compose(a[0], b[0]), a[0] + b[0])


def test_without_symmetries_everything_is_at_rest() -> None:
    one = case("diagonal")
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, {})
    assert (found.status, found.passes, found.outcomes) == (nf.Status.CONVERGED, 1, {})
    assert found.potential_before == found.potential_after


def test_settings_out_of_range_are_refused() -> None:
    one = case("diagonal")
    for wrong in ({"tolerance": 0.0}, {"tolerance": 1.0}, {"max_passes": 1}):
        with pytest.raises(nf.SettingsError, match=str(next(iter(wrong.values())))):
            nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, **wrong)


@pytest.mark.parametrize("once", [False, True])
def test_an_analysis_goes_all_the_way(once: bool) -> None:
    one = make(layers)
    analysis = nf.analyze(one.model, one.loss, iter(one.loader()) if once else one.loader(), SGD, one.symmetries)
    assert [report.status for report in analysis.reports] == ["converged", "converged"]
    assert analysis.equilibrium.passes > 2
    assert analysis.noise.count == 24


def test_every_pass_measures_the_examples_of_the_first() -> None:
    one = make(layers)
    rounds: list[int] = []

    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            rounds.append(len(rounds))
            # A loader with augmentations or a shuffled order yields other examples each time.
            return (tuple(t + rounds[-1] for t in batch) for batch in one.loader())

    kept = nf.equilibrate(one.model, one.loss, Loader(), SGD, one.symmetries)
    assert rounds == [0]
    expected = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    assert kept.status is nf.Status.CONVERGED
    assert kept.potential_after == expected.potential_after

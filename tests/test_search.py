"""The search for an equilibrium: what it leaves out, falls back to, holds, and how far it can be trusted."""

import copy
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
import oracles
from cases import Case, case, make
from noetherflow._minibatch import minibatches
from noetherflow._user_file import load_build
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.memory import required_bytes
from noetherflow.noise.measurement import Measurement
from test_equilibrate import attention, layers

SGD = nf.SGD(0.1, 5, 0.02)
EXAMPLES = Path(__file__).parents[1] / "examples"


def net(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*modules).double()


def squares(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch)
    return (output if isinstance(output, Tensor) else output[0]).square().mean(1)


def data(count: int, *shape: int, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, *shape, generator=generator, dtype=torch.float64) for _ in range(batches)]


class Pooled(nn.Module):
    """A body, with a head that is computed and returned beside the output of the body."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.detached = detached
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.pooler = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        pooled = self.pooler(h)
        # A detached head counts in the loss, and no gradient reaches its parameters.
        return (h + pooled.detach() if self.detached else h), pooled


@pytest.mark.parametrize("detached", [False, True])
def test_parameters_without_a_gradient_are_left_out_and_named(detached: bool) -> None:
    model, batches = Pooled(detached=detached).double(), data(8, 4)
    symmetries = nf.find_symmetries(model, squares, batches[0])
    assert ("pooler: 0 -> 2" in symmetries) is detached
    analysis = nf.analyze(model, squares, batches, SGD)
    assert [report.name for report in analysis.reports] == ["body: 0 -> 2"]
    (note,) = analysis.equilibrium.notes
    assert all(f"pooler.{name}" in note for name in ("0.weight", "2.weight", "2.bias"))
    assert "body" not in note
    assert all(torch.equal(analysis.equilibrium.params[name], analysis.initial[name]) for name in ("pooler.0.weight",))


def test_parameters_outside_of_all_groups_are_left_out_and_named() -> None:
    model = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.1},
        {"params": model[2].parameters(), "weight_decay": 0.0},
    ]
    sgd = nf.SGD.from_optimizer(torch.optim.SGD(groups, lr=0.1), batch_size=8)
    analysis = nf.analyze(model, squares, data(8, 4), sgd)
    assert [report.name for report in analysis.reports] == ["0 -> 2"]
    assert analysis.equilibrium.notes == (
        "left out, because no parameter group of the optimizer holds them: 4.bias, 4.weight",
    )


def test_unreached_parameters_are_named_by_explain() -> None:
    model = Pooled(detached=False)
    explanation = nf.explain(model, squares, data(8, 4)[0].float())
    reasons = {note.parameter: note.reason for note in explanation.axes if not note.symmetries}
    assert {name for name, reason in reasons.items() if "not reached" in reason} == {
        name for name, _ in model.named_parameters() if name.startswith("pooler")
    }


def test_a_model_without_symmetries_has_an_analysis() -> None:
    analysis = nf.analyze(net(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), squares, data(8, 4), SGD)
    assert analysis.reports == ()
    assert analysis.noise.trace > 0
    assert "no symmetry" in analysis.equilibrium.notes[0]
    assert "no symmetry" in str(analysis)


def float_loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that computes in float32 whatever the types of model and data."""
    return model(x.float()).square().mean(1)


def test_a_loss_of_float32_falls_back_with_a_note() -> None:
    model, batches = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).float(), data(8, 4)
    analysis = nf.analyze(model, float_loss, batches, SGD)
    assert [report.status for report in analysis.reports] == ["converged"]
    (note,) = analysis.equilibrium.notes
    assert "computed in torch.float32" in note
    exact = nf.analyze(model, squares, batches, SGD)
    assert exact.equilibrium.notes == ()
    assert analysis.equilibrium.potential_after == pytest.approx(exact.equilibrium.potential_after, rel=1e-5)
    with pytest.warns(UserWarning, match=r"computed in torch\.float32"):
        symmetries = nf.find_symmetries(model, float_loss, batches[0])
    with pytest.warns(UserWarning, match=r"computed in torch\.float32"):
        assert nf.verify_symmetry(model, float_loss, batches[0], symmetries["0 -> 2"]) < 1e-5
    with pytest.raises(nf.LossError, match="float64"):
        nf.analyze(model, float_loss, batches, SGD, dtype=torch.float64)


def batch_norm() -> nn.Sequential:
    return net(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def test_batch_norm_is_measured_between_batches() -> None:
    model, batches = batch_norm().train(), data(16, 4, batches=12)
    before = copy.deepcopy(model.state_dict())
    analysis = nf.analyze(model, squares, batches, SGD, microbatches=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert analysis.equilibrium.notes == ()
    gradients = []
    for batch in batches:
        model.zero_grad()
        squares(model, batch).mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    # The covariance of an example's gradient from the means of batches of 16.
    assert analysis.noise.trace.item() == pytest.approx(16 * torch.stack(gradients).var(0).sum().item(), rel=1e-12)
    assert all(report.imbalance_after < 1e-6 < report.imbalance_before for report in analysis.reports)
    assert all(report.error > 0 for report in analysis.reports)
    with pytest.raises(nf.CoupledExamplesError, match="microbatches=True"):
        nf.analyze(model, squares, batches, SGD)
    with pytest.raises(nf.SettingsError, match="two or more batches"):
        nf.equilibrate(model, squares, batches[:1], SGD, microbatches=True)


def test_batch_norm_in_eval_mode_is_noted() -> None:
    (note,) = nf.equilibrate(batch_norm().eval(), squares, data(16, 4), SGD).notes
    assert note.startswith("1 normalises with running statistics")
    assert "microbatches=True" in note


def test_held_out_data_has_a_drift_left() -> None:
    model, batches = net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), data(8, 4, batches=8)
    used, unused = batches[:4], batches[4:]
    analysis = nf.analyze(model, squares, used, SGD, holdout=unused)
    (report,) = analysis.reports
    assert report.imbalance_after < 1e-9
    moved = copy.deepcopy(model)
    nf.rebalance_(moved, analysis.equilibrium, squares, used[0])
    symmetries = analysis.equilibrium.symmetries
    for place, expected in ((model, report.holdout_before), (moved, report.holdout_after)):
        noise = nf.estimate_noise(place, squares, unused, symmetries)
        rate = nf.drift(noise, SGD, place)[report.name]
        plus, minus = symmetries[report.name].grams(dict(place.named_parameters()))
        size = 2 * SGD.temperature * sum(noise.grams[report.name]) + 4 * SGD.gamma * (plus + minus)
        assert expected == pytest.approx((rate.norm() / size.norm()).item(), rel=1e-10)
    assert 0.01 < report.holdout_after < report.holdout_before
    assert not nf.equilibrate(model, squares, used, SGD).holdout


def test_what_runs_away_together_is_held_along_that_direction() -> None:
    """a e^{2(x - y)} + b e^{2(y - x)} + c e^{-2(x + y)} has no minimum along x + y, and x - y = log(b / a) / 4."""
    values = {"a": 1.0, "b": 2.0, "c": 1e-9}
    variance = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    params = {name: torch.ones(1, dtype=torch.float64) for name in values}
    a, b, c = (nf.Axis(name, 0) for name in values)
    pair = {"x": nf.ScalarSymmetry([b, c], [a]), "y": nf.ScalarSymmetry([a, c], [b])}
    noise = nf.NoiseMoments(
        1,
        dict.fromkeys(values, torch.zeros(1)),
        {},
        variance,
        torch.zeros(()),
        {},
        {},  # no Grams are needed
    )

    def orbit(sgd: nf.SGD) -> CommutingOrbit:
        return CommutingOrbit(pair, params, minibatches(noise, sgd))

    minimum = orbit(nf.SGD(0.1, 5)).minimise()
    assert {outcome.status for outcome in minimum.outcomes.values()} == {nf.Status.AT_INFINITY}
    assert "run away together" in minimum.outcomes["x"].message
    x, y = (minimum.coordinates[name].item() for name in pair)
    assert x + y == pytest.approx(0.0, abs=1e-12)
    assert x - y == pytest.approx(torch.log(torch.tensor(2.0)).item() / 4, rel=1e-6)
    # The twin: with weight decay the sum is held.
    held = orbit(nf.SGD(0.1, 5, 1e-3)).minimise()
    assert {outcome.status for outcome in held.outcomes.values()} == {nf.Status.CONVERGED}


def test_a_step_that_overflows_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(layers)
    expected = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    start = {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}

    def fragile(limit: float) -> nf.Loss:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            change = max((p.detach() - start[n]).abs().max() for n, p in model.named_parameters() if n in start)
            return one.loss(model, batch) * (1.0 if change <= limit else torch.inf)

        return loss

    steps: list[float] = []
    whole = max((expected.params[name] - start[name]).abs().max().item() for name in start)
    first = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, max_passes=2)
    steps.append(max((first.params[name] - start[name]).abs().max().item() for name in start))
    # A limit between the equilibrium and the first step, which goes further.
    assert whole < steps[0]
    found = nf.equilibrate(one.model, fragile((whole + steps[0]) / 2), one.loader(), SGD, one.symmetries)
    assert found.status is nf.Status.CONVERGED
    assert found.potential_after == pytest.approx(expected.potential_after, rel=1e-9)
    with pytest.raises(nf.NonFiniteError, match=r"pass \d+: .*changes '.*' most, by factors up to e\^"):
        nf.equilibrate(one.model, fragile(1e-6), one.loader(), SGD, one.symmetries)
    assert all(torch.equal(p, start[n]) for n, p in one.model.named_parameters())


def samples(one: Case, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Independent data of the shapes of a case, in four batches."""
    shapes = [tensor.shape[1:] for tensor in one.batch]
    x, y = (torch.randn(count, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(x[start::4], y[start::4]) for start in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("build", [layers, attention])
def test_standard_errors_are_the_spread_over_samples(build: object) -> None:
    one, generator = make(build), torch.Generator().manual_seed(2)
    ends = [
        nf.equilibrate(one.model, one.loss, samples(one, 320, generator), SGD, one.symmetries, tolerance=1e-8)
        for _ in range(30)
    ]
    for name in one.symmetries:
        spread = torch.stack([end.coordinates[name] for end in ends]).std(0)
        claimed = torch.stack([end.standard_error[name] for end in ends]).square().mean(0).sqrt()
        assert 0.75 < (claimed / spread).mean() < 1.35, name


@pytest.mark.parametrize("count", [6, 48, 300])
def test_the_standard_error_of_a_scaling_has_a_closed_form(count: int) -> None:
    """Of x = log(N_+ / N_-) / 4, by the delta method from the squared gradients of single examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False)).double()
    x = torch.randn(count, 3, dtype=torch.float64).abs() * model[0].weight.detach().sign()
    batches, sgd = [x], nf.SGD(0.1, 5)
    found = nf.equilibrate(model, squares, batches, sgd)
    (name,) = found.symmetries
    mean, sigma = oracles.covariance(model, squares, x)
    assert mean is not None
    plus, minus = sigma[:3, :3].trace(), sigma[3:, 3:].trace()
    assert found.coordinates[name].item() == pytest.approx((torch.log(plus / minus) / 4).item(), rel=1e-9)
    stack = oracles.stacked(model, squares, x)
    gradients = torch.cat([part.flatten(1) for part in stack.values()], 1)
    centred = gradients - gradients.mean(0)
    each = centred[:, :3].square().sum(1) / plus - centred[:, 3:].square().sum(1) / minus
    expected = each.std().item() / 4 / count**0.5
    # Few groups know the spread only roughly: a relative error of 1 / sqrt(2 (K - 1)).
    groups = min(32, count // 2)
    assert found.standard_error[name].item() == pytest.approx(expected, rel=3 / (2 * (groups - 1)) ** 0.5)
    assert found.error[name] == found.standard_error[name].item()


def test_a_search_that_does_not_fit_is_refused_with_what_would_fit() -> None:
    model = net(*(module for _ in range(3) for module in (nn.Linear(40, 40), nn.ReLU())), nn.Linear(40, 3))
    batches = data(8, 40)
    symmetries = nf.find_symmetries(model, squares, batches[0])
    first = dict(list(symmetries.items())[:2])
    needed = [
        required_bytes(dict(model.named_parameters()), [*model.state_dict()], chosen, torch.float64)
        for chosen in (first, symmetries)
    ]
    assert needed[0] < needed[1]
    with pytest.raises(nf.SettingsError, match=r"more than max_bytes = .* MB: the first 2 of the 3 symmetries fit"):
        nf.equilibrate(model, squares, batches, SGD, symmetries, max_bytes=needed[1] - 1)
    found = nf.equilibrate(model, squares, batches, SGD, first, max_bytes=needed[0])
    assert found.status is nf.Status.CONVERGED
    with pytest.raises(nf.SettingsError, match=r"a single symmetry needs .* MB; freeze"):
        nf.analyze(model, squares, batches, SGD, max_bytes=1000)


def test_at_rest_is_said_relative_to_the_error() -> None:
    one = case("diagonal")
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    assert not found.at_rest["hidden"]
    nf.rebalance_(one.model, found, one.loss, one.batch)
    again = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries)
    assert again.distance["hidden"] < 1e-9 < again.error["hidden"]
    assert again.at_rest["hidden"]
    single = nf.equilibrate(one.model, one.loss, [tuple(t[:1] for t in one.batch)], SGD, one.symmetries)
    assert single.standard_error["hidden"].isnan().all()
    assert not single.at_rest["hidden"]


@pytest.mark.slow
def test_intervals_of_resampled_data_cover_the_equilibrium_of_all_data() -> None:
    """95 % intervals from 50 resampled data sets of the digits, over all coordinates of a trained network."""
    model, loss, _, sgd, _ = load_build(EXAMPLES / "digits_mlp.py")
    images, labels = sys.modules["digits_mlp"].data().tensors
    count, generator = len(labels), torch.Generator().manual_seed(0)
    symmetries = nf.find_symmetries(model, loss, (images[:8], labels[:8]))

    def equilibrium(chosen: Tensor) -> nf.Equilibrium:
        return nf.equilibrate(
            model, loss, [(images[part], labels[part]) for part in chosen.split(256)], sgd, symmetries
        )

    truth = equilibrium(torch.arange(count))
    covered = []
    for _ in range(50):
        sample = equilibrium(torch.randint(count, (count,), generator=generator))
        for name, x in truth.coordinates.items():
            covered.append((sample.coordinates[name] - x).abs() <= 1.96 * sample.standard_error[name])
    share = torch.cat(covered).double().mean().item()
    assert 0.90 <= share <= 0.99


def test_a_measurement_leaves_no_tensor_to_the_collector_of_cycles() -> None:
    """A cycle keeps statistics of the size of the model until Python collects it, which may be passes later."""
    model, batches = net(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3)).float(), data(8, 200)
    symmetries = nf.find_symmetries(model, squares, batches[0])
    measurement = Measurement(
        model, squares, batches, symmetries, dtype=torch.float32, microbatches=False, max_bytes=2**28
    )
    params = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    measurement.at(params)
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        measurement.at(params)
        gc.collect()
        kept = [thing for thing in gc.garbage if isinstance(thing, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not kept

"""How far a model still learns: against gradient descent step by step, and over samples of the data."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import mlp, squared_error
from curvatures import Data, hessian
from noetherflow.forecasting import learner as learner_file
from noetherflow.forecasting.estimate import Estimate
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.gradient_flow import STAGES, STEPS, flow, reach, stages
from noetherflow.forecasting.learner import Learner, jackknife
from noetherflow.forecasting.learning import Learning, no_learning
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import Metric, metric_at
from noetherflow.forecasting.spectrum import largest


@pytest.mark.parametrize("time", [0.3, 3.0, 30.0])
def test_a_flow_relaxes_every_direction(time: float) -> None:
    rates = torch.logspace(-3, 2, 41, dtype=torch.float64)

    def force(point: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": rates * point["x"]}

    count = stages(time, 100.0)
    end = flow(force, {"x": torch.ones_like(rates)}, time, count)["x"]
    assert float((end - torch.exp(-rates * time)).abs().max()) < 0.05
    slow = rates * time < 0.1
    torch.testing.assert_close(end[slow], torch.exp(-rates * time)[slow], rtol=2e-3, atol=0)
    # Twin: as many steps of plain descent are not stable.
    plain = (1 - rates * time / (STEPS * count)).pow(STEPS * count)
    assert float((plain - torch.exp(-rates * time)).abs().max()) > 1


def test_the_reach_of_a_limited_number_of_gradients() -> None:
    assert stages(0.999 * reach(7.0), 7.0) == STAGES
    assert stages(1.01 * reach(7.0), 7.0) > STAGES
    assert math.isinf(reach(0.0))


def learner_of(
    model: nn.Module,
    batches: Data,
    settings: nf.SGD | nf.AdamW,
    symmetries: dict[str, nf.Symmetry] | None = None,
) -> Learner:
    """The gradient flow of a model."""
    given = MeanLoss(model, squared_error, batches, settings, torch.float64)
    metric = metric_at(given, given.params, settings)
    top = largest(given, given.params, metric, 0).value.value
    return Learner(given, Exact.if_valid(given)[0], settings, metric, symmetries or {}, top, 0)


def trace_of(params: dict[str, Tensor], model: nn.Module, batches: Data) -> float:
    model.load_state_dict(params)
    return float(hessian(model, squared_error, batches).trace())


def descent(learner: Learner, model: nn.Module, batches: Data, steps: int, lr: float, decay: float) -> float:
    """The change of the full Hessian's trace by plain gradient descent with fixed step sizes."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for _ in range(steps):
        model.zero_grad()
        squared_error(model, (whole[0], whole[1])).mean().backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                p.sub_(lr * (learner.metric.multipliers[name] * p.grad + decay * p))
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    change = trace_of(end, model, batches) - trace_of(start, model, batches)
    model.load_state_dict(start)
    return change


def data(seed: int, count: int = 6, size: int = 16) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(count * size, n, generator=generator, dtype=torch.float64) for n in (4, 2))
    y = 2 * x[:, :2] + 0.3 * noise
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        (nf.SGD(0.01, 4), nn.ReLU),
        (nf.SGD(0.005, 4, momentum=0.5), nn.Tanh),
        (nf.AdamW(0.002, batch_size=4), nn.Tanh),
    ],
)
def test_learning_is_that_of_gradient_descent(
    settings: nf.SGD | nf.AdamW, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_file, "_VECTORS", 128)
    torch.manual_seed(3)
    model, batches = mlp(4, 6, 2, activation=activation).double(), data(1)
    decay = settings.weight_decay if isinstance(settings, nf.AdamW) else 0.0
    assert isinstance(decay, float)
    learner = learner_of(model, batches, settings)
    learning = learner.after(300, 0.0)
    pace = 0.002 if isinstance(settings, nf.AdamW) else 0.01
    expected = descent(learner, model, batches, 600, pace / 2, decay)
    assert learning.falls
    assert learning.trace.value == pytest.approx(expected, rel=0.1, abs=2 * learning.trace.error)
    assert abs(expected) > 4 * learning.trace.error
    # Twin: half of the time is another change.
    halved = learner.after(150, 0.0).trace.value
    assert abs(halved - expected) > 0.2 * abs(expected)


def product(u: float, w: float) -> nn.Sequential:
    """Two linear layers of a hidden unit, u (w . x), at the minimum of the loss of `products`."""
    model = mlp(2, 1, 2, bias=False, activation=nn.Identity).double()
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[2].weight.fill_(u)
    return model


def products(seed: int, scale: float = 0.36, count: int = 12) -> Data:
    """Targets scale (1, 1) (1, 1) x with noise: the minimum is at u w = scale."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(count * 20, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    y = scale * x.sum(1, keepdim=True) + 0.5 * noise
    return list(zip(x.split(20), y.split(20), strict=True))


SGD = nf.SGD(0.05, 4)
PAIR: dict[str, nf.Symmetry] = {"pair": nf.ScalarSymmetry([nf.Axis("2.weight", 0)], [nf.Axis("0.weight", 0)])}


def slopes(u: float, w: float, seeds: int) -> Tensor:
    """The slopes of the loss and their errors, for samples of the data."""
    result = []
    for seed in range(seeds):
        given = MeanLoss(product(u, w), squared_error, products(seed), SGD, torch.float64)
        slope = Learner(given, None, SGD, metric_at(given, given.params, SGD), {}, 1.0, 0)._slope()
        result.append((slope.value, slope.sampling))
    return torch.tensor(result, dtype=torch.float64)


def test_a_sample_at_a_minimum_is_not_taken_for_learning() -> None:
    value, error = slopes(0.6, 0.6, 100).T
    # Unbiased, with the error that is stated, and beyond two errors in about 4 % of samples.
    assert abs(float(value.mean())) < 3 * float(value.std()) / 10
    assert float(error.square().mean().sqrt()) == pytest.approx(float(value.std()), rel=0.3)
    assert float((-value > 2 * error).double().mean()) < 0.1
    # Twin: off the minimum, most samples show it.
    value, error = slopes(0.75, 0.6, 20).T
    assert float((-value > 2 * error).double().mean()) > 0.8


def test_weight_decay_along_the_orbit_is_not_learning() -> None:
    """At a minimum of the loss with the penalty, off its balance: decay moves along the orbit, and nowhere else."""
    settings, batches = nf.SGD(0.05, 4, 0.1), products(0)
    model, inputs = product(1.2, 0.3), torch.cat([x for x, _ in batches])
    # The target for which the gradient cancels the decay across the orbit.
    learner = learner_of(model, batches, settings, PAIR)
    pull, shift = learner._decay
    theta = {n: p.detach() for n, p in model.named_parameters()}
    across = {n: pull[n] * theta[n] - shift[n] for n in theta}
    charge = float((across["2.weight"] * theta["2.weight"]).sum() - (across["0.weight"] * theta["0.weight"]).sum())
    assert charge == pytest.approx(0, abs=1e-10)
    size = {n: float(t.square().sum()) for n, t in theta.items()}
    x = (size["2.weight"] - size["0.weight"]) / (size["2.weight"] + size["0.weight"])
    torch.testing.assert_close(shift["2.weight"], 0.1 * x * theta["2.weight"])
    torch.testing.assert_close(shift["0.weight"], -0.1 * x * theta["0.weight"])
    # Twin: without the symmetry, all of the decay counts.
    assert not any(bool(part.any()) for part in learner_of(model, batches, settings)._decay[1].values())
    assert len(inputs) == 240


def test_the_part_along_the_orbit_in_the_metric_of_adamw() -> None:
    model, batches, settings = product(1.2, 0.3), products(0), nf.AdamW(0.01, weight_decay=0.1, batch_size=4)
    learner = learner_of(model, batches, settings, PAIR)
    pull, shift = learner._decay
    theta = {n: p.detach() for n, p in model.named_parameters()}
    step = {n: learner.metric.multipliers[n] * (pull[n] * theta[n] - shift[n]) for n in theta}
    # The rest of the step moves no charge of AdamW, sum of q theta^2 / m.
    rates = {n: float((theta[n] / learner.metric.multipliers[n] * step[n]).sum()) for n in theta}
    assert rates["2.weight"] == pytest.approx(rates["0.weight"], rel=1e-6)
    # What is taken out is a step along the orbit: it scales both tensors by opposite exponents.
    scales = {n: learner.metric.multipliers[n] * shift[n] / theta[n] for n in theta}
    torch.testing.assert_close(scales["2.weight"], scales["2.weight"].mean().expand_as(scales["2.weight"]))
    torch.testing.assert_close(scales["0.weight"].mean(), -scales["2.weight"].mean())
    for n, tensor in theta.items():
        torch.testing.assert_close(learner.metric.multipliers[n] * pull[n] * tensor, 0.1 * tensor)


def test_the_error_of_a_mean_from_leaving_out_groups() -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    groups = [values[k::4] for k in range(4)]
    without = [float(torch.cat([g for j, g in enumerate(groups) if j != k]).mean()) for k in range(4)]
    means = torch.stack([g.mean() for g in groups])
    expected = float(means.std()) / 2
    mean, error = jackknife(float(values.mean()), without, [0.25] * 4)
    assert mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert error == pytest.approx(expected * scipy.stats.t.ppf(0.975, 3) / 2, rel=1e-9)
    # The bias of the square of a mean is taken out.
    squares = [part**2 for part in without]
    unbiased = jackknife(float(values.mean()) ** 2, squares, [0.25] * 4)[0]
    assert unbiased == pytest.approx(float(values.mean()) ** 2 - float(means.var()) / 4, rel=1e-9)


@pytest.mark.parametrize(
    ("slope", "trace", "orbit", "falls", "dominates"),
    [
        (Estimate(-1.0, 0.0, 0.6), Estimate(9.0, 0.1), 1.0, False, False),
        (Estimate(-1.0, 0.0, 0.4), Estimate(9.0, 0.1), 1.0, True, True),
        (Estimate(-1.0, 0.0, 0.4), Estimate(0.5, 0.1, 0.1), -1.0, True, False),
        (Estimate(-1.0, 0.0, 0.4), Estimate(0.5, 0.1, 0.3), -1.0, True, True),
        (Estimate(-1.0), Estimate(-0.9), 1.0, True, False),
        (Estimate(1.0), Estimate(-1.1), 1.0, False, False),
        (Estimate(-1.0, 0.0, 0.6), Estimate(9.0, 0.1, 4.0), 1.0, False, True),
        (Estimate(-1.0, 0.0, 0.6), Estimate(9.0, 0.1, 5.0), 1.0, False, False),
        (Estimate(-1.0, 0.0, 0.6), Estimate(9.0, 0.1, 4.0), 20.0, False, False),
    ],
)
def test_the_verdict(slope: Estimate, trace: Estimate, orbit: float, falls: bool, dominates: bool) -> None:
    learning = Learning(10.0, slope, -0.1, trace, orbit)
    assert (learning.falls, learning.dominates) == (falls, dominates)
    assert "within 10 steps" in str(learning)
    assert "cannot be told: why" in str(no_learning("why"))
    assert not no_learning("why").dominates


def test_what_still_learns_is_not_forecast() -> None:
    torch.manual_seed(0)
    model, batches = mlp(2, 6, 2).double(), products(0)
    settings = nf.SGD(0.05, 4, 1e-3)
    forecast = nf.forecast(model, squared_error, batches, settings, progress=False)
    assert forecast.learning.dominates
    assert "the loss still falls" in forecast.trace.ratio.why
    assert forecast.trace.then.known
    assert not forecast.half_steps.known
    assert forecast.learning.steps > 0
    assert forecast.sentence.startswith("What becomes of the sharpness cannot be told: the loss still falls")
    assert "this assumption does not hold" in forecast.assumptions[0]
    assert "the loss still falls" in forecast.warmup.why
    assert "cannot be told: the loss still falls" in str(forecast)


def test_a_model_at_its_minimum_is_forecast() -> None:
    model = product(1.2, 0.3)
    forecast = nf.forecast(model, squared_error, products(1), nf.SGD(0.05, 4), PAIR, progress=False)
    assert not forecast.learning.falls
    assert forecast.trace.ratio.known
    assert forecast.half_steps.known
    assert forecast.learning.steps == pytest.approx(forecast.half_steps.value)
    assert forecast.learning.orbit == pytest.approx(
        (forecast.trace.then.value - forecast.trace.now.value) / 2, rel=0.01
    )
    assert "neither the fall of the loss" in forecast.assumptions[0]


def test_an_unstable_flow_is_refused() -> None:
    learner = learner_of(product(1.2, 0.3), products(0, scale=1.0), nf.SGD(0.05, 4))
    metric = learner.metric
    large = Metric(metric.loss, metric.gradient, {n: 1e9 * m for n, m in metric.multipliers.items()}, metric.noise)
    learning = replace(learner, metric=large).after(1000, 1.0)
    assert "not stable" in learning.trace.why
    assert not learning.dominates

"""The sharpness of a forecast against full Hessians, eigenvalues and bisection, now and at the equilibrium."""

import copy
import functools
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import cross_entropy, mlp, squared_error
from curvatures import SGD, Net, counted, digits, first_rise, hessian
from noetherflow.forecasting import traces
from noetherflow.forecasting.critical import MAX_PASSES, critical_sharpness
from noetherflow.forecasting.estimate import mean_of
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import Metric, metric_at, reference_lr
from noetherflow.forecasting.spectrum import largest, stable_steps

VECTORS = 32


@functools.cache
def relu() -> Net:
    return digits(nn.ReLU)


@functools.cache
def tanh() -> Net:
    return digits(nn.Tanh)


@functools.cache
def relu_equilibrium() -> nf.Equilibrium:
    net = relu()
    settings = nf.SGD(0.1, 32, 1e-3)
    return nf.equilibrate(net.model, net.loss, net.batches, settings, progress=False)


def deviations(net: Net, seeds: int) -> Tensor:
    """(estimate - truth) / error of the trace of every block, for several draws of the random vectors."""
    given = net.mean_loss()
    result = []
    for seed in range(seeds):
        samples = {n: torch.zeros(len(given.batches), VECTORS, dtype=torch.float64) for n in given.names}
        for made in given.products(given.params, VECTORS, seed):
            for name in given.names:
                samples[name][made.batch, made.number] = (made.vector[name] * made.product[name]).sum()
        for name, truth in net.diagonal.items():
            estimate = mean_of(samples[name], given.weights)
            result.append((estimate.value - float(truth.sum())) / estimate.error)
    return torch.tensor(result)


def covered(deviation: Tensor) -> float:
    """The share of blocks within the 95 % interval of the stated error, which is estimated from the vectors."""
    interval = scipy.stats.t.ppf(0.975, VECTORS - 1)
    return float((deviation.abs() <= interval).double().mean())


@pytest.mark.parametrize("net", [relu, tanh])
def test_traces_of_blocks_lie_within_their_errors(net: functools.partial[Net]) -> None:
    deviation = deviations(net(), 20)
    spread = 2 * (0.95 * 0.05 / len(deviation)) ** 0.5
    assert covered(deviation) >= 0.95 - spread
    # Twins: errors that are too small by a factor of two, and estimates that are off by two errors.
    assert covered(2 * deviation) < 0.9
    assert covered(deviation + 2) < 0.9


def test_the_traces_of_a_relu_network_are_exact() -> None:
    net = relu()
    forecast = nf.forecast(net.model, net.loss, net.batches, SGD, equilibrium=still(net), progress=False)
    assert forecast.exact
    for name, truth in net.diagonal.items():
        now = forecast.blocks[name].now
        assert now.error == 0
        assert now.value == pytest.approx(float(truth.sum()), rel=1e-10)
    assert forecast.trace.now.value == pytest.approx(float(net.hessian.trace()), rel=1e-10)


def still(net: Net) -> nf.Equilibrium:
    """An equilibrium without symmetries, which is where the model is."""
    return nf.equilibrate(net.model, net.loss, net.batches, SGD, {}, progress=False)


class TiedTwice(nn.Module):
    """A weight that is used twice: not linear in a single entry."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(self.hidden(x).relu()).relu()
        result: Tensor = self.out(hidden)
        return result


class TiedView(TiedTwice):
    """As above, through a single transposed view."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.hidden.weight.T
        hidden = ((x @ weight).relu() @ weight + self.hidden.bias).relu()
        result: Tensor = self.out(hidden)
        return result


class Residual(TiedTwice):
    """An activation that is used twice, which is not a weight that is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.hidden.weight.T + self.hidden.bias
        result: Tensor = self.out(first + first.relu())
        return result


def small(model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    return model.double(), [(torch.randn(16, 4).double(), torch.randn(16, 2).double()) for _ in range(3)]


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (mlp(4, 6, 2), True),
        (nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 2)), True),
        (mlp(4, 6, 2, activation=nn.Tanh), False),
        (TiedTwice(), False),
        (TiedView(), False),
        (Residual(), True),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), False),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), False),
    ],
    ids=["relu", "leaky", "tanh", "used twice", "view used twice", "residual", "layer norm", "batch norm"],
)
def test_exact_traces_are_claimed_where_they_are_exact(model: nn.Module, exact: bool) -> None:
    model, batches = small(model)
    given = MeanLoss(model, squared_error, batches, SGD, torch.float64)
    diagonal, why = Exact.if_valid(given)
    assert (diagonal is not None) == exact
    assert bool(why) != exact
    if diagonal is not None:
        truth = hessian(model, squared_error, batches).diagonal()
        parts = [diagonal.diagonal(given.params, k) for k in range(3)]
        mean = torch.cat([torch.stack([part[n] for part in parts]).mean(0).flatten() for n in given.names])
        torch.testing.assert_close(mean, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("net", [relu, tanh])
def test_the_largest_eigenvalue(net: functools.partial[Net]) -> None:
    given = net().mean_loss()
    top = largest(given, given.params, None, 0)
    values, vectors = torch.linalg.eigh(net().hessian)
    assert top.value.value == pytest.approx(float(values[-1]), rel=1e-6)
    assert top.value.error < 1e-3 * top.value.value
    flat = torch.cat([part.flatten() for part in top.vector.values()])
    assert abs(float(flat @ vectors[:, -1])) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("settings", [nf.SGD(0.05, 8), nf.AdamW(1e-3, batch_size=8)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("start", [1e-3, 1, 1e3])
def test_critical_sharpness_against_bisection(settings: nf.SGD | nf.AdamW, start: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8).double()
    data = {cross_entropy: torch.randint(0, 4, (64,)), squared_error: torch.randn(64, 4).double()}
    normed = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    models = (mlp(8, 16, 16, 4), mlp(8, 16, 4, activation=nn.Tanh), nn.Linear(8, 4), normed)
    for model in models:
        for loss, y in data.items():
            calls = [0]
            batches = [(x[:32], y[:32]), (x[32:], y[32:])]
            given = MeanLoss(model.double(), counted(loss, calls), batches, settings, torch.float64)
            metric = metric_at(given, given.params, settings)
            calls[0] = 0
            sharpness = critical_sharpness(given, given.params, metric, start * reference_lr(settings, given.names))
            assert calls[0] <= MAX_PASSES * len(batches) == 8 * len(batches)

            def change(step: float, given: MeanLoss = given, metric: Metric = metric) -> float:
                moved = {n: p - step * metric.direction[n] for n, p in given.params.items()}
                return given.value(moved) - metric.loss

            assert sharpness.value == pytest.approx(2 / first_rise(change), rel=0.05)
            assert sharpness.error <= 0.05 * sharpness.value


def test_critical_sharpness_of_a_quadratic_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1).double(), torch.randn(50, 6).double()
    batches = [(x, torch.randn(50, 1).double())]
    given = MeanLoss(model, squared_error, batches, SGD, torch.float64)
    metric = metric_at(given, given.params, SGD)
    g = torch.cat([part.flatten() for part in metric.gradient.values()])
    truth = float(g @ hessian(model, squared_error, batches) @ g / (g @ g))
    assert critical_sharpness(given, given.params, metric, 1.0).value == pytest.approx(truth, rel=1e-6)


def carried_trace(factor: float) -> tuple[float, float]:
    """Tr H at the equilibrium, carried with an exponent `factor` times the coordinates, and from the full Hessian."""
    net, equilibrium = relu(), relu_equilibrium()
    scaled = replace(equilibrium, coordinates={n: -factor / 2 * x for n, x in equilibrium.coordinates.items()})
    carried = traces.carried(scaled, scaled.coordinates, net.diagonal)
    there = copy.deepcopy(net.model)
    there.load_state_dict(equilibrium.params)
    truth = hessian(there, net.loss, net.batches).trace()
    return sum(float(part.sum()) for part in carried.values()), float(truth)


def test_the_trace_is_carried_to_the_equilibrium() -> None:
    carried, truth = carried_trace(-2)
    assert carried == pytest.approx(truth, rel=1e-10)
    net, equilibrium = relu(), relu_equilibrium()
    forecast = nf.forecast(
        net.model, net.loss, net.batches, nf.SGD(0.1, 32, 1e-3), equilibrium=equilibrium, progress=False
    )
    assert forecast.trace.then.value == pytest.approx(truth, rel=1e-10)
    assert forecast.trace.now.value == pytest.approx(float(net.hessian.trace()), rel=1e-10)
    # After 300 steps the loss still falls.
    assert "the loss still falls" in forecast.trace.ratio.why
    assert forecast.trace.then.error == 0
    assert forecast.trace.then.sampling > 0


@pytest.mark.parametrize("factor", [-1.0, 2.0, 0.0])
def test_a_wrong_exponent_is_noticed(factor: float) -> None:
    carried, truth = carried_trace(factor)
    assert abs(carried / truth - 1) > 0.01


def test_blocks_at_the_equilibrium_and_the_largest_eigenvalue_there() -> None:
    net, equilibrium = relu(), relu_equilibrium()
    settings = nf.SGD(0.1, 32, 1e-3)
    forecast = nf.forecast(net.model, net.loss, net.batches, settings, equilibrium=equilibrium, progress=False)
    there = copy.deepcopy(net.model)
    there.load_state_dict(equilibrium.params)
    full = hessian(there, net.loss, net.batches)
    for name, part in zip(net.diagonal, full.diagonal().split(net.sizes), strict=True):
        assert forecast.blocks[name].then.value == pytest.approx(float(part.sum()), rel=1e-9)
    top = float(torch.linalg.eigvalsh(full)[-1])
    assert forecast.largest.then.value == pytest.approx(top, rel=1e-5)
    assert forecast.stable_step.then.value == pytest.approx(2 / top, rel=1e-5)


def test_random_vectors_carry_the_trace_too() -> None:
    net, settings = tanh(), nf.SGD(0.1, 32, 1e-3)
    out = nf.DiagonalSymmetry([nf.Axis("4.weight", 0), nf.Axis("4.bias", 0)], [])
    coordinates = {"out": torch.linspace(-0.3, 0.3, 10).double()}
    point = replace(still(net), symmetries={"out": out}, coordinates=coordinates)
    made = traces.measure(net.mean_loss(settings), None, point, {}, 16, 0)
    expected = out.act(-2 * coordinates["out"], net.diagonal)
    total = made.total().then
    assert abs(total.value - sum(float(part.sum()) for part in expected.values())) < 3 * total.error


class NoSecondDerivative(torch.autograd.Function):
    """tanh, as a fused kernel has it: with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]
        result: Tensor = g * (1 - y.square())
        return result


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = NoSecondDerivative.apply(x)
        return result


def test_without_a_second_derivative_the_critical_sharpness_remains() -> None:
    model, batches = small(nn.Sequential(nn.Linear(4, 6), Fused(), nn.Linear(6, 2)))
    equilibrium = nf.equilibrate(model, squared_error, batches, SGD, {}, progress=False)
    forecast = nf.forecast(model, squared_error, batches, SGD, equilibrium=equilibrium, progress=False)
    assert forecast.critical.now.known
    assert not forecast.trace.now.known
    assert not forecast.largest.now.known
    assert "no second derivative" in forecast.trace.now.why
    assert "cannot be told" in str(forecast)
    assert "cannot be told" in forecast.sentence


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.squeeze(1).mean(1))
        return result


def test_flash_attention_has_a_hessian_through_its_plain_kernel() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    batches = [(torch.randn(8, 5, 8).double(), torch.randn(8, 2).double()) for _ in range(3)]
    equilibrium = nf.equilibrate(model, squared_error, batches, SGD, {}, progress=False)
    forecast = nf.forecast(model, squared_error, batches, SGD, equilibrium=equilibrium, progress=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        full = hessian(model, squared_error, batches)
    assert forecast.largest.now.value == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-5)
    assert abs(forecast.trace.now.value - float(full.trace())) < 3 * forecast.trace.now.error


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_stable_step_with_noise(share: float) -> None:
    """Isotropic inputs: the mean square of a displacement shrinks just below the step, and grows just above it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 6, generator=generator, dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    batches = [(part, torch.zeros(len(part), 1).double()) for part in x.split(500)]
    settings = nf.SGD(0.1, 3)
    given = MeanLoss(model, squared_error, batches, settings, torch.float64)
    metric = metric_at(given, given.params, settings)
    top = largest(given, given.params, None, 0)
    quiet, noisy = stable_steps(given, given.params, metric, top, settings)
    # Gaussian inputs: E|H_i u|^2 = lambda (2 lambda + Tr H), with lambda = 2 and Tr H = 12.
    assert noisy.value == pytest.approx(2 / (2 * (1 + 1 / 3) + 12 / 3), rel=0.03)
    assert quiet.value == pytest.approx(1.0, rel=0.03)
    minibatches = x.reshape(-1, 3, 6)
    u = torch.cat([part.flatten() for part in top.vector.values()])
    lr = share * noisy.value
    step = u - lr * 2 * torch.einsum("bsi,bsj,j->bi", minibatches, minibatches, u) / 3
    assert (float(step.square().sum(1).mean()) < 1) == (share < 1)


def test_the_model_and_the_random_generators_stay_as_they_were() -> None:
    net = relu()
    before = {name: p.clone() for name, p in net.model.state_dict().items()}
    state = torch.get_rng_state()
    nf.forecast(net.model, net.loss, net.batches[:2], SGD, equilibrium=None, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in net.model.state_dict().items())
    assert not any(module._forward_hooks for module in net.model.modules())

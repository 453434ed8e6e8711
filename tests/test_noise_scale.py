"""The noise scale of a training run: against loops over single examples, known truths, and brute force."""

import copy
import math
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.noise.step import StepNoise
from noetherflow.watching.metric import metric_of
from noetherflow.watching.pair_average import PairAverage, _fieller

BATCH = tuple[Tensor, Tensor]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def loss(model: nn.Module, batch: BATCH) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def batches(count: int, size: int = 6, seed: int = 1) -> list[BATCH]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(size, width, generator=generator, dtype=torch.float64)

    return [(draw(4), draw(2)) for _ in range(count)]


def gradients(model: nn.Module, batch: BATCH) -> dict[str, Tensor]:
    """The gradient of every example, shape (B, ...), from a loop."""
    names = [name for name, _ in model.named_parameters()]
    rows = [
        torch.autograd.grad(loss(model, (batch[0][i : i + 1], batch[1][i : i + 1])).sum(), list(model.parameters()))
        for i in range(len(batch[0]))
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}


def pair(gradient: Tensor, metric: Tensor | float = 1.0) -> tuple[float, float]:
    """The unbiased trace and squared norm of a parameter, from the gradients of single examples."""
    count = len(gradient)
    trace = float((metric * (gradient - gradient.mean(0)).square()).sum() / (count - 1))
    return trace, float((metric * gradient.mean(0).square()).sum()) - trace / count


def train(watch: nf.NoiseScale, model: nn.Module, optimizer: Any, data: list[BATCH]) -> None:
    for batch in data:
        optimizer.zero_grad()
        with watch.step(batch):
            loss(model, batch).mean().backward()
        optimizer.step()


def weighted(pairs: list[tuple[float, float]], beta: float) -> tuple[float, float]:
    weights = [beta ** (len(pairs) - 1 - k) for k in range(len(pairs))]
    sums = [sum(w * one[side] for w, one in zip(weights, pairs, strict=True)) for side in (0, 1)]
    return sums[0] / sum(weights), sums[1] / sum(weights)


@pytest.mark.parametrize("window", [5, math.inf])
def test_parts_are_averages_of_what_single_examples_say(window: float) -> None:
    model = build()
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "name": "head"}]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=2, window=window)
    expected: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in model.named_parameters()}
    for index, batch in enumerate(batches(8)):
        if index % 2 == 0:
            for name, stack in gradients(model, batch).items():
                expected[name].append(pair(stack))
        train(watch, model, optimizer, [batch])
    beta = 1 - 2 / (window + 1)
    means = {name: weighted(pairs, beta) for name, pairs in expected.items()}

    def total(*names: str) -> tuple[float, float]:
        return sum(means[name][0] for name in names), sum(means[name][1] for name in names)

    parts = {"all": watch.estimate} | watch.groups | watch.layers
    wanted = {
        "all": total(*means),
        "group 0": total("0.weight", "0.bias"),
        "group head": total("2.weight", "2.bias"),
        "0": total("0.weight", "0.bias"),
        "2": total("2.weight", "2.bias"),
    }
    assert parts.keys() == wanted.keys()
    for name, estimate in parts.items():
        assert (estimate.trace, estimate.norm_sq) == pytest.approx(wanted[name], rel=1e-11)
        assert estimate.steps == 4
    metrics = watch.metrics()
    assert metrics["noise/scale/group head"] == parts["group head"].scale
    assert metrics["noise/scale_low/2"] == parts["2"].low
    assert "noise/scale/2" not in watch.metrics(layers=False)
    assert "all" in str(watch)
    assert "<table" in watch._repr_html_()


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_the_metric_of_a_model_in_single_precision(between: str) -> None:
    estimates = []
    for kind in (torch.float32, torch.float64):
        model = build().to(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        watch = nf.NoiseScale(model, optimizer=optimizer, every=1, between=between)
        for batch in batches(3):
            x, y = (part.to(kind) for part in batch)
            optimizer.zero_grad()
            with watch.step((x, y)) as done:
                for part in [slice(0, 6)] if between == "examples" else [slice(0, 3), slice(3, 6)]:
                    (loss(model, (x[part], y[part])).sum() / 6).backward()
                    done(size=3, weight=1 / 2)
            optimizer.step()
        assert watch.preconditioned is not None
        estimates.append(watch.preconditioned)
    assert estimates[0].trace == pytest.approx(estimates[1].trace, rel=1e-4)
    assert estimates[0].norm_sq == pytest.approx(estimates[1].norm_sq, rel=1e-3)


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_the_metric_of_the_optimizer(between: str) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1, between=between, window=math.inf)
    pairs = []
    for batch in batches(4):
        if optimizer.state:
            states = {name: optimizer.state[p] for name, p in model.named_parameters()}
            roots = {n: (s["exp_avg_sq"] / (1 - 0.999 ** float(s["step"]))).sqrt() for n, s in states.items()}
            metric = {name: torch.where(root > 0, 1 / (root + 1e-3), 0.0) for name, root in roots.items()}
            parts = [pair(stack, metric[name]) for name, stack in gradients(model, batch).items()]
            pairs.append((sum(one[0] for one in parts), sum(one[1] for one in parts)))
        if between == "examples":
            train(watch, model, optimizer, [batch])
            continue
        optimizer.zero_grad()
        with watch.step() as done:  # microbatches of a single example are examples
            for x, y in zip(*batch, strict=True):
                (loss(model, (x[None], y[None])).mean() / 6).backward()
                done(size=1, weight=1 / 6)
        optimizer.step()
    estimate = watch.preconditioned
    assert estimate is not None
    assert estimate.steps == len(pairs) == 3
    assert (estimate.trace, estimate.norm_sq) == pytest.approx(weighted(pairs, 1.0), rel=1e-10)
    assert watch.metrics()["noise/scale_preconditioned"] == estimate.scale


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_weighted_squares_of_each_parameter(between: str) -> None:
    """Of matrices and of vectors, which are squared together; a step without weights has none."""
    model, (batch,) = build(), batches(1)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = {name: 1.0 + torch.arange(shape.numel()).view(shape) % 5 for name, shape in shapes.items()}
    meter: Any = (nf.NoiseMeter if between == "examples" else nf.MicrobatchMeter)(model, {}, weighted=True)
    seen: list[StepNoise] = []
    meter.observers.append(seen.append)
    for given in (weights, None):
        if between == "examples":
            with meter.step(batch, weights=given):
                loss(model, batch).mean().backward()
            continue
        with meter.step(weights=given) as done:
            for x, y in zip(*batch, strict=True):
                (loss(model, (x[None], y[None])).mean() / 6).backward()
                done(size=1, weight=1 / 6)
    first, second = seen
    assert (first.weighted, second.weighted) == (True, False)
    assert not second.trace(weighted=True).any()
    for index, (name, stack) in enumerate(gradients(model, batch).items()):
        found = float(first.trace(weighted=True)[index]), float(first.norm_sq(weighted=True)[index])
        assert found == pytest.approx(pair(stack, weights[name]), rel=1e-10)
        assert found != pytest.approx(pair(stack), rel=1e-3)


def test_weights_that_do_not_fit_are_refused() -> None:
    """Without a place of their own, weighted sums would go to another statistic."""
    model, (batch,) = build(), batches(1)
    weights = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    wrong = {"2.bias": torch.ones(3)}
    for weighted, given in ((False, weights), (True, {"0.bias": weights["0.bias"]}), (True, weights | wrong)):
        examples, parts = (kind(model, {}, weighted=weighted) for kind in (nf.NoiseMeter, nf.MicrobatchMeter))
        for step in (examples.step(batch, weights=given), parts.step(weights=given)):
            with pytest.raises(nf.SettingsError, match="weights of squares"), step:
                loss(model, batch).mean().backward()


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"betas": (0.0, 0.9), "weight_decay": 0.0}),
    "Adam, amsgrad": (torch.optim.Adam, {"betas": (0.0, 0.9), "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.9}),
    "RMSprop, centered": (torch.optim.RMSprop, {"alpha": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_metric_is_that_of_the_steps_that_torch_takes(name: str) -> None:
    """A gradient too small to change v is multiplied by -lr P, but for what a step does to its averages."""
    kind, options = OPTIMIZERS[name]
    weights = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)]
    optimizer = kind([{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.3}], eps=1e-3, **options)
    for seed in range(3):
        for index, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(10 * seed + index)
            weight.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
    params = {"slow": weights[0], "fast": weights[1]}
    metric = metric_of(optimizer, params)
    assert metric is not None
    # v decays by beta in a step without gradient, and the correction of Adam changes with the number of steps.
    decay = {"AdamW": 0.9 * (1 - 0.9**3) / (1 - 0.9**4), "RMSprop": 0.9, "Adagrad": 1.0}.get(name)
    if decay is None:
        decay = (1 - 0.9**3) / (1 - 0.9**4)  # the largest average stays
    if name == "RMSprop, centered":
        decay = 1.0
        for group in optimizer.param_groups:
            group["alpha"] = 1.0  # two averages do not decay as a single number
    before = {key: weight.detach().clone() for key, weight in params.items()}
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-9)
    optimizer.step()
    for key, weight in params.items():
        stepped = (before[key] - weight.detach()) / 1e-9 / 0.3  # in units of the largest learning rate
        share = 1 / 3 if key == "slow" else 1.0
        root = share / metric[key] - 1e-3
        torch.testing.assert_close(stepped, share / (math.sqrt(decay) * root + 1e-3), rtol=1e-5, atol=0)


def test_a_parameter_without_a_step_does_not_count_in_the_metric() -> None:
    moved, still = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.AdamW([moved, still], lr=0.1)
    assert metric_of(optimizer, {"moved": moved, "still": still}) is None
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    metric = metric_of(optimizer, {"moved": moved, "still": still})
    assert metric is not None
    torch.testing.assert_close(metric["moved"], torch.full_like(moved, 1 / (1 + 1e-8)))
    assert not metric["still"].any()


def test_microbatches_give_the_two_batch_formula() -> None:
    """McCandlish et al. (2018), appendix A.1: from the squared norms of gradients of a small and of a large batch."""
    model = build()
    parts = batches(5, size=3)
    watch = nf.NoiseScale(model, between="microbatches", every=1)
    with watch.step() as done:
        for part in parts:
            (loss(model, part).mean() / 5).backward()
            done(size=3, weight=1 / 5)
    means = [{name: stack.mean(0) for name, stack in gradients(model, part).items()} for part in parts]
    small = sum(float(g.square().sum()) for mean in means for g in mean.values()) / 5
    big = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    norm_sq = (15 * big - 3 * small) / (15 - 3)
    trace = (small - big) / (1 / 3 - 1 / 15)
    assert watch.estimate.trace == pytest.approx(trace, rel=1e-12)
    assert watch.estimate.norm_sq == pytest.approx(norm_sq, rel=1e-12, abs=1e-12 * trace)


class Planted(nn.Module):
    """The loss w.z of an example z has the gradient z: its mean and its covariance are planted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Linear(width, 1, bias=False, dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        return self.w(z)[:, 0]


def planted(seed: int, truth: float, steps: int = 20) -> tuple[nf.ScaleEstimate, tuple[float, float]]:
    """The estimate at a known noise scale, and the interval of the plug-in estimate, which takes |g|^2 for |G|^2."""
    width, size = 100, 64
    generator = torch.Generator().manual_seed(seed)
    signal = torch.zeros(width, dtype=torch.float64)
    signal[0] = math.sqrt(width / truth)
    model = Planted(width)
    watch = nf.NoiseScale(model, every=1)
    plug_in = PairAverage(1, 100)
    for _ in range(steps):
        z = signal + torch.randn(size, width, generator=generator, dtype=torch.float64)
        model.zero_grad()
        with watch.step(z):
            model(z).mean().backward()
        trace, norm_sq = pair(z)
        plug_in.add(torch.tensor([[trace, norm_sq + trace / size]], dtype=torch.float64))
    return watch.estimate, plug_in.intervals(0.95)[0]


@pytest.mark.parametrize("truth", [1e2, 1e4, 1e6])
def test_intervals_cover_a_planted_truth(truth: float) -> None:
    runs = [planted(seed, truth) for seed in range(100)]
    estimates = [estimate for estimate, _ in runs]
    assert sum(estimate.low <= truth <= estimate.high for estimate in estimates) >= 90
    # |g|^2 is about Tr Sigma / B or above, so that a ratio with it saturates at the batch size.
    assert not any(low <= truth <= high for _, (low, high) in runs)
    if truth == 1e2:
        assert all(estimate.bounded and estimate.high < 250 for estimate in estimates)
    if truth == 1e6:
        # 5 % of the intervals may have an upper end by chance.
        assert sum(estimate.bounded for estimate in estimates) <= 10
        assert "unbounded" in str(estimates[0])


def test_the_average_of_ratios_is_another_number() -> None:
    """The twin: the mistake that most implementations make is seen at this noise."""
    ratios = []
    for seed in range(40):
        estimate, _ = planted(seed, 100.0, steps=1)
        ratios.append(estimate.trace / estimate.norm_sq)
    pooled, _ = planted(0, 100.0, steps=40)
    assert pooled.scale == pytest.approx(100, rel=0.1)
    assert sum(ratios) / 40 > 1.1 * 100 or sum(ratios) < 0


def test_averages_fade_and_their_errors_are_those_of_weighted_means() -> None:
    generator = torch.Generator().manual_seed(3)
    values = 1e6 + torch.randn(30, 2, 2, generator=generator, dtype=torch.float64)
    average = PairAverage(2, window=7)
    for value in values:
        average.add(value)
    w = 0.75 ** torch.arange(29, -1, -1, dtype=torch.float64)
    mean = torch.einsum("s,skp->kp", w, values) / w.sum()
    gap = values - mean
    scatter = torch.einsum("s,ska,skb->kab", w, gap, gap) / (w.sum() - w.square().sum() / w.sum())
    torch.testing.assert_close(average.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(average.covariance(), scatter * w.square().sum() / w.sum() ** 2, rtol=1e-9, atol=1e-12)
    assert average.steps_worth == pytest.approx(7, rel=1e-3)


@pytest.mark.parametrize(
    ("a", "b", "spread"),
    [
        (10.0, 2.0, [[0.5, 0.1], [0.1, 0.2]]),
        (10.0, 0.1, [[0.5, -0.1], [-0.1, 0.2]]),
        (10.0, -0.2, [[0.5, 0.2], [0.2, 0.3]]),
        (1.0, 0.1, [[2.0, 0.1], [0.1, 0.2]]),
        (3.0, 1.0, [[0.0, 0.0], [0.0, 0.04]]),
        (1.0, 2.0, [[4.0, 0.1], [0.1, 0.2]]),
    ],
)
def test_the_interval_is_all_ratios_that_are_not_refuted(a: float, b: float, spread: list[list[float]]) -> None:
    low, high = _fieller(a, b, spread)
    ratios = torch.logspace(-4, 6, 400_001, dtype=torch.float64)
    refuted = (a - ratios * b).square() > spread[0][0] - 2 * ratios * spread[0][1] + ratios**2 * spread[1][1]
    kept = ratios[~refuted]
    assert low == pytest.approx(float(kept.min()), rel=1e-3, abs=2e-4)
    assert high == (pytest.approx(float(kept.max()), rel=1e-3) if kept.max() < 9e5 else math.inf)


def test_two_steps_have_the_interval_of_student() -> None:
    average = PairAverage(1, math.inf)
    for value in ([4.0, 1.0], [6.0, 1.0]):
        average.add(torch.tensor([value], dtype=torch.float64))
    ((low, high),) = average.intervals(0.9)
    half = student.ppf(0.95, 1) * 1.0  # the standard error of 4 and 6
    assert (low, high) == pytest.approx((max(0.0, 5 - half), 5 + half))
    assert PairAverage(1, 5).intervals(0.9) == [(0.0, math.inf)]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_happened(kind: Any) -> None:
    data = batches(12)
    model = build()
    optimizer = kind(model.parameters(), lr=1e-2)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=3)
    train(watch, model, optimizer, data[:7])
    saved = copy.deepcopy((watch.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(watch, model, optimizer, data[7:])
    other = build()
    again = kind(other.parameters(), lr=1e-2)
    resumed = nf.NoiseScale(other, optimizer=again, every=3)
    for target, state in zip((resumed, other, again), saved, strict=True):
        target.load_state_dict(state)
    train(resumed, other, again, data[7:])
    assert resumed.metrics() == watch.metrics()
    assert resumed.steps == watch.steps == 12
    with pytest.raises(nf.SettingsError, match=r"parts of a model"):
        nf.NoiseScale(nn.Linear(2, 2)).load_state_dict(saved[0])


def test_the_factor_of_a_gradient_scaler_is_taken_out() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    model, (batch,) = build(), batches(1)
    plain, scaled, blind = (
        nf.NoiseScale(model, every=1, scaler=one)
        for one in (None, Scaler(), None)  # type: ignore[arg-type]
    )
    for watch, factor in ((plain, 1.0), (scaled, 1024.0), (blind, 1024.0)):
        with watch.step(batch):
            (factor * loss(model, batch).mean()).backward()
    assert scaled.estimate.trace == pytest.approx(plain.estimate.trace, rel=1e-12)
    assert blind.estimate.trace == pytest.approx(1024.0**2 * plain.estimate.trace, rel=1e-12)
    between = nf.NoiseScale(model, every=1, between="microbatches", scaler=Scaler())  # type: ignore[arg-type]
    with between.step() as done:
        for part in batches(2):
            (1024.0 * loss(model, part).mean() / 2).backward()
            done(size=6, weight=1 / 2)
    assert between.estimate.trace < 10 * plain.estimate.trace


def test_an_overflow_is_skipped_and_counted() -> None:
    model, (first, second) = build(), batches(2)
    watch = nf.NoiseScale(model, every=1)
    for batch, factor in ((first, 1.0), (second, math.inf)):
        with watch.step(batch):
            (factor * loss(model, batch).mean()).backward()
    assert (watch.skipped, watch.estimate.steps) == (1, 1)
    assert "left out" in str(watch)


def test_steps_that_are_not_due_are_left_alone() -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = nf.NoiseScale(model, every=3)
    for index, batch in enumerate(batches(7)):
        with watch.step(batch) as done:
            modes = len(torch.overrides._get_current_function_mode_stack())
            loss(model, batch).mean().backward()
            assert modes == (index % 3 == 0)
            done(size=3)  # of no consequence between examples
        optimizer.step()
    assert watch.estimate.steps == 3


def test_what_symmetries_add() -> None:
    model, (batch,) = build(), batches(1)
    symmetries = nf.find_symmetries(model, loss, batch)
    watch = nf.NoiseScale(model, symmetries, every=1)
    with watch.step(batch):
        loss(model, batch).mean().backward()
    (name,) = symmetries
    charge = symmetries[name].charge({key: value.detach() for key, value in model.named_parameters()})
    torch.testing.assert_close(watch.charges[name], charge)
    assert watch.metrics()[f"charge/{name}"] == pytest.approx(float(charge.sum()), rel=1e-12)
    meter = nf.NoiseMeter(model, symmetries)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    torch.testing.assert_close(watch.noise.grams, meter.noise.grams)


def test_frozen_and_unmeasured_parameters_are_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 3, batch_first=True).double()
            self.head = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x[:, None].expand(-1, 2, -1))[0][:, -1])

    torch.manual_seed(0)
    model, (batch,) = Model(), batches(1)
    model.head.bias.requires_grad_(False)
    watch = nf.NoiseScale(model, every=1)
    with watch.step(batch):
        loss(model, batch).mean().backward()
    assert watch.unmeasured.keys() == {name for name, _ in model.named_parameters() if name.startswith("cell")}
    assert watch.estimate.trace == watch.layers["head"].trace > 0
    assert watch.layers.keys() == {"head"}
    assert not [name for name in watch.metrics() if name.endswith("/cell")]
    assert "Not measured" in str(watch)


def test_what_follows_from_the_noise_scale() -> None:
    estimate = nf.ScaleEstimate(trace=600.0, norm_sq=2.0, low=250.0, high=380.0, steps=40)
    assert estimate.critical_batch_size == 300
    for size in (1.0, 300.0, 1e9):
        steps = [1 + 300 / size, 1 + 300 / (2 * size)]
        assert estimate.saved_by_doubling(size) == pytest.approx(1 - steps[1] / steps[0])
    hidden = nf.ScaleEstimate(trace=600.0, norm_sq=-2.0, low=250.0, high=math.inf, steps=40)
    assert (hidden.scale, hidden.saved_by_doubling(64), hidden.bounded) == (math.inf, 0.5, False)


def test_what_cannot_be_measured_is_a_sentence() -> None:
    model, (batch,) = build(), batches(1)
    with pytest.raises(nf.EmptyDataError, match=r"no step was measured yet: 0 steps"):
        nf.NoiseScale(model).estimate  # noqa: B018
    assert nf.NoiseScale(model).metrics() == {}
    watch = nf.NoiseScale(model, between="microbatches", every=1)
    with pytest.raises(nf.SettingsError, match=r"there were 1.*accumulation.*group"), watch.step() as done:  # noqa: PT012
        loss(model, batch).mean().backward()
        done(size=6)
    single = nf.NoiseScale(model, every=1)
    one = (batch[0][:1], batch[1][:1])
    with single.step(one):
        loss(model, one).mean().backward()
    with pytest.raises(nf.EmptyDataError, match="single example"):
        single.estimate  # noqa: B018
    with pytest.raises(nf.SettingsError, match="needs the batch"), nf.NoiseScale(model).step():
        pass
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    with pytest.raises(nf.CoupledExamplesError) as raised, nf.NoiseScale(normed).step(batch):
        loss(normed, batch).mean().backward()
    assert "microbatches" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, "every must be"),
        ({"between": "batches"}, "between must be"),
        ({"window": 1}, "window must be"),
        ({"confidence": 95}, "confidence must be"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}, "holds none of the model's"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(nf.SettingsError, match=sentence):
        nf.NoiseScale(build(), **settings)


def test_a_sum_that_is_taken_for_a_mean_is_noticed() -> None:
    model, (batch,) = build(), batches(1)

    def of_torch() -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum")

    def of_two() -> Tensor:
        return loss(model, batch).sum() + model(batch[0]).abs().sum()

    for total in (of_torch, of_two):
        meter = nf.NoiseMeter(model, {})
        with (
            pytest.raises(nf.SettingsError, match=r"adds up the losses of the 6 examples.*weight=1"),
            meter.step(batch),
        ):
            total().backward()
        with meter.step(batch, weight=1.0):
            total().backward()
        trace = float(meter.noise.trace)
        for scaled in (lambda: total() / 6, lambda: 1 / 6 * total()):  # noqa: B023
            mean = nf.NoiseMeter(model, {})
            with mean.step(batch):
                scaled().backward()
            assert float(mean.noise.trace) == pytest.approx(trace, rel=1e-12)


def test_a_meter_takes_a_batch_for_a_sample_and_estimate_noise_for_all_examples() -> None:
    model, (batch,) = build(), batches(1)
    watch = nf.NoiseScale(model, every=1)
    with watch.step(batch):
        loss(model, batch).mean().backward()
    population = float(nf.estimate_noise(model, loss, [batch], {}).trace)
    assert watch.estimate.trace == pytest.approx(6 / 5 * population, rel=1e-12)

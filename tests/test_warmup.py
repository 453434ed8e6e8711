"""Whether a warmup is needed, and the schedule: motion at a part of the learning rate against integration in steps."""

import math

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import squared_error
from noetherflow.forecasting.estimate import NEVER_UNSTABLE, Estimate, unknown
from noetherflow.forecasting.motion import Motion, motion_of
from noetherflow.forecasting.path import Path, path_of
from noetherflow.forecasting.schedule import Need, Warmup, Way, warmup_of
from test_forecast_time import DECAY, LR, PAIR, SIZE, Product, coordinate_in_time, product_data

# The share of the largest stable step that a schedule takes.
SAFE = 0.5


@pytest.mark.parametrize("share", [0.03, 0.3, 1.0])
@pytest.mark.parametrize(("u", "w"), [(2.0, 0.4), (0.3, 3.0)])
def test_motion_at_a_part_of_the_learning_rate(u: float, w: float, share: float) -> None:
    model, settings = Product(u, w), nf.SGD(LR, SIZE, DECAY)
    noise = nf.estimate_noise(model, squared_error, product_data(), PAIR)
    equilibrium = nf.solve_equilibrium(noise, settings, model)
    motion = motion_of(path_of(equilibrium, settings, {}), equilibrium, settings)
    for distance in (0.05, 0.3):
        walk = motion.walk(motion.start, share, distance)
        assert walk is not None
        (expected,) = coordinate_in_time(model, nf.SGD(share * LR, SIZE, DECAY), [walk.steps])
        assert float(motion.coordinates(walk.left)["pair"]) == pytest.approx(expected, rel=1e-5)
        assert abs(expected) == pytest.approx(distance, rel=1e-5)
    # A twin: with weight decay as fast as noise, the coordinate would be elsewhere.
    slow = Motion(motion.path, {"pair": 0.0}).walk(motion.start, share, 0.3)
    assert slow is not None
    assert share == 1 or slow.steps != pytest.approx(walk.steps, rel=0.02)


def test_a_walk_ends_at_the_point_of_rest() -> None:
    model, settings = Product(2.0, 0.4), nf.SGD(LR, SIZE, DECAY)
    noise = nf.estimate_noise(model, squared_error, product_data(), PAIR)
    equilibrium = nf.solve_equilibrium(noise, settings, model)
    motion = motion_of(path_of(equilibrium, settings, {}), equilibrium, settings)
    left = motion.start
    for _ in range(6):
        walk = motion.walk(left, 0.1, 9.0)
        if walk is None:
            break
        left = walk.left
    assert walk is None
    other = nf.solve_equilibrium(noise, nf.SGD(0.1 * LR, SIZE, DECAY), model).coordinates["pair"]
    assert float(motion.coordinates(left)["pair"]) == pytest.approx(float(other), abs=0.03)
    assert float(motion.coordinates(left)["pair"]) != pytest.approx(float(equilibrium.coordinates["pair"]), abs=0.03)


LIMIT, NOISE = 0.4, 0.2


def scale_invariant(lr: float, weight_decay: float, square: float) -> tuple[Way, float]:
    """The way of a scale-invariant weight from a squared norm, and the largest stable step at the equilibrium.

    The largest stable step is LIMIT |theta|^2; a step has the mean square lr^2 NOISE / |theta|^2.
    """
    goal = (lr * NOISE / (2 * weight_decay)) ** 0.5
    end = torch.tensor([math.log(goal / square) / 2], dtype=torch.float64)
    time, lean = (torch.tensor([value], dtype=torch.float64) for value in (1 / (4 * lr * weight_decay), -1))
    path = Path({"w": end}, {}, {"w": time}, {"w": lean}, 2, {}, ())

    def stable(coordinates: dict[str, torch.Tensor]) -> Estimate:
        return Estimate(LIMIT * square * math.exp(2 * float(coordinates["w"])), 0.0)

    return Way(Motion(path, {"w": 2 * lr * weight_decay}), stable), LIMIT * goal


def largest_share(schedule: Warmup, lr: float, weight_decay: float, square: float) -> float:
    """The largest share of the stable step that a schedule takes, step by step as a scale-invariant weight grows."""
    share = 0.0
    for step in range(schedule.steps + 1):
        rate = schedule.lr_at(step)
        share = max(share, rate / (LIMIT * square))
        square = (1 - rate * weight_decay) ** 2 * square + rate**2 * NOISE / square
    return share


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.1, 1e-4), (0.1, 1e-3), (1.0, 1e-4)])
def test_a_scale_invariant_weight_grows_as_the_schedule_says(lr: float, weight_decay: float) -> None:
    square = 0.01
    way, then = scale_invariant(lr, weight_decay, square)
    warmup = warmup_of(lr, Estimate(LIMIT * square, 0.0), Estimate(then, 0.0), way)
    assert warmup.need is Need.WARMUP
    assert (warmup.lr_at(0), warmup.lr_at(warmup.steps)) == (pytest.approx(SAFE * LIMIT * square), lr)
    assert warmup.lr_at(2 * warmup.steps) == lr
    assert largest_share(warmup, lr, weight_decay, square) < max(1.25 * SAFE, 1.15 * lr / then)
    # Twin: a quarter of the time does not suffice.
    fast = warmup._replace(schedule=tuple((step // 4, rate) for step, rate in warmup.schedule))
    assert largest_share(fast, lr, weight_decay, square) > 0.95


def test_a_warmup_without_decay_is_exponential() -> None:
    lr, square = 0.1, 0.01
    way, then = scale_invariant(lr, 1e-18, square)
    warmup = warmup_of(lr, Estimate(LIMIT * square, 0.0), Estimate(then, 0.0), way)
    rate = (SAFE * LIMIT) ** 2 * NOISE  # d|theta|^4 = 2 r^2 NOISE with r = SAFE LIMIT |theta|^2
    expected = math.log(lr / (SAFE * LIMIT * square)) / rate
    # The last point of a schedule lies up to a quarter of a stride of 0.75 late, in ln |theta|.
    assert expected < warmup.steps < 1.03 * expected + 2 * 0.75 / 4 / rate


def test_without_a_warmup_a_norm_jumps_and_comes_back() -> None:
    lr, weight_decay, small = 0.2, 1e-3, 1e-3
    goal = (lr * NOISE / (2 * weight_decay)) ** 0.25
    square = small**2 + lr**2 * NOISE / small**2
    jump = square**0.5
    assert jump == pytest.approx((2 * lr * weight_decay) ** 0.5 * goal**2 / small, rel=1e-3)
    steps = 0
    while square > (1.05 * goal) ** 2:
        square = (1 - lr * weight_decay) ** 2 * square + lr**2 * NOISE / square
        steps += 1
    assert steps == pytest.approx(math.log(jump / goal) / (lr * weight_decay), rel=0.25)


@pytest.mark.parametrize(
    ("lr", "now", "then", "doubt", "need"),
    [
        (0.1, Estimate(1.0, 0.1), Estimate(2.0, 0.1), "", Need.NONE),
        (0.1, Estimate(0.02, 0.001), Estimate(0.5, 0.01), "", Need.WARMUP),
        (0.1, Estimate(0.02, 0.001), Estimate(0.05, 0.001), "", Need.TOO_LARGE),
        (0.1, Estimate(0.5, 0.01), Estimate(0.02, 0.001), "", Need.SHARPENS),
        (0.1, Estimate(0.11, 0.01), Estimate(0.5, 0.01), "", Need.UNKNOWN),
        (0.1, unknown("no second derivative"), Estimate(0.5, 0.01), "", Need.UNKNOWN),
        (0.1, unknown(NEVER_UNSTABLE), Estimate(0.5, 0.01), "", Need.NONE),
        # What learning changes later does not change what is stable now.
        (0.1, Estimate(1.0, 0.1), Estimate(2.0, 0.1), "the loss falls", Need.NONE_NOW),
        (0.1, Estimate(0.5, 0.01), Estimate(0.02, 0.001), "the loss falls", Need.NONE_NOW),
        (0.1, Estimate(0.02, 0.001), Estimate(0.5, 0.01), "the loss falls", Need.BEGIN),
        (0.1, Estimate(0.02, 0.001), Estimate(0.05, 0.001), "the loss falls", Need.BEGIN),
        (0.1, Estimate(0.02, 0.001), unknown("no end"), "", Need.BEGIN),
        (0.1, Estimate(0.02, 0.001), Estimate(0.1, 0.01), "", Need.BEGIN),
        (0.1, Estimate(1.0, 0.1), Estimate(0.1, 0.01), "", Need.NONE_NOW),
    ],
)
def test_the_verdict_on_a_learning_rate(lr: float, now: Estimate, then: Estimate, doubt: str, need: Need) -> None:
    way, _ = scale_invariant(lr, 1e-4, 0.02 / LIMIT)
    warmup = warmup_of(lr, now, then, way, doubt)
    assert warmup.need is need
    assert bool(warmup.schedule) == (need in (Need.WARMUP, Need.BEGIN))
    assert need.value in str(warmup)
    assert doubt in warmup.why


@pytest.mark.parametrize(("then", "end"), [(Estimate(0.05, 0.001), 0.025), (unknown("no end"), 0.01)])
def test_a_first_part_ends_at_a_safe_learning_rate(then: Estimate, end: float) -> None:
    way, _ = scale_invariant(0.1, 1e-4, 0.02 / LIMIT)
    warmup = warmup_of(0.1, Estimate(0.02, 0.001), then, way, "the loss falls")
    assert warmup.schedule[0] == (0, pytest.approx(0.01))
    assert warmup.lr_at(warmup.steps) == pytest.approx(end)
    # A forecast whose way is unknown has a constant learning rate.
    assert warmup_of(0.1, Estimate(0.02, 0.001), then, None, "the loss falls").schedule == ((0, 0.01),)


def test_without_a_way_in_time_a_warmup_has_no_length() -> None:
    warmup = warmup_of(0.1, Estimate(0.02, 0.001), Estimate(0.5, 0.01), None)
    assert (warmup.need, warmup.schedule, warmup.steps) == (Need.WARMUP, (), 0)
    assert "length cannot be told" in str(warmup)
    assert math.isnan(warmup.lr_at(3))


def test_the_first_coordinate_that_gets_there_ends_a_walk() -> None:
    ends, times, lean = (torch.tensor(pair, dtype=torch.float64) for pair in ((2.0, -1.0), (900.0, 50.0), (0.3, -0.2)))
    motion = Motion(Path({"two": ends}, {}, {"two": times}, {"two": lean}, 2, {}, ()), {"two": 0.0})
    walk = motion.walk(motion.start, 0.5, 0.4)
    assert walk is not None
    moved = motion.coordinates(walk.left)["two"]
    assert moved.tolist() == pytest.approx(motion.path.at(0.25 * walk.steps)["two"].tolist(), rel=1e-6)
    assert float(moved.abs().max()) == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize(("learnt", "need"), [(False, Need.NONE_NOW), (True, Need.NONE)])
def test_a_model_that_learns_is_stable_now(learnt: bool, need: Need) -> None:
    model, data = Product(0.5, 0.5), product_data()
    pattern = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    data = [(x, (x @ torch.tensor([[1.0], [0.4]]).double()) * pattern + 0.3 * y) for x, y in data]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3000 if learnt else 0):
        optimizer.zero_grad()
        sum(squared_error(model, batch).mean() for batch in data).backward()
        optimizer.step()
    forecast = nf.forecast(model, squared_error, data, nf.SGD(1e-3, 5), PAIR, progress=False)
    assert forecast.warmup.need is need
    assert ("still falls" in forecast.warmup.why) != learnt


def test_the_learning_rate_between_points() -> None:
    warmup = Warmup(Need.WARMUP, ((0, 1.0), (10, 2.0), (20, 6.0)), "")
    assert [warmup.lr_at(step) for step in (0, 5, 10, 15, 20, 99)] == [1.0, 1.5, 2.0, 4.0, 6.0, 6.0]


class Wide(nn.Module):
    """A weight in front of a normalisation of many entries, which no example makes nearly constant."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.05 * torch.randn(32, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x @ self.w.T, (32,), eps=0.0)


def test_without_weight_decay_the_end_of_a_growing_norm_cannot_be_told() -> None:
    torch.manual_seed(0)
    model, symmetries = Wide(), {"w": nf.ScalarSymmetry([nf.Axis("w", 0)], [])}
    x, y = torch.randn(800, 5).double(), torch.randn(800, 32).double()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    free, held = (
        nf.forecast(model, squared_error, batches, nf.SGD(0.5, 5, decay), symmetries, progress=False).warmup
        for decay in (0.0, 1e-3)
    )
    assert free.need is Need.BEGIN
    assert "grows for ever" in free.why
    assert held.need is Need.WARMUP
    assert held.lr_at(held.steps) == 0.5

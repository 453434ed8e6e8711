"""Simulations against torch.optim.SGD step by step, against scipy, and against moments in closed form."""

import copy
from typing import Any

import pytest
import scipy.integrate
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, mlp, squared_error


def tape(one: Case) -> Any:
    """A sampler that hands out a case's examples one after the other, over and over."""
    x, y = one.batch
    position = 0

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal position
        index = (position + torch.arange(count)) % len(x)
        position += count
        return x[index], y[index]

    return sample


def train(one: Case, sgd: nf.SGD, steps: int, factor: Any = lambda step: 1.0) -> tuple[list[float], nn.Module]:
    """The same steps by a plain loop around `torch.optim.SGD`."""
    model, sample = copy.deepcopy(one.model), tape(one)
    optimizer = torch.optim.SGD(checks.groups_of(model, sgd.weight_decay), sgd.lr, sgd.momentum)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = sgd.lr * factor(step)
        optimizer.zero_grad()
        loss = one.loss(model, sample(sgd.batch_size, torch.Generator())).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses, model


@pytest.mark.parametrize("by_parameter", [False, True])
@pytest.mark.parametrize("one", cases(), ids=str)
def test_sgd_is_that_of_torch(one: Case, by_parameter: bool) -> None:
    decays = {name: 30 * decay for name, decay in one.decays.items()}
    sgd = nf.SGD(0.002, 3, weight_decay=decays if by_parameter else 1.0)
    losses, model = train(one, sgd, 25)
    trajectory = nf.simulate(one.model, one.loss, tape(one), sgd, steps=25, symmetries=one.symmetries)
    torch.testing.assert_close(
        trajectory.loss[:-1, 0], torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trajectory.params[name][0], parameter.detach(), rtol=1e-9, atol=1e-12)
    final = checks.charges(one, model)
    for name, charge in trajectory.charges.items():
        torch.testing.assert_close(charge[-1, 0], final[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_and_schedules_are_those_of_torch(momentum: float) -> None:
    one, sgd = case("diagonal, coupled layers"), nf.SGD(0.05, 2, 0.05, momentum)
    warmup = [min(1.0, (step + 1) / 10) for step in range(20)]
    _, model = train(one, sgd, 20, lambda step: warmup[step])
    trajectory = nf.simulate(one.model, one.loss, tape(one), sgd, steps=20, schedule=lambda step: warmup[step])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trajectory.params[name][0], parameter.detach(), rtol=1e-9, atol=1e-12)


def test_gradient_descent_is_that_of_torch_on_the_whole_data_set() -> None:
    one = case("diagonal, coupled layers")
    _, model = train(one, nf.SGD(0.1, len(one.batch[0]), 0.02, 0.5), 30)
    trajectory = nf.simulate(one.model, one.loss, one.batch, nf.GradientDescent(0.1, 0.02, 0.5), steps=30)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trajectory.params[name][0], parameter.detach(), rtol=1e-9, atol=1e-12)


def test_gradient_flow_is_what_scipy_integrates() -> None:
    one, decay = case("matrix"), 0.1
    model = copy.deepcopy(one.model)
    parameters = list(model.parameters())

    def slope(time: float, theta: Any) -> Any:
        nn.utils.vector_to_parameters(torch.from_numpy(theta), parameters)
        gradients = torch.autograd.grad(one.loss(model, one.batch).mean(), parameters)
        return -(torch.cat([g.reshape(-1) for g in gradients]) + decay * torch.from_numpy(theta)).numpy()

    start = oracles.flat(one.params).numpy()
    exact = scipy.integrate.solve_ivp(slope, (0, 2), start, rtol=1e-11, atol=1e-12).y[:, -1]
    found = nf.simulate(one.model, one.loss, one.batch, nf.GradientFlow(dt=0.01, weight_decay=decay), steps=200)
    moved = oracles.flat({name: found.params[name][0] for name in one.params})
    torch.testing.assert_close(moved, torch.from_numpy(exact), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_gradient_flow_conserves_every_charge_and_descent_does_not(one: Case) -> None:
    flow = nf.simulate(one.model, one.loss, one.batch, nf.GradientFlow(dt=2e-4), steps=100, symmetries=one.symmetries)
    descent = nf.simulate(
        one.model, one.loss, one.batch, nf.GradientDescent(lr=2e-4), steps=100, symmetries=one.symmetries
    )
    for name in one.symmetries:
        kept, moved = ((run.charges[name][-1] - run.charges[name][0]).abs().max() for run in (flow, descent))
        # A step of Runge-Kutta across the kink of a ReLU conserves less than a smooth one.
        smooth = one.name in ("scalar, plus only", "matrix")
        assert kept < (1e-11 if smooth else 1e-6) * flow.charges[name].abs().max()
        assert moved > 10 * kept


def test_langevin_steps_decay_each_parameter_by_its_weight_decay() -> None:
    one = case("diagonal")
    cold = nf.Langevin(nf.SGD(0.1, 10**20, one.decays))
    found = nf.simulate(one.model, one.loss, one.batch, cold, steps=1).params
    one.loss(one.model, one.batch).mean().backward()
    for name, parameter in one.model.named_parameters():
        slope = parameter.grad + one.decays[name] * parameter.detach()
        torch.testing.assert_close(found[name][0], parameter.detach() - 0.1 * slope, rtol=1e-9, atol=1e-10)


def test_langevin_steps_have_the_mean_and_covariance_of_the_diffusion() -> None:
    one = case("scalar, two sides")
    sgd, dt, replicas = nf.SGD(0.2, 3, 0.1), 0.05, 40_000
    found = nf.simulate(one.model, one.loss, one.batch, nf.Langevin(sgd, dt=dt), steps=1, replicas=replicas, record=1)
    moves = torch.cat([found.params[name].flatten(1) - one.params[name].reshape(1, -1) for name in one.params], 1)
    mean, sigma = oracles.covariance(one.model, one.loss, one.batch)
    expected = -dt * (mean + 0.1 * oracles.flat(one.params))
    covariance = dt * (0.2 / 3) * sigma
    spread = (covariance.diagonal() / replicas).sqrt()
    assert ((moves.mean(0) - expected).abs() <= 5 * spread + 1e-12).all()
    measured = torch.cov(moves.mT)
    assert torch.linalg.norm(measured - covariance) < 0.03 * torch.linalg.norm(covariance)


@pytest.mark.parametrize(
    ("name", "weight_decay"),
    [
        ("diagonal", 0.02),
        ("diagonal, coupled layers", 0.01),
        ("scalar and diagonal on shared tensors", 0.01),
        ("matrix", 0.0),
        ("matrix", 0.02),
        ("dense, eigenvalues 1 and -2", 0.02),
        ("a tied weight in both roles", 0.02),
        ("scalar, plus only", 0.05),
        ("matrix", "by parameter"),
        ("diagonal, coupled layers", "by parameter"),
        ("dense, eigenvalues 1 and -2", "by parameter"),
    ],
)
def test_the_noether_flow_ends_at_the_equilibrium(name: str, weight_decay: float | str) -> None:
    """Two independent roads to the same point: integrating the drift, and solving for its zero."""
    one = case(name)
    # Without a zero among them, which makes the slowest coordinate a million times slower than the fastest.
    decays = {key: 0.01 + decay / 2 for key, decay in one.decays.items()}
    sgd = nf.SGD(0.1, 5, decays if isinstance(weight_decay, str) else weight_decay)
    noise = checks.noise_of(one)
    equilibrium = nf.solve_equilibrium(noise, sgd, one.model)
    slowest = max(times.max().item() for times in equilibrium.relaxation_steps.values())
    fastest = min(times.min().item() for times in equilibrium.relaxation_steps.values())
    dt = min(0.1 * slowest, fastest / 3)
    flow = nf.NoetherFlow(sgd, dt=dt * sgd.lr)
    steps = int(20 * slowest / dt)
    found = nf.simulate(one.model, one.loss, one.batch, flow, steps=steps, symmetries=one.symmetries).params
    found = {key: stack[0] for key, stack in found.items()}
    expected = dict(equilibrium.params)
    if name == "matrix":
        # Reached up to a rotation of the hidden units, which this product does not see.
        found, expected = ({"W'W": v["0.weight"].mT @ v["0.weight"]} for v in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    flow = nf.simulate(one.model, one.loss, one.batch, flow, steps=3, symmetries=one.symmetries)
    torch.testing.assert_close(flow.loss[-1], one.loss(one.model, one.batch).mean().detach().reshape(1))


def test_the_noether_flow_starts_at_the_drift() -> None:
    one, sgd = case("diagonal, coupled layers"), nf.SGD(0.1, 5, 0.01)
    rates = nf.drift(checks.noise_of(one), sgd, one.model)
    dt = 1e-5
    flow = nf.simulate(one.model, one.loss, one.batch, nf.NoetherFlow(sgd, dt=dt), steps=1, symmetries=one.symmetries)
    for name, rate in rates.items():
        torch.testing.assert_close(
            (flow.charges[name][1, 0] - flow.charges[name][0, 0]) / dt, rate, rtol=1e-3, atol=1e-9
        )


def test_sgd_moves_the_mean_charge_as_predicted() -> None:
    """From one point, many replicas of a step on a finite data set: the mean is that of `expected_step`."""
    one, sgd = case("diagonal"), nf.SGD(0.1, 4, 0.05)
    step = nf.expected_step(checks.noise_of(one), sgd, one.model)["hidden"]
    found = nf.simulate(
        one.model, one.loss, one.batch, sgd, steps=1, replicas=20_000, symmetries=one.symmetries, record=1
    ).charges["hidden"]
    moves = found[1] - found[0]
    error = moves.std(0) / len(moves) ** 0.5
    assert ((moves.mean(0) - step).abs() < 4.5 * error).all()


def test_epochs_without_replacement_see_every_example_once() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(12).double())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return -model.seen[batch]

    data = torch.arange(12)
    one_epoch = nf.simulate(
        Counter(), loss, data, nf.SGD(1.0, 3, replacement=False, dataset_size=12), steps=4, replicas=5, record=1
    )
    torch.testing.assert_close(one_epoch.params["seen"], torch.full((5, 12), 1 / 3).double())
    independent = nf.simulate(Counter(), loss, data, nf.SGD(1.0, 3), steps=4, replicas=5)
    assert not torch.allclose(independent.params["seen"], torch.full((5, 12), 1 / 3).double())
    two = nf.simulate(
        Counter(), loss, data, nf.SGD(1.0, 5, replacement=False, dataset_size=12), steps=2, replicas=3, record=1
    )
    # Two batches of five, then the incomplete rest is dropped: ten examples, each once.
    assert (two.params["seen"] > 0).sum(1).tolist() == [10, 10, 10]


def test_replicas_draw_their_own_examples_from_one_seed() -> None:
    one = case("diagonal")

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return nf.simulate(
            one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=20, replicas=3, generator=generator
        ).loss

    losses = run(0)
    assert torch.equal(losses, run(0))
    assert not torch.equal(losses, run(1))
    assert not torch.equal(losses[:, 0], losses[:, 1])


def test_one_replica_of_many_is_that_replica_alone() -> None:
    """Replicas do not feel each other: with the same examples, one of three equals the one."""
    one = case("diagonal, coupled layers")
    generator = torch.Generator().manual_seed(5)
    start = {n: torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for n, t in one.params.items()}
    together = nf.simulate(one.model, one.loss, one.batch, nf.GradientDescent(0.05), steps=20, start=start)
    for k in range(3):
        own = {name: stack[k : k + 1] for name, stack in start.items()}
        alone = nf.simulate(one.model, one.loss, one.batch, nf.GradientDescent(0.05), steps=20, start=own)
        torch.testing.assert_close(together.loss[:, k], alone.loss[:, 0])


def test_a_replica_that_diverges_disturbs_no_other() -> None:
    one = case("matrix")
    start = {name: torch.stack([tensor, 1e3 * tensor]) for name, tensor in one.params.items()}
    found = nf.simulate(one.model, one.loss, one.batch, nf.GradientDescent(0.02), steps=60, start=start)
    assert found.diverged.tolist() == [False, True]
    alone = nf.simulate(one.model, one.loss, one.batch, nf.GradientDescent(0.02), steps=60)
    torch.testing.assert_close(found.loss[:, 0], alone.loss[:, 0])


def test_records_are_taken_when_asked() -> None:
    one = case("diagonal")
    run = {"model": one.model, "loss": one.loss, "data": one.batch, "symmetries": one.symmetries}
    assert nf.simulate(dynamics=nf.SGD(0.1, 2), steps=7, record=3, **run).steps.tolist() == [0, 3, 6, 7]
    assert nf.simulate(dynamics=nf.SGD(0.1, 2), steps=7, record=[2, 5], **run).steps.tolist() == [0, 2, 5, 7]
    assert len(nf.simulate(dynamics=nf.SGD(0.1, 2), steps=1000, **run).steps) == 201


def test_observables_that_cannot_be_vectorised_are_evaluated_one_by_one() -> None:
    one = case("diagonal")
    found = nf.simulate(
        one.model,
        one.loss,
        one.batch,
        nf.SGD(0.1, 2),
        steps=3,
        replicas=4,
        observables={
            "norm": lambda params: params["0.weight"].norm(),
            "branch": lambda params: torch.tensor(1.0 if params["0.weight"].norm().item() > 1e9 else 0.0),
        },
    ).observables
    assert found["norm"].shape == (4, 4)
    assert found["branch"].tolist() == [[0.0] * 4] * 4


def test_frozen_parameters_stay() -> None:
    one = case("diagonal")
    one.model[2].bias.requires_grad_(False)
    found = nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=5, replicas=2)
    assert "2.bias" not in found.params
    start = {"2.bias": torch.zeros(2, 3).double()}
    with pytest.raises(nf.FrozenParameterError, match=r"2\.bias"):
        nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=5, start=start)


def test_a_model_with_a_branch_on_values_is_simulated_all_the_same() -> None:
    """What cannot be recorded as a graph is called at every step."""
    one = case("diagonal")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        values = squared_error(model, batch)
        return torch.where(values > 1, 2 * values - 1, values)

    found = nf.simulate(one.model, loss, tape(one), nf.SGD(0.05, 2), steps=20)
    changed = Case(one.name, one.model, loss, one.batch, one.symmetries)
    _, model = train(changed, nf.SGD(0.05, 2), 20)
    torch.testing.assert_close(found.params["0.weight"][0], model[0].weight.detach())


def test_dropout_is_drawn_anew_at_every_step_and_for_every_replica() -> None:
    """A recorded step must not replay the first step's dropout."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(200, 1, bias=False)).double()
    nn.init.zeros_(net[1].weight)
    found = nf.simulate(
        net,
        lambda model, x: model(x).squeeze(1),
        torch.ones(1, 200).double(),
        nf.SGD(1.0, 1),
        steps=2,
        replicas=2,
        observables={"weight": lambda params: params["1.weight"][0]},
        record=1,
    ).observables["weight"]
    first, second = found[1] - found[0], found[2] - found[1]
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert set(first.unique().tolist()) == {-2.0, 0.0}


def test_float32_is_float32() -> None:
    one = case("diagonal")
    found = nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=5, dtype=torch.float32)
    assert found.loss.dtype == found.params["0.weight"].dtype == torch.float32


def test_the_model_is_left_alone() -> None:
    one = case("diagonal")
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    state = torch.get_rng_state()
    nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in one.model.parameters())


def sampler(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.zeros(count, 4).double(), torch.zeros(count, 3).double()


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dynamics": "sgd"}, nf.SettingsError, "GradientDescent"),
    ({"steps": 0}, nf.SettingsError, "steps"),
    ({"replicas": 0}, nf.SettingsError, "replicas"),
    ({"record": 0}, nf.SettingsError, "record"),
    ({"record": [99]}, nf.SettingsError, "outside"),
    ({"dynamics": nf.GradientDescent(0.1), "data": sampler}, nf.SettingsError, "finite data set"),
    ({"dynamics": nf.GradientFlow(0.1), "schedule": lambda s: 1.0}, nf.SettingsError, "schedule"),
    ({"dynamics": nf.SGD(0.1, 2, replacement=False, dataset_size=9), "data": sampler}, nf.SettingsError, "finite"),
    ({"dynamics": nf.SGD(0.1, 50, replacement=False, dataset_size=90)}, nf.SettingsError, "exceeds the 24"),
    ({"dynamics": nf.NoetherFlow(nf.SGD(0.1, 2))}, nf.SettingsError, "symmetries"),
    ({"data": (torch.zeros(4, 4), torch.zeros(5, 3))}, nf.SettingsError, "leading dimension"),
    ({"data": (torch.zeros(0, 4), torch.zeros(0, 3))}, nf.EmptyDataError, "empty"),
    ({"data": lambda count, generator: torch.zeros(count + 1, 4)}, nf.SettingsError, "was asked for"),
    ({"start": {"wrong": torch.zeros(2, 3)}}, nf.ParameterNameError, "wrong"),
    ({"start": {"2.bias": torch.zeros(3)}}, nf.ParameterShapeError, "one parameter per replica"),
    ({"loss": lambda m, b: squared_error(m, b).mean()}, nf.LossError, "one loss per example"),
    ({"model": nn.Sequential(mlp(4, 3), nn.BatchNorm1d(3))}, nf.CoupledExamplesError, "BatchNorm1d"),
    ({"model": mlp(4, 3).requires_grad_(False)}, nf.SettingsError, "nothing to simulate"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    one = case("diagonal")
    given = {"dynamics": nf.SGD(0.1, 2), "model": one.model, "loss": one.loss, "data": one.batch, "steps": 3}
    with pytest.raises(error, match=words):
        nf.simulate(**(given | changes))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_time_steps_are_positive(bad: float) -> None:
    for make in (
        lambda: nf.GradientFlow(bad),
        lambda: nf.GradientDescent(bad),
        lambda: nf.Langevin(nf.SGD(0.1, 1), dt=bad),
        lambda: nf.NoetherFlow(nf.SGD(0.1, 1), dt=bad),
    ):
        with pytest.raises(nf.SettingsError):
            make()


def test_a_step_of_a_limit_stands_for_a_step_of_sgd_with_momentum() -> None:
    sgd = nf.SGD(0.1, 2, momentum=0.75)
    assert nf.Langevin(sgd).time_step == nf.NoetherFlow(sgd).time_step == pytest.approx(0.4)
    assert nf.Langevin(sgd, dt=0.3).time_step == nf.NoetherFlow(sgd, dt=0.3).time_step == 0.3


def test_a_flow_along_rotations_that_share_a_tensor_is_refused() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()
    rotations = {f"{k}": nf.MatrixSymmetry(nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k + 1}.weight", 1)) for k in range(2)}
    x = torch.randn(20, 3).double()
    with pytest.raises(nf.SettingsError, match="do not commute"):
        nf.simulate(net, squared_error, (x, x), nf.NoetherFlow(nf.SGD(0.1, 2)), steps=1, symmetries=rotations)


def test_threads_are_as_many_as_before() -> None:
    one, before = case("diagonal"), torch.get_num_threads()
    seen = []

    def watched(params: dict[str, Tensor]) -> Tensor:
        seen.append(torch.get_num_threads())
        return params["0.bias"].sum()

    torch.set_num_threads(2)
    try:
        nf.simulate(one.model, one.loss, one.batch, nf.SGD(0.1, 2), steps=2, observables={"sum": watched})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}

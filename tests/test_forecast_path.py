"""The way to the equilibrium where coordinates move each other: against the Noether flow, step by step."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import mlp, rescaling, squared_error
from curvatures import Data, hessian
from noetherflow.forecasting.coupled import Course
from noetherflow.forecasting.courses import Courses, Groups, courses_of
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import metric_at
from noetherflow.forecasting.path import Path, half_time, path_of
from noetherflow.forecasting.sides import Sides
from noetherflow.forecasting.traces import curvature_grams

SGD = nf.SGD(0.05, 4, 0.02)
ROTATION: dict[str, nf.Symmetry] = {"hidden": nf.MatrixSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)])}


def linear_pair() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    model = mlp(5, 3, 4, bias=False, activation=nn.Identity).double()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([3.0, 1.0, 0.3]).unsqueeze(1))
    scale = torch.tensor([3.0, 1.0, 0.5, 0.3, 2.0]).double()
    return model, [(torch.randn(20, 5).double() * scale, torch.randn(20, 4).double()) for _ in range(5)]


def two_layers() -> tuple[nn.Module, Data]:
    """Two layers of neurons that share a weight."""
    torch.manual_seed(0)
    model = mlp(4, 3, 3, 2).double()
    with torch.no_grad():
        model[0].weight.mul_(2.5)
        model[4].weight.mul_(0.5)
        for layer in (model[0], model[2]):
            layer.bias.fill_(1.0)
    return model, [(torch.randn(20, 4).double(), torch.randn(20, 2).double()) for _ in range(5)]


NEURONS: dict[str, nf.Symmetry] = {"first": rescaling(0), "second": rescaling(2)}
CASES = {"rotation": (linear_pair, ROTATION), "neurons": (two_layers, NEURONS)}
JOINT = ["rotation", "neurons"]


def ways(name: str, settings: nf.SGD | nf.AdamW = SGD) -> tuple[nn.Module, Data, nf.Equilibrium, Courses, Path, Path]:
    """A problem with its joint way, and the way of every coordinate by itself."""
    build, symmetries = CASES[name]
    model, batches = build()
    equilibrium = nf.equilibrate(model, squared_error, batches, settings, symmetries, progress=False)
    given = MeanLoss(model, squared_error, batches, settings, torch.float64)
    courses = courses_of(given, equilibrium, settings, microbatches=False)
    multipliers = metric_at(given, equilibrium.params, settings).multipliers
    joint, apart = (path_of(equilibrium, settings, multipliers, part) for part in (courses, None))
    return model, batches, equilibrium, courses, joint, apart


def moved(symmetries: Mapping[str, nf.Symmetry], x: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    params = {name: p.detach() for name, p in model.named_parameters()}
    for name, symmetry in symmetries.items():
        params = symmetry.act(x[name], params)
    return params


def sizes(params: Mapping[str, Tensor]) -> Tensor:
    """Squared sizes of all tensors, which no rotation of the hidden layer changes."""
    return torch.stack([tensor.square().sum() for tensor in params.values()])


@pytest.mark.parametrize("name", JOINT)
def test_the_joint_way_is_that_of_the_noether_flow(name: str) -> None:
    model, batches, equilibrium, courses, joint, apart = ways(name)
    assert courses.apart == ()
    assert courses.by_name.keys() == equilibrium.symmetries.keys()
    data = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    shortest = min(float(t.min()) for t in equilibrium.relaxation_steps.values())
    stride = max(1, int(shortest / 40))
    record = [0, 8, 30, 120, 360]
    flow = nf.simulate(
        model,
        squared_error,
        data,
        nf.NoetherFlow(SGD, dt=SGD.lr * stride),
        steps=361,
        symmetries=equilibrium.symmetries,
        observables={n: lambda p, n=n: p[n] for n, _ in model.named_parameters()},
        record=record,
    )
    start = {n: p.detach() for n, p in model.named_parameters()}
    change = (sizes(equilibrium.params) - sizes(start)).abs().max()
    worst = dict.fromkeys(("joint", "apart"), 0.0)
    for k, count in enumerate(flow.steps.tolist()):
        truth = sizes({n: flow.observables[n][k].reshape(p.shape) for n, p in start.items()})
        for which, path in (("joint", joint), ("apart", apart)):
            here = sizes(moved(equilibrium.symmetries, path.at(count * stride), model))
            worst[which] = max(worst[which], float((here - truth).abs().max() / change))
    assert worst["joint"] < 0.02
    # Twin: every coordinate by itself is another way.
    assert worst["apart"] > 0.04


def test_the_joint_way_under_adamw() -> None:
    """Against small explicit steps, with v that follows the parameters."""
    settings = nf.AdamW(0.01, weight_decay=0.3, batch_size=4)
    model, batches, equilibrium, courses, joint, _ = ways("neurons", settings)
    assert courses.by_name
    noise = nf.estimate_noise(model, squared_error, batches, NEURONS)
    theta = {n: p.detach() for n, p in model.named_parameters()}
    v = {n: noise.variance[n] / 4 + noise.mean[n].square() for n in noise.variance}
    unit = {n: torch.ones_like(theta[n]) for n in v}
    basis = []
    for name, symmetry in NEURONS.items():
        for k in range(3):
            row = torch.eye(3).double()[k]
            basis.append(
                {n: symmetry.generate(row, {m: unit[m] for m in symmetry.names}).get(n, 0 * unit[n]) for n in v}
            )
        assert name in equilibrium.coordinates
    q = torch.stack([torch.cat([part[n].flatten() for n in v]) for part in basis])
    squares, roots = (
        torch.cat([part[n].flatten() for n in v]) for part in ({n: t.square() for n, t in theta.items()}, v)
    )
    roots = roots.sqrt()
    x, step, goal = torch.zeros(6).double(), 1.0, 400
    for _ in range(int(goal / step)):
        s = x @ q
        root, square = roots * torch.exp(-s), squares * torch.exp(2 * s)
        drift = q @ (root * (0.01 - 2 * 0.3 * square))
        x = x + step * torch.linalg.solve(2 * (q * root * square / 0.01) @ q.T, drift)
    end = torch.cat([equilibrium.coordinates[name] for name in NEURONS])
    shown = torch.cat([joint.at(goal)[name] for name in NEURONS])
    assert float(x.abs().max()) > 0.1 * float(end.abs().max())
    assert float((shown - x).abs().max()) < 0.02 * float(end.abs().max())


def test_the_way_ends_at_the_equilibrium_or_is_not_taken() -> None:
    model, batches, equilibrium, courses, joint, _ = ways("neurons")
    for name, end in equilibrium.coordinates.items():
        torch.testing.assert_close(joint.at(1e9)[name], end, rtol=1e-3, atol=1e-4)
        assert not bool(joint.at(0.0)[name].any())
    other = [(x, 3 * y) for x, y in batches[:2]]
    given = MeanLoss(model, squared_error, other, SGD, torch.float64)
    refused = courses_of(given, equilibrium, SGD, microbatches=False)
    assert (refused.by_name, refused.apart) == ({}, ("first", "second"))
    assert courses.apart == ()


def test_the_groups_of_symmetries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()
    batches = [(torch.randn(8, 3).double(), torch.randn(8, 3).double()) for _ in range(4)]
    equilibrium = nf.equilibrate(model, squared_error, batches, SGD, progress=False)
    assert Groups.of(equilibrium, SGD) == ([], [], sorted(equilibrium.symmetries))
    given = MeanLoss(model, squared_error, batches, SGD, torch.float64)
    assert courses_of(given, equilibrium, SGD, microbatches=False).by_name == {}
    forecast = nf.forecast(model, squared_error, batches, SGD, equilibrium=equilibrium, progress=False)
    assert any("relaxes as if all others were at the equilibrium" in text for text in forecast.assumptions)


def test_a_course_between_its_times() -> None:
    course = Course(torch.tensor([0.0, 1.0, 4.0]).double(), {"x": torch.tensor([0.0, 2.0, 8.0]).double()})
    assert [float(course.at(t)["x"]) for t in (0.0, 0.5, 1.0, 2.5, 4.0, 9.0)] == [0.0, 1.0, 2.0, 5.0, 8.0, 8.0]


def test_the_trace_is_carried_along_a_double_rotation() -> None:
    model, batches, equilibrium, _, _, _ = ways("rotation")
    full = hessian(model, squared_error, batches)
    # Sums over the columns of W and over the rows of U: parameters are W, shape (3, 5), and U, shape (4, 3).
    plus = torch.einsum("imjm->ij", full[:15, :15].reshape(3, 5, 3, 5))
    minus = torch.einsum("mimj->ij", full[15:, 15:].reshape(4, 3, 4, 3))
    there = mlp(5, 3, 4, bias=False, activation=nn.Identity).double()
    there.load_state_dict(equilibrium.params)
    grown = torch.linalg.matrix_exp(2 * equilibrium.coordinates["hidden"])
    carried = float((grown.inverse() @ plus).trace() + (grown @ minus).trace())
    assert carried == pytest.approx(float(hessian(there, squared_error, batches).trace()), rel=1e-9)
    given = MeanLoss(model, squared_error, batches, SGD, torch.float64)
    parts = [part["hidden"] for part in curvature_grams(given, ROTATION, 400, 0)]
    assert len(parts) == 4
    for side, truth in ((0, plus), (1, minus)):
        shown = torch.stack([part[side] for part in parts])
        assert float(((shown.mean(0) - truth).abs() / (shown.std(0) / 2)).max()) < 8
        assert float((shown.mean(0) - truth).abs().max()) < 0.15 * float(truth.abs().max())


def test_the_half_time_of_a_double_rotation() -> None:
    """Against the full Hessian on the way, and with an error."""
    model, batches, equilibrium, _, joint, _ = ways("rotation")
    given = MeanLoss(model, squared_error, batches, SGD, torch.float64)
    sides = Sides.measure(given, equilibrium, SGD, 200, 0)
    half = sides.half_steps()
    there = mlp(5, 3, 4, bias=False, activation=nn.Identity).double()

    def trace(steps: float) -> float:
        there.load_state_dict(moved(ROTATION, joint.at(steps), model))
        return float(hessian(there, squared_error, batches).trace())

    truth = half_time(trace, trace(60 * joint.longest), joint.longest)
    assert 0 < half.error < 0.5 * truth
    assert abs(half.value - truth) < 4 * half.error


def dipping(steps: float) -> float:
    """From 10 to 9, with a dip to 7 on the way."""
    return 9 + math.exp(-steps / 1000) - 12 * (math.exp(-steps / 1000) - math.exp(-steps / 100)) * 0.4


def test_the_first_half_of_a_change_that_comes_back() -> None:
    half = half_time(dipping, dipping(6e4), 1000.0)
    assert dipping(half) == pytest.approx(9.5, abs=1e-3)
    assert half < 50
    assert half_time(dipping, dipping(6e4), 1000.0, near=half) == pytest.approx(half, rel=1e-3)


def dipping_pair() -> tuple[nn.Module, Data]:
    """Two linear layers far from their balance, of which Tr H passes its end."""
    torch.manual_seed(4)
    model = mlp(5, 3, 4, bias=False, activation=nn.Identity).double()
    scales = torch.tensor([3.0, 1.0, 0.3, 0.3, 2.0]).double(), torch.tensor([5.0, 1.0, 0.3, 0.1]).double()
    batches = [(torch.randn(100, 5).double() * scales[0], torch.randn(100, 4).double() * scales[1]) for _ in range(5)]
    x = torch.randn(3, 3).double()
    model.load_state_dict(moved(ROTATION, {"hidden": 0.6 * (x + x.T)}, model))
    return model, batches


CASES["dipping"] = (dipping_pair, ROTATION)


@pytest.mark.parametrize(("name", "passes"), [("dipping", True), ("neurons", False)])
def test_a_change_that_comes_back_is_said(name: str, passes: bool) -> None:
    settings = nf.SGD(0.01, 4) if passes else SGD
    model, batches, equilibrium, _, joint, _ = ways(name, settings)
    there = mlp(5, 3, 4, bias=False, activation=nn.Identity) if passes else mlp(4, 3, 3, 2)

    def trace(params: Mapping[str, Tensor]) -> float:
        there.double().load_state_dict(params)
        return float(hessian(there, squared_error, batches).trace())

    shares = torch.logspace(-2, 1, 13).tolist()
    seen = [trace(moved(equilibrium.symmetries, joint.at(share * joint.longest), model)) for share in shares]
    end = trace(equilibrium.params)
    assert (min(seen) < 0.9 * end) == passes
    forecast = nf.forecast(model, squared_error, batches, settings, equilibrium=equilibrium, progress=False)
    assert any("passes its end" in text for text in forecast.assumptions) == passes


def trained(steps: int = 30) -> tuple[nn.Module, Data, torch.optim.AdamW]:
    model, batches = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        # Outputs of another size: gradients that the batches of the forecast do not have.
        squared_error(model, (batches[step % 5][0], 5 * batches[step % 5][1])).mean().backward()
        optimizer.step()
    return model, batches, optimizer


def test_the_step_sizes_of_a_run() -> None:
    model, batches, optimizer = trained()
    settings = nf.AdamW.from_optimizer(optimizer, batch_size=20)
    moments = nf.second_moments(optimizer, model)
    forecast = nf.forecast(model, squared_error, batches, settings, NEURONS, second_moments=optimizer, progress=False)
    solved = nf.solve_equilibrium(moments.for_symmetries(NEURONS), settings, model)
    full = hessian(model, squared_error, batches)
    v = torch.cat([moments.values[n].flatten() for n, _ in model.named_parameters()])
    scale = (v.sqrt() + 1e-8).rsqrt()
    top = float(torch.linalg.eigvalsh(scale[:, None] * full * scale)[-1])
    # The averages of gradients make steps larger by 1 / (1 - beta1), and remember as a momentum.
    assert forecast.stable_step.now.value == pytest.approx(2 * 1.9 / 0.1 / top, rel=1e-4)
    there = mlp(4, 3, 3, 2).double()
    there.load_state_dict(solved.params)
    assert forecast.trace.then.value == pytest.approx(float(hessian(there, squared_error, batches).trace()), rel=1e-8)
    carried = moments.values
    for name, symmetry in NEURONS.items():
        carried = symmetry.act(-2 * solved.coordinates[name], carried)
    v = torch.cat([carried[n].flatten() for n, _ in there.named_parameters()])
    scale = (v.sqrt() + 1e-8).rsqrt()
    top = float(torch.linalg.eigvalsh(scale[:, None] * hessian(there, squared_error, batches) * scale)[-1])
    assert forecast.stable_step.then.value == pytest.approx(2 * 1.9 / 0.1 / top, rel=1e-4)
    assert any("as the optimizer keeps it" in text for text in forecast.assumptions)
    plain = nf.forecast(model, squared_error, batches, settings, NEURONS, progress=False)
    assert plain.stable_step.now.value < 0.8 * forecast.stable_step.now.value
    again = nf.forecast(model, squared_error, batches, settings, second_moments=moments, progress=False)
    assert again.stable_step.now.value == pytest.approx(forecast.stable_step.now.value, rel=1e-6)
    with pytest.raises(nf.SettingsError, match="those of Adam"):
        nf.forecast(model, squared_error, batches, SGD, second_moments=moments)

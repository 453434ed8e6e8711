"""The equilibrium of AdamW: against scipy, against a second reading after the move, and against all minibatches."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, mlp, rescaling, squared_error
from noetherflow._minibatch import minibatches

SCALINGS = [one.name for one in cases() if all(s.action is nf.Action.SCALES_ENTRIES for s in one.symmetries.values())]
ONE_SIDED = "scalar, plus only"
# Far below sqrt(v), so that the law along the orbit is exact; see the last test of this part.
TINY = 1e-30
Make = type[torch.optim.Adam]


def lora() -> Case:
    """A frozen map beside a product of two factors, whose inner directions are rescaled."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.base.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    torch.manual_seed(3)
    batch = torch.randn(24, 5).double(), torch.randn(24, 4).double()
    pair = nf.DiagonalSymmetry(plus=nf.Axis("a.weight", 0), minus=nf.Axis("b.weight", 1))
    return Case("LoRA", Adapted().double(), squared_error, batch, {"pair": pair})


def deep() -> Case:
    """Five hidden layers, each of which shares a tensor with the next."""
    torch.manual_seed(4)
    batch = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    hidden = {f"layer {k}": rescaling(k) for k in range(0, 10, 2)}
    return Case("deep", mlp(4, 8, 7, 9, 8, 6, 3, activation=nn.LeakyReLU).double(), squared_error, batch, hidden)


SUBJECTS: dict[str, Callable[[], Case]] = {name: lambda name=name: case(name) for name in SCALINGS}
SUBJECTS |= {"LoRA": lora, "deep": deep}
DECAYS = ("none", "equal", "by parameter")
EVERY = [pair for pair in itertools.product(SUBJECTS, DECAYS) if pair != (ONE_SIDED, "none")]
everything = pytest.mark.parametrize(("name", "decay"), EVERY)
optimizers = pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])


def groups_of(model: nn.Module, decay: str) -> list[dict[str, Any]]:
    """A group for each parameter, with learning rates and weight decays of its own if they are by parameter."""
    rates, decays = itertools.cycle((0.01, 0.003, 0.02)), itertools.cycle((0.3, 0.1, 0.05, 0.2))
    groups = []
    for p in model.parameters():
        if p.requires_grad:
            given = {"none": (0.01, 0.0), "equal": (0.01, 0.1), "by parameter": (next(rates), next(decays))}[decay]
            groups.append({"params": [p], "lr": given[0], "weight_decay": given[1]})
    return groups


def started(name: str, decay: str, make: Make, eps: float = TINY) -> tuple[Case, torch.optim.Adam]:
    """A case after a few steps of an optimizer on its batches."""
    one = SUBJECTS[name]()
    optimizer = make(groups_of(one.model, decay), eps=eps)
    for batch in one.loader(8):
        optimizer.zero_grad()
        one.loss(one.model, batch).mean().backward()
        optimizer.step()
    return one, optimizer


def solved(one: Case, optimizer: torch.optim.Adam) -> nf.Equilibrium:
    settings = nf.AdamW.from_optimizer(optimizer, model=one.model)
    return nf.solve_equilibrium(nf.second_moments(optimizer, one.model, one.symmetries), settings, one.model)


def minimum_by_scipy(one: Case, optimizer: torch.optim.Adam, *, power: int = 1) -> tuple[Tensor, float]:
    """The parameters at the minimum of Psi, flat, and how far Psi falls, with generators built entry by entry."""
    full = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts: list[list[Tensor]] = [[], [], [], []]
    for p in one.model.parameters():
        group, state = full.get(id(p), {"lr": 0.0, "weight_decay": 0.0}), optimizer.state.get(p)
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** int(state["step"])) if state else torch.zeros_like(p)
        entries = (p.detach(), v.sqrt(), *(torch.full_like(v, group[key]) for key in ("lr", "weight_decay")))
        for part, tensor in zip(parts, entries, strict=True):
            part.append(tensor.reshape(-1))
    theta, root, lr, decay = (torch.cat(part) for part in parts)
    generators = torch.stack(
        [
            oracles.generator(symmetry, one.model, basis).diagonal()
            for symmetry in one.symmetries.values()
            for basis in checks.along(symmetry, one.model)
        ]
    )
    decoupled = isinstance(optimizer, torch.optim.AdamW)

    def psi(x: Tensor) -> Tensor:
        s = x @ generators
        shrinking = 2 * decay * root * theta.square() * s.exp() if decoupled else decay * theta.square() * (2 * s).exp()
        return (lr * root * (-power * s).exp() + shrinking).sum()

    start = torch.zeros(len(generators), dtype=torch.float64)
    scale = psi(start).item()

    def value(weights: Any) -> tuple[float, Any]:
        x = torch.tensor(weights, requires_grad=True)
        (slope,) = torch.autograd.grad(psi(x) / scale, x)
        return psi(x).item() / scale, slope.numpy()

    def hessian(weights: Any) -> Any:
        return torch.autograd.functional.hessian(psi, torch.tensor(weights)).numpy() / scale

    best = scipy.optimize.minimize(
        value, start.numpy(), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-14, "maxiter": 500}
    )
    return (torch.tensor(best.x) @ generators).exp() * theta, (1 - best.fun) * scale


@everything
@optimizers
def test_the_joint_solution_is_the_minimum_that_scipy_finds(name: str, decay: str, make: Make) -> None:
    one, optimizer = started(name, decay, make)
    equilibrium = solved(one, optimizer)
    assert equilibrium.status in (nf.Status.CONVERGED, nf.Status.SINGULAR)
    expected, fall = minimum_by_scipy(one, optimizer)
    reached = oracles.flat({name: equilibrium.params[name] for name in one.params})
    torch.testing.assert_close(reached, expected, rtol=1e-6, atol=1e-6)
    assert equilibrium.potential_before - equilibrium.potential_after == pytest.approx(fall, rel=1e-9)
    # The twin: with the exponent of SGD the minimum is elsewhere.
    other, _ = minimum_by_scipy(one, optimizer, power=2)
    assert decay == "none" or not torch.allclose(other, expected, rtol=1e-3)


@everything
@optimizers
def test_nothing_drives_the_charges_after_the_move(name: str, decay: str, make: Make) -> None:
    """Parameters and state are moved, second moments are read again, and every force is balanced."""
    one, optimizer = started(name, decay, make)
    first = solved(one, optimizer)
    assert max(part.before for part in first.imbalance.values()) > 1e-3
    before = nf.second_moments(optimizer, one.model, one.symmetries)
    nf.rebalance_(one.model, first, one.loss, one.batch, optimizer=optimizer)
    again = solved(one, optimizer)
    assert max(part.before for part in again.imbalance.values()) < 1e-9
    assert max(x.abs().max() for x in again.coordinates.values()) < 1e-9
    assert again.trace_before == pytest.approx(first.trace_after, rel=1e-9)
    # The twin: a state that stays where it was belongs to another point.
    settings = nf.AdamW.from_optimizer(optimizer, model=one.model)
    stale = nf.solve_equilibrium(before, settings, one.model)
    # Without a minus side, uniformly scaled second moments leave the balance eta = 2 lambda theta^2 as it is.
    if name != ONE_SIDED or make is torch.optim.Adam:
        assert max(part.before for part in stale.imbalance.values()) > 1e-3


def test_the_equilibrium_is_that_without_eps_and_a_note_says_where_eps_counts() -> None:
    """The force v / (sqrt(v) + eps) does not scale as sqrt(v): what the formula neglects is of the order of eps."""
    left = {}
    for eps in (TINY, 1e-8, 1e-6, 1e-4, 0.3):
        one, optimizer = started("deep", "equal", torch.optim.AdamW, eps)
        first = solved(one, optimizer)
        assert any("eps matters" in note for note in first.notes) == (eps >= 1e-4)
        nf.rebalance_(one.model, first, one.loss, one.batch, optimizer=optimizer)
        assert max(part.before for part in solved(one, optimizer).imbalance.values()) < 1e-9
        left[eps] = with_eps(one, optimizer, eps)
    assert left[TINY] < 1e-9 < left[1e-8]
    assert left[1e-6] / left[1e-8] == pytest.approx(100, rel=0.1)


def with_eps(one: Case, optimizer: torch.optim.AdamW, eps: float) -> float:
    """The largest relative imbalance of the forces with eps, over all symmetries."""
    moments, theta = nf.second_moments(optimizer, one.model, one.symmetries), one.params
    settings, worst = nf.AdamW.from_optimizer(optimizer, model=one.model), 0.0
    noise, decay = {}, {}
    for name, v in moments.values.items():
        root = v.sqrt() + eps
        noise[name] = torch.where(v > 0, settings.lr_of(name) * v / root, 0.0).sqrt()
        decay[name] = (2 * settings.decay_of(name) * root).sqrt() * theta[name]
    for symmetry in one.symmetries.values():
        push = symmetry.grams(noise).plus + symmetry.grams(decay).minus
        pull = symmetry.grams(noise).minus + symmetry.grams(decay).plus
        worst = max(worst, float((push - pull).norm() / (push + pull).norm()))
    return worst


def test_what_runs_away_together_is_held_along_that_direction() -> None:
    """sqrt(a) e^{x - y} + sqrt(b) e^{y - x} + c e^{-x - y} has no minimum along x + y; x - y = log(b / a) / 4."""
    values = {"a": torch.ones(1).double(), "b": 4 * torch.ones(1).double(), "c": 1e-18 * torch.ones(1).double()}
    a, b, c = (nf.Axis(name, 0) for name in values)
    pair = {"x": nf.ScalarSymmetry([b, c], [a]), "y": nf.ScalarSymmetry([a, c], [b])}
    moments = nf.SecondMoments(values, dict.fromkeys(values, 9), pair)
    params = {name: torch.ones(1).double() for name in values}
    held = nf.solve_equilibrium(moments, nf.AdamW(0.1, eps=0.0, weight_decay=0.0), params)
    assert held.status is nf.Status.AT_INFINITY
    assert "run away together" in held.message
    x, y = (held.coordinates[name].item() for name in pair)
    assert x + y == pytest.approx(0.0, abs=1e-12)
    assert x - y == pytest.approx(math.log(4) / 4, rel=1e-6)
    decayed = nf.solve_equilibrium(moments, nf.AdamW(0.1, eps=0.0, weight_decay=0.1), params)
    assert decayed.status is nf.Status.CONVERGED


# Measured instead of read.


def gradients_of(one: Case, count: int, size: int, *, replacement: bool) -> list[dict[str, Tensor]]:
    """The gradient of every minibatch of the first examples."""
    x, y = (tensor[:count] for tensor in one.batch)
    result = []
    for chosen in oracles.minibatches(count, size, replacement=replacement):
        model, index = copy.deepcopy(one.model), torch.tensor(chosen)
        one.loss(model, (x[index], y[index])).mean().backward()
        result.append({name: p.grad for name, p in model.named_parameters()})
    return result


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["diagonal", "diagonal, coupled layers"])
def test_second_moments_of_minibatches_are_the_mean_over_all_of_them(name: str, size: int, replacement: bool) -> None:
    one, count = case(name), 5
    batch = tuple(tensor[:count] for tensor in one.batch)
    noise = nf.estimate_noise(one.model, one.loss, [batch], one.symmetries)
    adamw = nf.AdamW(batch_size=size, replacement=replacement, dataset_size=None if replacement else count)
    gradients = gradients_of(one, count, size, replacement=replacement)
    measured = minibatches(noise, adamw)
    for parameter in noise.square_scatter:
        expected = torch.stack([g[parameter].square() for g in gradients]).mean(0)
        torch.testing.assert_close(measured.moment(parameter), expected, rtol=1e-12, atol=1e-14)
        # The twins: without the square of the mean, and for minibatches of another size.
        mean = noise.mean[parameter].square()
        assert not torch.allclose(measured.moment(parameter) - mean, expected, rtol=1e-3)
        other = minibatches(noise, nf.AdamW(batch_size=size + 1)).moment(parameter)
        assert not torch.allclose(other, expected, rtol=1e-3)


def test_the_average_of_adamw_converges_to_the_measured_moments() -> None:
    """At fixed parameters, over all minibatches again and again: the departure falls with 1 - beta2."""
    one, count, size = case("diagonal"), 4, 2
    noise = nf.estimate_noise(one.model, one.loss, [tuple(t[:count] for t in one.batch)], one.symmetries)
    adamw = nf.AdamW(lr=0.01, batch_size=size, eps=0.0, weight_decay=0.1)
    gradients = gradients_of(one, count, size, replacement=True)
    expected = nf.solve_equilibrium(noise, adamw, one.model).coordinates["hidden"]
    departures = []
    for beta in (0.99, 0.999, 0.9999, 0.99999):
        model = copy.deepcopy(one.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, beta), eps=TINY)
        for gradient in gradients * 20:
            for name, parameter in model.named_parameters():
                parameter.grad = gradient[name]
            optimizer.step()
        moments = nf.second_moments(optimizer, model, one.symmetries)
        x = nf.solve_equilibrium(moments, adamw, model).coordinates["hidden"]
        departures.append((x - expected).abs().max().item())
    assert departures[-1] < 1e-4
    for before, after in itertools.pairwise(departures):
        assert after == pytest.approx(before / 10, rel=0.3)

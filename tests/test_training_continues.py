r"""The steps after a move are those before it, mapped by the group element, where an optimizer commutes with the group.

SGD does not: at e^Q theta the gradient is e^{-Q} g, so a step of the moved model is the step of the other one only if
it is multiplied by e^{2Q}. With that metric the two trajectories are equal, momentum included; this is how the momentum
of a moved model is tested. A step of Adam, m / sqrt(v), has no scale, so the step itself is equal.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import noetherflow as nf
from cases import Case, case

LR, MU, STEPS = 0.003, 0.9, 50


def gradient(one: Case) -> dict[str, Tensor]:
    named = dict(one.model.named_parameters())
    parts = torch.autograd.grad(one.loss(one.model, one.batch).mean(), list(named.values()))
    return dict(zip(named, parts, strict=True))


def trajectory(
    one: Case, momentum: dict[str, Tensor], metric: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Points of SGD with momentum whose steps are multiplied by a metric: theta -= lr M m, m <- mu m + g."""
    named = dict(one.model.named_parameters())
    for _ in range(STEPS):
        g = gradient(one)
        momentum = {name: MU * momentum[name] + g[name] for name in named}
        with torch.no_grad():
            for name, change in metric(momentum).items():
                named[name] -= LR * change
        yield {name: parameter.detach().clone() for name, parameter in named.items()}


def optimizer_of(one: Case, **more: Any) -> torch.optim.SGD:
    """SGD in the middle of its course, with a momentum that is not small."""
    optimizer = torch.optim.SGD(one.model.parameters(), lr=LR, momentum=MU, **more)
    for _ in range(5):
        one.loss(one.model, one.batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def momentum_of(one: Case, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in one.model.named_parameters()}


def moved(one: Case, optimizer: torch.optim.Optimizer | None) -> nf.Equilibrium:
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.1, 5, 0.02), one.model)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    return equilibrium


def largest_gap(name: str, *, with_momentum: bool) -> float:
    """The largest difference, over 50 steps, between a moved course in the metric e^{2Q} and the mapped course."""
    one, twin = case(name), case(name)
    original = momentum_of(one, optimizer_of(one))
    optimizer = optimizer_of(twin)
    equilibrium = moved(twin, optimizer if with_momentum else None)
    (symmetry,), (x,) = equilibrium.symmetries.values(), equilibrium.coordinates.values()
    course = trajectory(one, original, lambda m: m)
    in_metric = trajectory(twin, momentum_of(twin, optimizer), lambda m: symmetry.act(2 * x, m))
    gaps = []
    for here, there in zip(course, in_metric, strict=True):
        mapped = symmetry.act(x, here)
        gaps += [float((mapped[key] - there[key]).abs().max()) for key in mapped]
    assert len(gaps) == STEPS * len(one.params)
    return max(gaps)


# Each has a single symmetry, so that e^{2Q} is the group element of 2x.
CASES = ["scalar, two sides", "diagonal", "matrix", "a tied weight in both roles", "dense, eigenvalues 1 and -2"]


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_with_momentum_are_those_of_the_model_that_stayed(name: str) -> None:
    assert largest_gap(name, with_momentum=True) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_a_momentum_that_stays_behind_is_noticed(name: str) -> None:
    assert largest_gap(name, with_momentum=False) > 1e-4


@pytest.mark.parametrize("more", [{}, {"nesterov": True}, {"foreach": True}, {"fused": True}], ids=str)
def test_fifty_steps_of_torch_with_a_learning_rate_for_each_side(more: dict[str, bool]) -> None:
    """For a scaling, e^{2Q} is a learning rate per tensor, so the optimizer itself continues on the mapped course."""
    one, twin = case("scalar, two sides"), case("scalar, two sides")
    optimizer, other = optimizer_of(one, **more), optimizer_of(twin, **more)
    equilibrium = moved(twin, other)
    x = equilibrium.coordinates["layers"]
    weights = dict(twin.model.named_parameters())
    sides = {"0.weight": 1.0, "2.weight": -1.0}
    groups = [{"params": [weights[name]], "lr": LR * float((sign * 2 * x).exp())} for name, sign in sides.items()]
    continued = torch.optim.SGD(groups, lr=LR, momentum=MU, **more)
    continued.state.update(other.state)
    for _ in range(STEPS):
        for each, current in ((one, optimizer), (twin, continued)):
            current.zero_grad()
            each.loss(each.model, each.batch).mean().backward()
            current.step()
    torch.testing.assert_close(twin.params, one.symmetries["layers"].act(x, one.params), rtol=1e-9, atol=1e-12)
    assert abs(float(x)) > 0.1


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["diagonal", "diagonal, coupled layers", "convolution, flatten, linear"])
def test_the_next_step_of_adam_is_the_step_of_the_model_that_stayed(name: str, amsgrad: bool) -> None:
    """Of equal length entry by entry: m / sqrt(v) has no scale. Twins: with either average left behind it differs."""

    def next_step(*, moves: bool, left_behind: str = "") -> dict[str, Tensor]:
        one = case(name)
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=0.01, eps=0.0, weight_decay=0.0, amsgrad=amsgrad)

        def step() -> None:
            optimizer.zero_grad()
            one.loss(one.model, one.batch).mean().backward()
            optimizer.step()

        for _ in range(4):
            step()
        kept = copy.deepcopy([state.get(left_behind) for state in optimizer.state.values()])
        if moves:
            moved(one, optimizer)
        if left_behind:
            for state, entry in zip(optimizer.state.values(), kept, strict=True):
                state[left_behind] = entry
        before = copy.deepcopy(one.params)
        step()
        return {key: tensor - before[key] for key, tensor in one.params.items()}

    expected = next_step(moves=False)
    assert all(change.abs().min() > 0 for change in expected.values())
    torch.testing.assert_close(next_step(moves=True), expected, rtol=1e-9, atol=1e-14)
    for average in ("exp_avg", "max_exp_avg_sq" if amsgrad else "exp_avg_sq"):
        wrong = next_step(moves=True, left_behind=average)
        assert max((wrong[key] - expected[key]).abs().max() for key in wrong) > 1e-4

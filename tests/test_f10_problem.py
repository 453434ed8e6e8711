"""The predictions of F10 against closed forms, and its second moments against gradients of examples."""

import math

import pytest
import torch
from torch.func import grad, vmap

import noetherflow as nf
from noetherflow.paper.f10_problem import World, formula_of_sgd

INPUTS, OUTPUTS, LENGTH, LR = 12, 3, 1.5, 0.02


def adamw(weight_decay: float = 0.0, **more: float) -> nf.AdamW:
    return nf.AdamW(LR, weight_decay=weight_decay, batch_size=4, **more)


def test_without_decay_the_ratio_of_squared_norms_is_the_square_of_that_of_sgd() -> None:
    world = World.of(INPUTS, OUTPUTS, LENGTH)
    x, of_sgd = world.rest(adamw(eps=0.0), 4), world.rest(formula_of_sgd(adamw()), 4)
    assert math.exp(4 * of_sgd) == pytest.approx(INPUTS / OUTPUTS)
    assert math.exp(4 * x) == pytest.approx((INPUTS / OUTPUTS) ** 2)


@pytest.mark.parametrize("decay", [0.003, 0.1, 10.0])
def test_with_decay_both_norms_solve_the_equation(decay: float) -> None:
    x = World.of(INPUTS, OUTPUTS, LENGTH).rest(adamw(decay, eps=0.0), 4)
    w, u = math.sqrt(LENGTH) * math.exp(x), math.sqrt(LENGTH) * math.exp(-x)
    assert LR * (INPUTS / w - OUTPUTS / u) == pytest.approx(2 * decay * (w - u), rel=1e-8)


def test_under_a_large_decay_the_difference_of_squared_norms_is_not_that_of_equal_v() -> None:
    params = World.of(INPUTS, OUTPUTS, LENGTH).minimum(World.of(INPUTS, OUTPUTS, LENGTH).rest(adamw(100.0), 4))
    difference = (params["w"].square().sum() - params["u"].square().sum()).item()
    assert difference == pytest.approx(LR * (INPUTS - OUTPUTS) / 100.0, rel=1e-3)


def test_eps_and_a_penalty_are_solved_with_the_noise_of_each_point() -> None:
    """At the solution, the condition of rest holds with the second moments of that point."""
    world = World.of(INPUTS, OUTPUTS, LENGTH, spread=10.0)
    for settings in (adamw(eps=1.0), nf.AdamW(LR, weight_decay=0.05, batch_size=4, decoupled=False)):
        params = world.minimum(world.rest(settings, 4))
        v = world.second_moments(params, 4)
        pushes = {}
        for name in ("w", "u"):
            noise = LR * v[name] / (v[name].sqrt() + settings.eps)
            pushes[name] = (noise - 2 * settings.decay_of(name) * params[name].square()).sum().item()
        assert pushes["w"] == pytest.approx(pushes["u"], rel=1e-7)


def test_the_second_moments_are_those_of_gradients() -> None:
    world, size, count = World.of(4, 2, LENGTH, spread=5.0), 4, 200_000
    params = world.minimum(0.3)
    x, y = world.sampler()(size * count, torch.Generator().manual_seed(0))

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x @ params["w"])[:, None] * params["u"] - y).square().sum(1).mean()

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(
        params, x.unflatten(0, (count, size)), y.unflatten(0, (count, size))
    )
    for name, expected in world.second_moments(params, size).items():
        torch.testing.assert_close(gradients[name].square().mean(0), expected, rtol=0.02, atol=0)

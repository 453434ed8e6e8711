"""Steps of finite size: the mean gradient kicks the charge as noise does, and gradient descent has no other kick."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
from cases import Case, case, cases

EXAMPLES, INPUTS, OUTPUTS = 64, 3, 2
SIDES = {"pair": nf.ScalarSymmetry(plus=[nf.Axis("u", 0)], minus=[nf.Axis("w", 0)])}


class RankOne(nn.Module):
    """u (w . x)."""

    def __init__(self, u: Tensor, w: Tensor) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(u.clone()), nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w)[:, None] * self.u

    def scale(self) -> float:
        """The logarithm of the coordinate: half of that of |u| / |w|."""
        return math.log(float(self.u.detach().norm() / self.w.detach().norm())) / 2


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def problem() -> tuple[RankOne, tuple[Tensor, Tensor]]:
    """A regression without an exact solution, and a model near its best function, with |u| four times |w|."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, target = draw(EXAMPLES, INPUTS), draw(OUTPUTS, INPUTS)
    y = x @ target.T + 0.3 * draw(EXAMPLES, OUTPUTS)
    left, values, right = torch.linalg.svd(torch.linalg.lstsq(x, y).solution.T)
    size = 0.8 * values[0].sqrt()
    return RankOne(2 * size * left[:, 0], size / 2 * right[0]), (x, y)


def descend(model: RankOne, batch: Any, lr: float, steps: int) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Gradient descent on the full batch: the gradient and the coordinate of every step."""
    gradients, scales = [], []
    for _ in range(steps):
        model.zero_grad()
        squares(model, batch).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= lr * gradients[-1][name]
        scales.append(model.scale())
    return gradients, scales


def on_full_batch(lr: float, *, finite_step: bool = True) -> nf.SGD:
    return nf.SGD(lr, EXAMPLES, replacement=False, dataset_size=EXAMPLES, finite_step=finite_step)


def averaged(gradients: list[dict[str, Tensor]]) -> nf.SecondMoments:
    """The average of squares of gradients."""
    values = {name: torch.stack([g[name].square() for g in gradients]).mean(0) for name in gradients[0]}
    return nf.SecondMoments(values, dict.fromkeys(values, len(gradients)), SIDES)


@pytest.mark.parametrize("one", cases(), ids=str)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_drift_of_a_finite_step_is_the_exact_mean_change(one: Case, batch_size: int) -> None:
    noise = checks.noise_of(one)
    finite, limit = nf.SGD(0.1, batch_size, finite_step=True), nf.SGD(0.1, batch_size)
    exact, rates, small = (
        nf.expected_step(noise, finite, one.model),
        nf.drift(noise, finite, one.model),
        nf.drift(noise, limit, one.model),
    )
    for name, symmetry in noise.symmetries.items():
        torch.testing.assert_close(0.1 * rates[name], exact[name], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(rates[name] - small[name], 0.1 * symmetry.charge(noise.mean), rtol=1e-9, atol=1e-12)


def test_the_equilibrium_is_the_minimum_of_the_potential_with_the_mean_gradient() -> None:
    """The potential at moved parameters, where the noise is measured anew: it is least at the equilibrium."""
    for name in ("diagonal, coupled layers", "matrix", "scalar and diagonal on shared tensors"):
        one = case(name)
        noise, sgd = checks.noise_of(one), nf.SGD(0.1, 5, 0.02, finite_step=True)
        equilibrium = nf.solve_equilibrium(noise, sgd, one.model)
        torch.testing.assert_close(
            torch.tensor(equilibrium.potential_before),
            nf.potential(noise, nf.SGD(0.1, 5, 0.02), one.model).float()
            + 0.05 * sum(mean.square().sum() for mean in noise.mean.values()).float(),
        )
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
        there = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
        assert max(residual.before for residual in there.imbalance.values()) < 1e-9
        assert there.potential_before == pytest.approx(equilibrium.potential_after, rel=1e-9)


def test_the_kicks_of_gradient_descent_add_up_to_the_change_of_the_charge() -> None:
    model, batch = problem()
    lr = 0.1
    start = SIDES["pair"].charge(dict(model.named_parameters())).item()
    total = limit = 0.0
    for _ in range(200):
        noise = nf.estimate_noise(model, squares, [batch], SIDES, progress=False)
        total += lr * nf.drift(noise, on_full_batch(lr), model)["pair"].item()
        limit += lr * nf.drift(noise, on_full_batch(lr, finite_step=False), model)["pair"].item()
        descend(model, batch, lr, 1)
    change = SIDES["pair"].charge(dict(model.named_parameters())).item() - start
    assert total == pytest.approx(change, rel=1e-10)
    assert abs(change) > 0.1
    # Without the mean gradient, nothing moves.
    assert limit == 0.0


def test_gradient_descent_that_goes_on_oscillating_ends_where_the_formula_says() -> None:
    """At the edge of stability the gradient does not vanish, and the coordinate comes to its fixed point."""
    model, batch = problem()
    lr = 0.22  # larger steps than 0.25 diverge
    noise, start = nf.estimate_noise(model, squares, [batch], SIDES), model.scale()
    way = nf.solve_equilibrium(noise, on_full_batch(lr), model).coordinates["pair"].item()
    assert nf.solve_equilibrium(noise, on_full_batch(lr, finite_step=False), model).status is nf.Status.SINGULAR
    gradients, scales = descend(model, batch, lr, 3000)
    late = sum(scales[1500:]) / 1500
    assert abs(start + way - late) < 0.05 * abs(way)
    # From late averages of squares of gradients, nothing is left of the way.
    rest = nf.solve_equilibrium(averaged(gradients[1500:]), on_full_batch(lr), model)
    assert abs(rest.coordinates["pair"].item()) < 1e-3 * abs(way)


def test_gradient_descent_that_converges_stops_on_the_way() -> None:
    """The gradient vanishes before the fixed point is reached: the formula does not say where the model ends."""
    model, batch = problem()
    lr = 0.12
    noise, start = nf.estimate_noise(model, squares, [batch], SIDES), model.scale()
    way = nf.solve_equilibrium(noise, on_full_batch(lr), model).coordinates["pair"].item()
    gradients, scales = descend(model, batch, lr, 3000)
    assert gradients[-1]["u"].norm() < 1e-12
    assert 0.2 < (scales[-1] - start) / way < 0.6


def test_the_settings_with_momentum_and_moments_of_adam() -> None:
    model, batch = problem()
    gradients, _ = descend(model, batch, 0.1, 3)
    with pytest.raises(nf.SettingsError, match="finite_step=True"):
        nf.solve_equilibrium(averaged(gradients), nf.SGD(0.1, 4), model)
    meter = nf.NoiseMeter(model, SIDES, variances=True)
    with meter.step(batch):
        squares(model, batch).mean().backward()
    with pytest.raises(nf.SettingsError, match="mean gradient"):
        nf.drift(meter.noise, nf.SGD(0.1, 4, finite_step=True), model)

"""Closed forms of linear networks against samples, autograd, and the general solver."""

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import squared_error
from noetherflow.linear import (
    NoiseFactors,
    TwoLayer,
    deep_equilibrium,
    deep_noise,
    noise_factors,
    two_layer_equilibrium,
    two_layer_noise,
    two_layer_relaxation,
    two_layer_sharpness,
)

INPUTS, HIDDEN, OUTPUTS = 4, 3, 5


def random_covariance(size: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.mT / size + 0.2 * torch.eye(size, dtype=torch.float64)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, TwoLayer]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(OUTPUTS, HIDDEN, generator=generator, dtype=torch.float64)
    w = torch.randn(HIDDEN, INPUTS, generator=generator, dtype=torch.float64)
    return u @ w, random_covariance(INPUTS, generator), random_covariance(OUTPUTS, generator), TwoLayer(u, w)


@pytest.mark.parametrize("off", [0.0, 0.7])
def test_noise_factors_against_samples(off: float) -> None:
    _, cov_x, cov_e, _ = problem()
    generator = torch.Generator().manual_seed(1)
    error = off * torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    count = 400_000
    x = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_x).mT
    noise = torch.randn(count, OUTPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_e).mT
    residual = 2 * (x @ error.mT - noise)
    mean = residual.mT @ x / count
    # The gradient is G = r x^T, so that G G^T = |x|^2 r r^T and G^T G = |r|^2 x x^T.
    u = (residual * x.square().sum(1, keepdim=True)).mT @ residual / count - mean @ mean.mT
    w = (x * residual.square().sum(1, keepdim=True)).mT @ x / count - mean.mT @ mean
    factors = noise_factors(cov_x, cov_e, error)
    for factor, sampled in zip(factors, NoiseFactors(u, w), strict=True):
        assert torch.linalg.norm(factor - sampled) < 0.02 * torch.linalg.norm(factor)


def test_the_closed_form_fits_and_balances() -> None:
    target, cov_x, cov_e, _ = problem()
    weights = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN)
    torch.testing.assert_close(weights.u @ weights.w, target)
    plus, minus = two_layer_noise(weights, noise_factors(cov_x, cov_e))
    torch.testing.assert_close(plus, minus, rtol=1e-10, atol=1e-12)


def test_the_general_solver_gives_the_closed_form() -> None:
    target, cov_x, cov_e, weights = problem()
    rotation = {"hidden": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    params = {"0.weight": weights.w, "1.weight": weights.u}
    noise = nf.NoiseMoments(
        count=1,
        mean={name: torch.zeros_like(tensor) for name, tensor in params.items()},
        scatter={"hidden": two_layer_noise(weights, noise_factors(cov_x, cov_e))},
        square_scatter={},
        total_scatter=torch.zeros((), dtype=torch.float64),
        spreads={},
        symmetries=rotation,
    )
    solved = nf.solve_equilibrium(noise, nf.SGD(0.1, 4), params).params
    closed = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN)
    torch.testing.assert_close(solved["0.weight"].mT @ solved["0.weight"], closed.w.mT @ closed.w)
    torch.testing.assert_close(solved["1.weight"] @ solved["1.weight"].mT, closed.u @ closed.u.mT)


def test_noise_estimated_from_samples_gives_the_closed_form() -> None:
    """Samples, `estimate_noise`, `solve_equilibrium`: against the closed form within the sampling error."""
    target, cov_x, cov_e, weights = problem()
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Linear(HIDDEN, OUTPUTS, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(weights.w)
        net[1].weight.copy_(weights.u)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40_000, INPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_x).mT
    noise = torch.randn(40_000, OUTPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_e).mT
    rotation = {"hidden": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    moments = nf.estimate_noise(net, squared_error, [(x, x @ target.mT + noise)], rotation)
    inner = nf.solve_equilibrium(moments, nf.SGD(0.1, 4), net).params["0.weight"]
    closed = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN).w
    gap = torch.linalg.norm(inner.mT @ inner - closed.mT @ closed) / torch.linalg.norm(closed.mT @ closed)
    assert gap < 0.03


def test_spare_hidden_units_are_zero() -> None:
    target, cov_x, cov_e, _ = problem()
    weights = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN + 2)
    torch.testing.assert_close(weights.u @ weights.w, target)
    assert not weights.u[:, HIDDEN:].any()
    assert not weights.w[HIDDEN:].any()


def test_too_few_hidden_units_are_refused() -> None:
    target, cov_x, cov_e, _ = problem()
    with pytest.raises(nf.ParameterShapeError, match="rank 3"):
        two_layer_equilibrium(target, cov_x, cov_e, 2)


def test_sharpness_is_the_trace_of_the_hessian() -> None:
    target, cov_x, _, weights = problem()

    def mean_loss(flat: Tensor) -> Tensor:
        u, w = flat[: OUTPUTS * HIDDEN].reshape(OUTPUTS, HIDDEN), flat[OUTPUTS * HIDDEN :].reshape(HIDDEN, INPUTS)
        error = u @ w - target - 0.3
        return (error @ cov_x @ error.mT).trace()

    hessian = torch.autograd.functional.hessian(mean_loss, torch.cat([weights.u.reshape(-1), weights.w.reshape(-1)]))
    torch.testing.assert_close(two_layer_sharpness(weights, cov_x), hessian.trace())


def moments_of(weights: TwoLayer, cov_x: Tensor, cov_e: Tensor) -> tuple[dict[str, Tensor], nf.NoiseMoments]:
    params = {"0.weight": weights.w, "1.weight": weights.u}
    noise = nf.NoiseMoments(
        count=1,
        mean={name: torch.zeros_like(tensor) for name, tensor in params.items()},
        scatter={"hidden": two_layer_noise(weights, noise_factors(cov_x, cov_e))},
        square_scatter={},
        total_scatter=torch.zeros((), dtype=torch.float64),
        spreads={},
        symmetries={"hidden": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))},
    )
    return params, noise


def test_relaxation_agrees_with_the_general_solver_and_with_the_formula_of_a_single_unit() -> None:
    target, cov_x, cov_e, _ = problem()
    sgd = nf.SGD(0.1, 4, momentum=0.5)
    weights = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN)
    params, noise = moments_of(weights, cov_x, cov_e)
    general = nf.solve_equilibrium(noise, sgd, params).relaxation_steps["hidden"]
    torch.testing.assert_close(two_layer_relaxation(weights, noise_factors(cov_x, cov_e), sgd), general)
    single = two_layer_equilibrium(target[:, :1] @ torch.ones(1, INPUTS).double(), cov_x, cov_e, 1)
    factors = noise_factors(cov_x, cov_e)
    strength = (single.u.mT @ factors.u @ single.u).item()
    size = (single.u.square().sum() + single.w.square().sum()).item()
    plain = nf.SGD(0.1, 4)
    steps = two_layer_relaxation(single, factors, plain).item()
    assert steps == pytest.approx(4 * size / (2 * 0.1**2 * strength))


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_deep_networks_fit_and_balance(depth: int) -> None:
    target, cov_x, cov_e, _ = problem()
    weights = deep_equilibrium(target, cov_x, cov_e, depth)
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    torch.testing.assert_close(product, target)
    for plus, minus in deep_noise(weights, cov_x, cov_e):
        torch.testing.assert_close(plus, minus, rtol=1e-10, atol=1e-12)
    if depth == 2:
        closed = two_layer_equilibrium(target, cov_x, cov_e, HIDDEN)
        torch.testing.assert_close(weights[0].mT @ weights[0], closed.w.mT @ closed.w)


def test_deep_noise_against_samples() -> None:
    """Against per-example gradients of a three-layer network at its minimum, by autograd."""
    _, cov_x, cov_e, _ = problem()
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, INPUTS), (4, 3), (OUTPUTS, 4))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes]
    net = nn.Sequential(*(nn.Linear(b, a, bias=False) for a, b in shapes)).double()
    with torch.no_grad():
        for layer, weight in zip(net, weights, strict=True):
            layer.weight.copy_(weight)
    count = 60_000
    x = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_x).mT
    noise = torch.randn(count, OUTPUTS, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov_e).mT
    symmetries = {f"{i}": nf.MatrixSymmetry(nf.Axis(f"{i}.weight", 0), nf.Axis(f"{i + 1}.weight", 1)) for i in range(2)}
    moments = nf.estimate_noise(net, squared_error, [(x, net(x).detach() + noise)], symmetries)
    for i, expected in enumerate(deep_noise(weights, cov_x, cov_e)):
        for side, value in zip(moments.grams[f"{i}"], expected, strict=True):
            assert torch.linalg.norm(side - value) < 0.03 * torch.linalg.norm(value)


def test_one_layer_is_not_deep() -> None:
    target, cov_x, cov_e, _ = problem()
    with pytest.raises(nf.ParameterShapeError, match="at least 2"):
        deep_equilibrium(target, cov_x, cov_e, 1)

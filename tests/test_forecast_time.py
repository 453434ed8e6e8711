"""When a forecast arrives, and what it recommends: paths, norms and schedules against integration step by step."""

import math
from dataclasses import replace
from pathlib import Path as File

import pytest
import scipy.integrate
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import mlp, rescaling, squared_error
from noetherflow.forecasting.estimate import Estimate, change_of, unknown
from noetherflow.forecasting.norms import norms_of
from noetherflow.forecasting.path import half_time, interpolated, path_of

LR, DECAY, SIZE = 0.05, 0.02, 4


class Product(nn.Module):
    """u (w . x): a scaling with a single coordinate."""

    def __init__(self, u: float, w: float) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.full((3,), u, dtype=torch.float64))
        self.w = nn.Parameter(torch.full((2,), w, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).unsqueeze(1) * self.u


PAIR = {"pair": nf.ScalarSymmetry([nf.Axis("u", 0)], [nf.Axis("w", 0)])}


def product_data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(120, n, generator=generator, dtype=torch.float64) for n in (2, 3))
    return list(zip(x.split(20), y.split(20), strict=True))


def coordinate_in_time(model: Product, settings: nf.SGD, steps: list[float]) -> list[float]:
    """x after so many steps: the drift of the charge integrated, from the noise at the start and nothing else."""
    noise = nf.estimate_noise(model, squared_error, product_data(), PAIR)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    at = {name: noise.square_scatter[name].sum() / noise.count for name in ("u", "w")}
    size = {name: float(p.square().sum()) for name, p in theta.items()}

    def speed(_: float, x: list[float]) -> list[float]:
        up, down = math.exp(2 * x[0]), math.exp(-2 * x[0])
        decay = 4 * settings.gamma * (size["u"] * up - size["w"] * down)
        push = 2 * settings.temperature * (float(at["u"]) * down - float(at["w"]) * up)
        # Per step of length lr; C' is the derivative of the charge by x.
        return [settings.effective_lr * (push - decay) / (2 * (size["u"] * up + size["w"] * down))]

    way = scipy.integrate.solve_ivp(speed, (0, max(steps)), [0.0], t_eval=steps, rtol=1e-10, atol=1e-12)
    return [float(x) for x in way.y[0]]


@pytest.mark.parametrize(("u", "w"), [(2.0, 0.4), (0.3, 3.0)])
def test_a_coordinate_in_time(u: float, w: float) -> None:
    model, settings = Product(u, w), nf.SGD(LR, SIZE, DECAY)
    noise = nf.estimate_noise(model, squared_error, product_data(), PAIR)
    equilibrium = nf.solve_equilibrium(noise, settings, model)
    path = path_of(equilibrium, settings, {})
    steps = [path.longest * share for share in (0.01, 0.1, 0.5, 1.0, 3.0)]
    expected = coordinate_in_time(model, settings, steps)
    shown = [float(path.at(count)["pair"]) for count in steps]
    assert shown == pytest.approx(expected, rel=1e-6)
    # Twin: far from the equilibrium, exponential relaxation is another curve.
    end = float(equilibrium.coordinates["pair"])
    linear = [end * (1 - math.exp(-count / path.longest)) for count in steps]
    assert max(abs(a - b) for a, b in zip(linear, expected, strict=True)) > 0.05 * abs(end)


def test_the_way_of_a_matrix_of_a_single_row_is_that_of_a_number() -> None:
    model, settings = mlp(3, 1, 2, bias=False, activation=nn.Identity).double(), nf.SGD(LR, SIZE, DECAY)
    x, y = torch.randn(60, 3).double(), torch.randn(60, 2).double()
    axes = [nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)]
    paths = []
    for kind in (nf.MatrixSymmetry, nf.DiagonalSymmetry):
        noise = nf.estimate_noise(model, squared_error, [(x, y)], {"hidden": kind(*axes)})
        paths.append(path_of(nf.solve_equilibrium(noise, settings, model), settings, {}))
    for share in (0.1, 1.0):
        first, second = (path.at(share * path.longest)["hidden"].flatten() for path in paths)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


def test_half_of_the_change() -> None:
    assert half_time(lambda n: 5 - 3 * math.exp(-n / 70), 5.0, 70.0) == pytest.approx(70 * math.log(2), rel=1e-6)
    assert half_time(lambda n: 2 + 3 * math.exp(-n / 70), 2.0, 70.0) == pytest.approx(70 * math.log(2), rel=1e-6)
    assert math.isnan(half_time(lambda _: 2.0, 2.0, 70.0))
    curve = interpolated(lambda n: 2 + 3 * math.exp(-n / 70), 70.0, 12)
    assert half_time(curve, 2.0, 70.0) == pytest.approx(70 * math.log(2), rel=0.05)


class Normed(nn.Module):
    """A weight in front of a normalisation: scale invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x @ self.w.T, (4,), eps=0.0)


def normed() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], dict[str, nf.Symmetry]]:
    torch.manual_seed(0)
    x, y = torch.randn(80, 5).double(), torch.randn(80, 4).double()
    symmetry = {"w": nf.ScalarSymmetry([nf.Axis("w", 0)], [])}
    return Normed(), list(zip(x.split(20), y.split(20), strict=True)), symmetry


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_norms_in_front_of_a_normalisation_under_sgd(scale: float) -> None:
    model, batches, symmetries = normed()
    with torch.no_grad():
        model.w.mul_(scale)
    settings = nf.SGD(0.1, 5, 0.01)
    noise = nf.estimate_noise(model, squared_error, batches, symmetries)
    equilibrium = nf.solve_equilibrium(noise, settings, model)
    params = dict(model.named_parameters())
    norm = norms_of(equilibrium, settings, params)["w"]
    size, trace = float(model.w.detach().square().sum()), float(noise.trace)
    fourth = 0.1 * size * trace / (2 * 0.01 * 5)  # theory: lr |theta|^2 Tr Sigma / (2 weight_decay S)
    assert float(norm.then) == pytest.approx(fourth**0.25, rel=1e-8)
    assert float(norm.lr_then) == pytest.approx(0.1 / fourth**0.5, rel=1e-8)
    # Step by step: weight decay shrinks the norm, the mean square of a step lets the norm grow.
    square, count = size, 0
    while not 0.95 < (square / fourth**0.5) ** 0.5 < 1.05:
        square = (1 - 0.1 * 0.01) ** 2 * square + 0.01 * trace * size / square / 5
        count += 1
    assert float(norm.steps) == pytest.approx(count, rel=0.01)


def test_a_norm_whose_tensor_has_another_symmetry() -> None:
    """The columns of the weight in front of the normalisation move with the neurons before."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False),
        nn.LeakyReLU(),
        nn.Linear(5, 3, bias=False),
        nn.LayerNorm(3, eps=0.0, elementwise_affine=False),
        nn.Linear(3, 2),
    ).double()
    batches = [(torch.randn(20, 4).double(), torch.randn(20, 2).double()) for _ in range(3)]
    symmetries = {
        "scale": nf.ScalarSymmetry(plus=nf.Axis("2.weight", 0)),
        "neurons": nf.DiagonalSymmetry(nf.Axis("0.weight", 0), nf.Axis("2.weight", 1)),
    }

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)

    settings = nf.SGD(0.1, 8, weight_decay=1e-2)
    equilibrium = nf.equilibrate(model, loss, batches, settings, symmetries, progress=False)
    norm = norms_of(equilibrium, settings, dict(model.named_parameters()))["scale"]
    there = float(equilibrium.params["2.weight"].norm())
    assert float(norm.then) == pytest.approx(there, rel=1e-12)
    assert float(norm.now * equilibrium.coordinates["scale"].exp()) != pytest.approx(there, rel=1e-2)


def test_norms_in_front_of_a_normalisation_under_adamw() -> None:
    model, batches, symmetries = normed()
    settings = nf.AdamW(0.01, weight_decay=0.1, batch_size=20)
    noise = nf.estimate_noise(model, squared_error, batches, symmetries)
    equilibrium = nf.solve_equilibrium(noise, settings, model)
    norm = norms_of(equilibrium, settings, dict(model.named_parameters()))["w"]
    square, count, goal = float(model.w.detach().square().sum()), 0, 0.01 * 20 / (2 * 0.1)
    # With v held, the equilibrium is that of the sum of sqrt(v) theta^2; after v has followed it is eta C / (2 lambda).
    while not 0.95 < (square / goal) ** 0.5 < 1.05:
        square = (1 - 0.01 * 0.1) ** 2 * square + 0.01**2 * 20
        count += 1
    assert float(norm.steps) == pytest.approx(count, rel=0.3)
    assert float(norm.lr_then) == pytest.approx(0.01 * 20**0.5 / float(norm.then), rel=1e-9)


def test_without_weight_decay_a_norm_grows_for_ever() -> None:
    model, batches, symmetries = normed()
    settings = nf.SGD(0.1, 5)
    equilibrium = nf.equilibrate(model, squared_error, batches, settings, symmetries, progress=False)
    forecast = nf.forecast(model, squared_error, batches, settings, equilibrium=equilibrium, progress=False)
    assert math.isinf(float(forecast.norms["w"].then))
    assert math.isinf(float(forecast.norms["w"].steps))
    assert forecast.status is nf.Status.AT_INFINITY
    assert "never" in str(forecast)


def test_a_forecast_is_saved_and_printed(tmp_path: File) -> None:
    torch.manual_seed(0)
    model = mlp(4, 6, 2).double()
    batches = [(torch.randn(16, 4).double(), torch.randn(16, 2).double()) for _ in range(4)]
    forecast = nf.forecast(
        model, squared_error, batches, nf.SGD(0.1, 8, 1e-3), {"hidden": rescaling(0)}, progress=False
    )
    forecast.save(tmp_path / "f.safetensors")
    again = nf.Forecast.load(tmp_path / "f.safetensors")
    assert str(again) == str(forecast)
    assert again.trace == forecast.trace
    assert again.warmup == forecast.warmup
    text = str(forecast)
    for word in (
        "Tr H",
        "critical sharpness",
        "largest stable step",
        "half",
        "assumes",
        forecast.warmup.need.value[:9],
    ):
        assert word in text
    assert "<table>" in forecast._repr_html_()


def test_the_sentence() -> None:
    model, batches, symmetries = normed()
    forecast = nf.forecast(model, squared_error, batches, nf.SGD(0.1, 5, 0.01), symmetries, progress=False)

    def said(ratio: Estimate, half: Estimate) -> str:
        return replace(forecast, trace=forecast.trace._replace(ratio=ratio), half_steps=half).sentence

    assert said(Estimate(2.9, 0.1), Estimate(1200.0)) == (
        "The model sharpens: Tr H x 2.9 +- 0.1, half of it within 1,200 steps."
    )
    assert said(Estimate(0.4, 0.03, 0.04), Estimate(50.0)).startswith("The model flattens: Tr H x 0.4 +- 0.05, half")
    assert "stays as it is" in said(Estimate(1.1, 0.1), Estimate(50.0))
    assert "cannot be told: why" in said(unknown("why"), Estimate(50.0))
    assert "when cannot be told: late" in said(Estimate(2.9, 0.1), unknown("late"))


def test_errors_of_ratios() -> None:
    change = change_of(Estimate(2.0, 0.2, 0.0), Estimate(6.0, 0.0, 0.6))
    assert change.ratio.value == pytest.approx(3.0)
    assert change.ratio.error == pytest.approx(0.3)
    assert change.ratio.sampling == pytest.approx(0.3)
    inverse = Estimate(4.0, 0.4, 0.8).over(2.0)
    assert (inverse.value, inverse.error, inverse.sampling) == pytest.approx((0.5, 0.05, 0.1))


def test_what_is_refused() -> None:
    model, batches, symmetries = normed()
    settings = nf.SGD(0.1, 5, 0.01)
    equilibrium = nf.equilibrate(model, squared_error, batches, settings, symmetries, progress=False)
    with pytest.raises(nf.SettingsError, match="vectors must be an integer, 4 or more"):
        nf.forecast(model, squared_error, batches, settings, vectors=1)
    with pytest.raises(nf.SettingsError, match="but not both"):
        nf.forecast(model, squared_error, batches, settings, symmetries, equilibrium=equilibrium)
    with torch.no_grad():
        model.w.mul_(1.1)
    with pytest.raises(nf.EquilibriumError, match="not that of the model as it is now"):
        nf.forecast(model, squared_error, batches, settings, equilibrium=equilibrium, progress=False)

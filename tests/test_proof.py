"""A proof at a special point proves nothing: symmetries are tested at perturbed parameters and buffers too."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf
from cases import mlp, squared_error
from noetherflow import _perturbed, _verify
from noetherflow._model_function import ModelFunction
from noetherflow._perturbed import SIZES, Perturbation, generic_points
from noetherflow._residual import active_rows, cosine
from noetherflow.detect import proof
from noetherflow.detect.proof import prove

BATCH = (
    torch.randn(8, 4, generator=torch.Generator().manual_seed(5)),
    torch.randn(8, 3, generator=torch.Generator().manual_seed(6)),
)


def rows(*names: str) -> list[nf.Axis]:
    return [nf.Axis(name, 0) for name in names]


def columns(*names: str) -> list[nf.Axis]:
    return [nf.Axis(name, 1) for name in names]


class LowRank(nn.Module):
    """W x + B A x with B = 0, as at the start of LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + self.b(self.a(x))


class Centred(nn.Module):
    """A hand-written running mean that is zero now, and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.gain = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.gain * (self.a(x) - self.centre)))


class Difference(nn.Module):
    """(u - v) w x with u = v."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)
        self.v = nn.Linear(5, 3)
        self.v.load_state_dict(self.u.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.w(x)
        return self.u(hidden) - self.v(hidden)


def without_bias() -> nn.Module:
    net = mlp(4, 6, 3)
    nn.init.zeros_(net[0].bias)
    return net


# A model at a special point, a symmetry at that point only, and a symmetry everywhere.
SPECIAL: dict[str, tuple[Callable[[], nn.Module], nf.Symmetry, nf.Symmetry]] = {
    "a factor of zero": (
        LowRank,
        nf.DiagonalSymmetry(rows("a.weight"), []),
        nf.MatrixSymmetry(rows("a.weight"), columns("b.weight")),
    ),
    "a buffer of zero": (
        Centred,
        nf.DiagonalSymmetry(rows("a.weight", "a.bias"), columns("c.weight")),
        nf.DiagonalSymmetry(rows("gain"), columns("c.weight")),
    ),
    "a bias of zero": (
        without_bias,
        nf.DiagonalSymmetry(rows("0.weight"), columns("2.weight")),
        nf.DiagonalSymmetry(rows("0.weight", "0.bias"), columns("2.weight")),
    ),
    "equal weights": (
        Difference,
        nf.ScalarSymmetry(rows("w.weight"), []),
        nf.MatrixSymmetry(rows("w.weight"), columns("u.weight", "v.weight")),
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return SPECIAL[name][0]()


def residuals_of(model: nn.Module, symmetry: nf.Symmetry) -> list[nf.Residual]:
    return [
        nf.verify_symmetry(model, squared_error, BATCH, symmetry),
        *prove([symmetry], model, squared_error, BATCH, dtype=None),
    ]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_symmetry_of_a_special_point_only_is_refused(name: str) -> None:
    _, false, true = SPECIAL[name]
    for residual in residuals_of(model_of(name), false):
        assert residual > 1e-3
        assert (residual.point, residual.untested) == ("perturbed", 0)
    for residual in residuals_of(model_of(name), true):
        assert residual < 1e-12
        assert residual.perturbation >= 0.3
        assert residual.untested == 0


@pytest.mark.parametrize("name", SPECIAL)
def test_the_given_parameters_alone_do_not_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without perturbed points, the false symmetries pass."""
    for where in (_verify, proof):
        monkeypatch.setattr(where, "generic_points", lambda function, batch: iter(()))
    for symmetry in SPECIAL[name][1:]:
        with pytest.warns(UserWarning, match="at the given parameters only"):
            found = residuals_of(model_of(name), symmetry)
        assert all(residual < 1e-12 for residual in found)
        assert {(residual.point, residual.perturbation) for residual in found} == {("given", 0.0)}


def test_many_symmetries_are_told_apart() -> None:
    model = nn.ModuleDict({"low": LowRank(), "net": without_bias()})

    def loss(model: Any, batch: Any) -> Tensor:
        return squared_error(model["low"], batch) + squared_error(model["net"], batch)

    def inside(prefix: str, symmetry: Any) -> nf.Symmetry:
        return symmetry.rename({name: f"{prefix}.{name}" for name in symmetry.names})

    chosen = {"low": SPECIAL["a factor of zero"][1:], "net": SPECIAL["a bias of zero"][1:]}
    symmetries = [inside(prefix, symmetry) for prefix, pair in chosen.items() for symmetry in pair]
    found = prove(symmetries, model, loss, BATCH, dtype=None)
    assert [residual < 1e-12 for residual in found] == [False, True, False, True]


# Dead units.


def dead(bias: float) -> nn.Module:
    """Centred, all units dead for all examples."""
    model = model_of("a buffer of zero")
    with torch.no_grad():
        model.a.weight.mul_(0.1)
        model.a.bias.fill_(bias)
    assert (model.a(BATCH[0]) < 0).all()
    return model


def test_units_that_are_dead_here_are_tested_where_they_are_not() -> None:
    _, false, true = SPECIAL["a buffer of zero"]
    for residual in residuals_of(dead(-0.3), false):
        assert residual > 1e-3
        assert residual.perturbation == 1.0
    for residual in residuals_of(dead(-0.3), true):
        assert residual < 1e-12
        assert residual.untested == 0


class Dead(Centred):
    """Centred, with units that are dead at all parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gain * (self.a(x) - self.centre)
        return self.c(torch.relu(torch.cat([-hidden[:, : self.count].square(), hidden[:, self.count :]], 1)))


def test_units_that_are_always_dead_are_counted() -> None:
    _, false, true = SPECIAL["a buffer of zero"]
    for residual in residuals_of(Dead(6), false):
        assert residual == 0
        assert residual.untested == 6
    for residual in residuals_of(Dead(4), true):
        assert residual < 1e-12
        assert residual.untested == 4


# Losses that are not finite elsewhere.


def within(distance: float, then: Callable[[], Any]) -> Any:
    """A loss that is what `then` gives if the first weight has moved by more than a relative distance."""

    def loss(model: Any, batch: Any) -> Tensor:
        start = STARTS[id(model)]
        moved = float((model[0].weight.detach() - start).norm() / start.norm())
        return squared_error(model, batch) * (then() if moved > distance else 1.0)

    return loss


STARTS: dict[int, Tensor] = {}


def refuse() -> float:
    raise ValueError("covariance is not positive definite")


@pytest.mark.parametrize("then", [lambda: math.nan, lambda: math.inf, refuse], ids=["NaN", "infinity", "error"])
@pytest.mark.parametrize(("distance", "size"), [(10.0, 0.3), (0.25, 0.1), (0.06, 0.02)])
def test_the_largest_size_at_which_losses_are_finite_is_taken(then: Any, distance: float, size: float) -> None:
    torch.manual_seed(0)
    net = mlp(4, 6, 3)
    STARTS[id(net)] = net[0].weight.detach().clone()
    function = ModelFunction(net, within(distance, then))
    assert next(generic_points(function, BATCH)).size == size


def test_a_loss_that_is_finite_at_the_given_parameters_only_is_named() -> None:
    torch.manual_seed(0)
    net = mlp(4, 6, 3)
    STARTS[id(net)] = net[0].weight.detach().clone()

    def loss(model: Any, batch: Any) -> Tensor:
        # Scaling rows of the first weight leaves their directions alone.
        turned = F.cosine_similarity(model[0].weight, STARTS[id(model)].to(model[0].weight)).min() < 1 - 1e-6
        return squared_error(model, batch) * torch.where(turned, torch.nan, 1.0)

    symmetry = nf.DiagonalSymmetry(rows("0.weight", "0.bias"), columns("2.weight"))
    for ask in (
        lambda: nf.verify_symmetry(net, loss, BATCH, symmetry),
        lambda: prove([symmetry], net, loss, BATCH, dtype=None)[0],
    ):
        with pytest.warns(UserWarning, match="proved at the given parameters only"):
            residual = ask()
        assert residual < 1e-12
        assert (residual.point, residual.perturbation) == ("given", 0.0)


def test_buffers_that_allow_no_other_numbers_keep_theirs() -> None:
    class Checked(Centred):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (self.centre == 0).to(x.dtype).min()

    torch.manual_seed(0)
    model = Checked()
    with pytest.warns(UserWarning, match="proved at the given buffers only"):
        residual = nf.verify_symmetry(model, squared_error, BATCH, SPECIAL["a buffer of zero"][2])
    assert residual < 1e-12
    assert residual.perturbation == 0.3


# The perturbation.


def test_factors_and_additions_have_the_sizes_that_are_stated() -> None:
    s = 0.3
    positive = torch.full((40000,), 2.0).double()
    assert abs(float((Perturbation(s)(positive) / positive).log().std()) / s - 1) < 0.03
    signs = torch.where(torch.arange(40000) % 2 == 0, 2.0, -2.0).double()
    spread = float((Perturbation(s)(signs) - signs).square().mean()) / 4
    assert abs(spread / (s**2 + math.exp(2 * s**2) - 2 * math.exp(s**2 / 2) + 1) - 1) < 0.03
    assert abs(float(Perturbation(s)(torch.zeros(100, 400)).std()) / (s / 20) - 1) < 0.03
    assert abs(float(Perturbation(s)(torch.zeros(40000)).std()) / s - 1) < 0.03


@pytest.mark.parametrize("size", [*SIZES, 1.0])
def test_signs_and_infinite_entries_stay(size: float) -> None:
    change = Perturbation(size)
    for positive in (change.buffer(torch.rand(1000)), -change.buffer(-torch.rand(1000))):
        assert (positive > 0).all()
    # Far away, negative biases have to become positive: units that are dead for all examples come to life.
    assert bool((change(torch.rand(1000)) > 0).all()) == (size < 1)
    assert bool((change(-torch.rand(1000)) < 0).all()) == (size < 1)
    assert (change.buffer(torch.eye(50)) > 0).all()
    mask = torch.full((20, 20), -torch.inf).triu(1)
    for large in (mask, mask.nan_to_num(neginf=-1e9)):
        moved = change.buffer(large)
        assert torch.equal(moved == large, large < 0)
        assert moved[large == 0].abs().max() < 10 * size
    assert (change(torch.tensor([1e5, -2e5, 3e5])) != torch.tensor([1e5, -2e5, 3e5])).all()


def test_what_is_no_number_stays() -> None:
    for tensor in (torch.arange(5), torch.tensor([True, False]), torch.randint(0, 9, (4,), dtype=torch.uint8)):
        assert Perturbation(0.3)(tensor) is tensor
        assert Perturbation(0.3).buffer(tensor) is tensor
    assert Perturbation(0.3)(torch.zeros(0, 3)).shape == (0, 3)


def test_both_parts_of_a_complex_tensor_move() -> None:
    for tensor in (torch.randn(30, dtype=torch.cfloat), torch.zeros(30, dtype=torch.cdouble)):
        moved = Perturbation(0.3)(tensor)
        assert moved.dtype == tensor.dtype
        assert ((moved.real != tensor.real) & (moved.imag != tensor.imag)).all()


def test_numbers_depend_on_the_seed_and_leave_the_global_generator_alone() -> None:
    state, tensor = torch.get_rng_state(), torch.linspace(-1, 1, 9)
    before = tensor.clone()
    first, again, other = (Perturbation(0.3, seed)(tensor) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tensor, before)


def test_tied_frozen_and_loss_tensors_move_together_and_the_function_stays() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("centre", torch.zeros(3))

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return (self.scale * (model(batch[0]) - self.centre)).square().sum(1)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight
            self.last.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x)))

    function = ModelFunction(Tied(), Weighted(), torch.float64)
    batch = tuple(tensor.double() for tensor in BATCH)
    before = function.losses(function.params, batch)
    change = Perturbation(0.3)
    other = function.moved(change, change.buffer)
    assert torch.equal(function.losses(function.params, batch), before)
    p = other.params
    assert list(p) == ["first.weight", "first.bias", "second.bias", "last.weight", "last.bias"]
    assert all(bool((p[name] != function.params[name]).all()) for name in p)
    assert all(other.trained[name] is p[name] for name in function.trained)
    hidden = batch[0] @ p["first.weight"].T + p["first.bias"]
    output = (hidden @ p["first.weight"].T + p["second.bias"]) @ p["last.weight"].T + p["last.bias"]
    # The scale and the centre of the loss have moved too: both follow from two losses.
    scale, centre = other.at(p, lambda: [t.clone() for t in (other._holder.loss.scale, other._holder.loss.centre)])
    assert (scale != 1).all()
    assert (centre != 0).all()
    torch.testing.assert_close(other.losses(p, batch), (scale * (output - centre)).square().sum(1))


# Complex parameters.


class Imaginary(nn.Module):
    """Of complex features only the imaginary part is used."""

    def __init__(self, *, linear: bool = False) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.randn(shape, dtype=torch.cfloat)) for shape in ((5, 4), (3, 5)))
        self.c, self.linear = nn.Linear(5, 3, bias=False), linear

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.to(self.w.dtype) @ self.w.T
        return (hidden @ self.u.T).real if self.linear else self.c(torch.relu(hidden.imag))


@pytest.mark.parametrize(
    ("linear", "true", "false"),
    [
        (False, nf.DiagonalSymmetry(rows("w"), columns("c.weight")), nf.ScalarSymmetry(rows("w"), [])),
        (True, nf.MatrixSymmetry(rows("w"), columns("u")), nf.MatrixSymmetry(rows("w"), [])),
        (True, nf.ScalarSymmetry(rows("w"), rows("u")), nf.ScalarSymmetry(rows("w", "u"), [])),
    ],
)
def test_complex_parameters_are_scaled_and_compared_as_pairs(linear: bool, true: Any, false: Any) -> None:
    torch.manual_seed(1)
    model = Imaginary(linear=linear)
    for residual in residuals_of(model, true):
        assert residual < 1e-12
    for residual in residuals_of(model, false):
        assert residual.loss > 1e-2
        assert residual.gradient > 1e-2
    moved = true.act(true.identity(dict(model.named_parameters())).real + 0.1, dict(model.named_parameters()))
    assert [tensor.dtype for tensor in moved.values()] == [tensor.dtype for tensor in model.parameters()]


def test_the_cosine_of_complex_vectors_is_that_of_finite_differences() -> None:
    torch.manual_seed(2)
    model = Imaginary()
    function = ModelFunction(model, squared_error, torch.float64)
    batch = tuple(tensor.double() for tensor in BATCH)
    assert function.params["w"].dtype == torch.complex128
    direction = {"w": torch.randn(5, 4, dtype=torch.cdouble), "c.weight": torch.randn(3, 5).double()}
    gradient = function.gradient({name: function.params[name] for name in direction}, batch)[1]
    step = 1e-6
    ends = [
        float(function.losses({n: function.params[n] + sign * step * v for n, v in direction.items()}, batch).sum())
        for sign in (1, -1)
    ]
    slope = abs(ends[0] - ends[1]) / (2 * step)
    lengths = [math.sqrt(sum(float(t.abs().square().sum()) for t in v.values())) for v in (gradient, direction)]
    assert math.isclose(float(cosine(gradient, direction)) * lengths[0] * lengths[1], slope, rel_tol=1e-6)


def test_a_dense_generator_keeps_real_parameters_real() -> None:
    v = {"z": torch.randn(2, dtype=torch.cdouble), "r": torch.randn(1).double()}
    moved = nf.DenseSymmetry(torch.diag(torch.tensor([1.0, 1.0, -1.0])), ["z", "r"]).act(torch.tensor(0.5), v)
    torch.testing.assert_close(moved, {"z": v["z"] * math.exp(0.5), "r": v["r"] * math.exp(-0.5)})


def test_frozen_integers_and_complex_parameters_go_through_the_finder() -> None:
    class Mixed(Imaginary):
        def __init__(self) -> None:
            super().__init__()
            self.order = nn.Parameter(torch.tensor([2, 0, 1, 3]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, self.order])

    residuals = residuals_of(Mixed(), nf.DiagonalSymmetry(rows("w"), columns("c.weight")))
    assert all(residual < 1e-12 for residual in residuals)


# The type of the proof.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_proof_in_16_bits_is_refused(dtype: torch.dtype) -> None:
    symmetry = nf.DiagonalSymmetry(rows("0.weight", "0.bias"), columns("2.weight"))
    for ask in (
        lambda dtype: nf.verify_symmetry(mlp(4, 6, 3), squared_error, BATCH, symmetry, dtype=dtype),
        lambda dtype: list(nf.find_symmetries(mlp(4, 6, 3), squared_error, BATCH, dtype=dtype)),
    ):
        with pytest.raises(nf.SettingsError, match=r"expected torch\.float64 or torch\.float32"):
            ask(dtype)
        assert ask(torch.float32) in (["0 -> 2"], pytest.approx(0.0, abs=2e-5))


def test_a_model_in_16_bits_is_proved_in_float64() -> None:
    model, batch = mlp(4, 6, 3).bfloat16(), tuple(tensor.bfloat16() for tensor in BATCH)
    symmetry = nf.DiagonalSymmetry(rows("0.weight", "0.bias"), columns("2.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nf.verify_symmetry(model, squared_error, batch, symmetry) < 1e-12
        assert list(nf.find_symmetries(model, squared_error, batch)) == ["0 -> 2"]


def test_no_more_points_than_needed_are_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []
    original = _perturbed._finite_point
    monkeypatch.setattr(_perturbed, "_finite_point", lambda *a: visited.append(a[3]) or original(*a))
    symmetry = SPECIAL["a bias of zero"][2]
    nf.verify_symmetry(model_of("a bias of zero"), squared_error, BATCH, symmetry)
    assert visited == [0]
    nf.verify_symmetry(Dead(1), squared_error, BATCH, SPECIAL["a buffer of zero"][1])
    assert visited == [0, 0, 1, 2, 3, 4]


def test_rows_of_zeros_are_not_tested() -> None:
    symmetry = nf.DiagonalSymmetry([nf.Axis("a", 0)], [nf.Axis("b", 1)])
    params = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]), "b": torch.zeros(2, 3)}
    gradients = {"a": torch.tensor([[0.0, 1e-300], [5.0, 5.0], [0.0, 7.0]], dtype=torch.float64), "b": torch.ones(2, 3)}
    assert active_rows(symmetry, gradients, params).tolist() == [True, False, False]
    params["b"][0, 1] = 1.0
    assert active_rows(symmetry, gradients, params).tolist() == [True, True, False]
    scalar = nf.ScalarSymmetry([nf.Axis("a", 0)], [])
    assert active_rows(scalar, gradients, params).tolist() == [True]
    assert active_rows(scalar, {"a": 0 * params["a"]}, params).tolist() == [False]


def test_noise_of_complex_parameters_is_refused_and_that_of_pairs_is_not() -> None:
    class Pairs(Imaginary):
        def __init__(self) -> None:
            super().__init__()
            self.u = None
            self.w = nn.Parameter(torch.view_as_real(self.w.detach()).clone())

        def forward(self, x: Tensor) -> Tensor:
            w = torch.view_as_complex(self.w)
            return self.c(torch.relu((x.to(w.dtype) @ w.T).imag))

    with pytest.raises(nf.SettingsError, match=r"complex parameters is not measured: \['w', 'u'\].*view_as_complex"):
        nf.estimate_noise(Imaginary(), squared_error, [BATCH], {}, progress=False)
    assert nf.estimate_noise(Pairs(), squared_error, [BATCH], {}, progress=False).trace > 0
    frozen = Imaginary()
    frozen.w.requires_grad_(False)
    frozen.u.requires_grad_(False)
    assert nf.estimate_noise(frozen, squared_error, [BATCH], {}, progress=False).trace > 0

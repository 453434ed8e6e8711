"""What a user can get wrong gets an error that says what came, what was expected and what to do; nothing is lost."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from cases import Case, case, squared_error


def measure(one: Case, **changes: Any) -> nf.NoiseMoments:
    given = {"model": one.model, "loss": one.loss, "loader": one.loader(), "symmetries": one.symmetries} | changes
    return nf.estimate_noise(**given)


def refused(error: type[Exception], *words: str) -> Any:
    """An error of one kind, whose message holds all these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_names_batch_and_example(bad: float) -> None:
    one = case("diagonal")
    one.batch[0][9, 2] = bad
    with refused(nf.NonFiniteError, "batch 1", "example 2"):
        measure(one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_parameter_that_is_not_finite_is_named(bad: float) -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[2].weight[0, 1] = bad
    with refused(nf.NonFiniteError, "parameter '2.weight'", "1 non-finite"):
        measure(one)
    with refused(nf.NonFiniteError, "'2.weight'"):
        nf.verify_symmetry(one.model, one.loss, one.batch, one.symmetries["hidden"])


def test_a_gradient_that_is_not_finite_names_batch_and_tensor() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(1).double())

        def forward(self, x: Tensor) -> Tensor:
            return ((x * self.w).sum(1) * self.u).abs().sqrt().unsqueeze(1)

    x = torch.ones(6, 3).double()
    x[4] = 0.0  # the square root of zero has a finite value and no slope
    pair = {"pair": nf.ScalarSymmetry(nf.Axis("w", 0), nf.Axis("u", 0))}
    batches = [(x[k : k + 2], torch.ones(2, 1).double()) for k in (0, 2, 4)]
    with refused(nf.NonFiniteError, "batch 2", "gradient of 'w'"):
        nf.estimate_noise(Root(), squared_error, batches, pair)


@pytest.mark.parametrize("loader", [[], iter(()), (batch for batch in ())])
def test_an_empty_loader(loader: Any) -> None:
    with refused(nf.EmptyDataError, "no batch", "drop_last"):
        measure(case("diagonal"), loader=loader)


def test_an_empty_batch() -> None:
    one = case("diagonal")
    with refused(nf.EmptyDataError, "batch 0", "empty"):
        measure(one, loader=[tuple(tensor[:0] for tensor in one.batch)])


def test_a_wrong_name_is_listed_with_the_right_ones() -> None:
    one = case("diagonal")
    wrong = {"hidden": nf.DiagonalSymmetry(nf.Axis("0.wieght", 0), nf.Axis("2.weight", 1))}
    for call in (
        lambda: measure(one, symmetries=wrong),
        lambda: nf.verify_symmetry(one.model, one.loss, one.batch, wrong["hidden"]),
    ):
        with refused(nf.ParameterNameError, "'0.wieght'", "0.weight", "2.weight"):
            call()


def test_a_wrong_shape_says_the_shapes() -> None:
    one = case("diagonal")
    wrong = {"hidden": nf.DiagonalSymmetry(nf.Axis("0.weight", 1), nf.Axis("2.weight", 1))}
    with refused(nf.ParameterShapeError, "same number of rows", "(5, 4)", "has 4", "(3, 5)", "has 5"):
        measure(one, symmetries=wrong)


@pytest.mark.parametrize("name", ["diagonal", "matrix", "scalar, two sides", "dense, eigenvalues 1 and -2"])
def test_a_symmetry_that_is_not_one_says_its_residual_and_the_worst_example(name: str) -> None:
    one, counts = case(name), torch.zeros(7).double()
    counts[6] = 1.0  # only this example has a loss at all

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return one.loss(model, batch[:2]) * batch[2]

    loader = [(*one.loader()[0], counts)]
    for call in (
        lambda: measure(one, loss=loss, loader=loader, symmetries=one.wrong),
        lambda: measure(one, loss=loss, loader=loader, symmetries=one.wrong, max_bytes=1),
        lambda: nf.analyze(one.model, loss, loader, nf.SGD(0.1, 5), one.wrong),
    ):
        with refused(nf.NotASymmetryError, next(iter(one.wrong)), "batch 0", "residual", "example 6", "verify"):
            call()


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_symmetry_of_gradients_alone_is_not_one(size: float) -> None:
    """A loss that jumps when a weight grows: every gradient is orthogonal to the orbit, and the loss still changes."""
    one = case("diagonal")

    def jump(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return one.loss(model, batch) + size * (model[0].weight.norm() > start).double()

    start = one.model[0].weight.norm().item()
    assert measure(one, loss=jump).trace > 0
    with refused(nf.NotASymmetryError, "'hidden'", "example", "first batch", "relative change"):
        nf.analyze(one.model, jump, one.loader(), nf.SGD(0.1, 5), one.symmetries)


def test_symmetries_in_a_list_are_refused() -> None:
    with pytest.raises(TypeError, match="mapping from your names"):
        measure(case("diagonal"), symmetries=[case("diagonal").symmetries["hidden"]])


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False).eval()])
def test_batch_norm_with_the_statistics_of_the_batch(norm: nn.Module) -> None:
    one = case("diagonal")
    net = nn.Sequential(one.model[0], norm.double(), nn.ReLU(), one.model[2])
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], nf.Axis("3.weight", 1))}
    with refused(nf.CoupledExamplesError, "'1' (BatchNorm1d)", "microbatches=True", "GroupNorm", "eval()"):
        measure(one, model=net, symmetries=symmetry)


def test_batch_norm_in_eval_mode_is_welcome() -> None:
    one = case("diagonal")
    net = nn.Sequential(one.model[0], nn.BatchNorm1d(5).double(), nn.ReLU(), one.model[2]).eval()
    symmetry = {"hidden": nf.DiagonalSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], nf.Axis("3.weight", 1))}
    assert measure(one, model=net, symmetries=symmetry).trace > 0


def test_a_loss_that_compares_examples() -> None:
    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(batch[0])
        return (outputs @ outputs.mT).logsumexp(1) - outputs.square().sum(1)

    with refused(nf.CoupledExamplesError, "batch 0", "within its batch", "on its own"):
        measure(case("diagonal"), loss=contrastive)


def test_a_model_that_centres_its_batch() -> None:
    class Centred(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x - x.mean(0))

    one = case("diagonal")
    renamed = {"hidden": one.symmetries["hidden"].rename({n: f"net.{n}" for n in ("0.weight", "0.bias", "2.weight")})}
    with refused(nf.CoupledExamplesError, "couples examples"):
        measure(one, model=Centred(one.model), symmetries=renamed)


LOSSES: list[tuple[Callable[..., Any], type[Exception], tuple[str, ...]]] = [
    (lambda m, b: squared_error(m, b).mean(), nf.LossError, ("shape (B,)", "got shape ()", 'reduction="none"')),
    (lambda m, b: (m(b[0]) - b[1]).square(), nf.LossError, ("shape (B,)", "got shape (7, 3)")),
    (lambda m, b: squared_error(m, b).long(), nf.LossError, ("floating-point", "torch.int64")),
    (lambda m, b: squared_error(m, b).detach(), nf.LossError, ("differentiably", ".detach()")),
    (lambda m, b: squared_error(m, b).sum().item(), nf.LossError, ("tensor of shape (B,)", "float")),
    (lambda m, b: b[1].sum(1), nf.LossError, ("differentiably",)),
    (lambda m, b: m[2].bias.sum() + b[1].sum(1), nf.LossError, ("does not depend on", "0.weight")),
]


@pytest.mark.parametrize(("loss", "error", "words"), LOSSES)
def test_a_loss_of_the_wrong_kind(loss: nf.Loss, error: type[Exception], words: tuple[str, ...]) -> None:
    with refused(error, "batch 0", *words):
        measure(case("diagonal"), loss=loss)


def test_verify_and_rebalance_want_one_loss_per_example_too() -> None:
    one = case("diagonal")

    def mean(model: nn.Module, batch: Any) -> Tensor:
        return squared_error(model, batch).mean()

    with refused(nf.LossError, "verify_symmetry", "shape (B,)"):
        nf.verify_symmetry(one.model, mean, one.batch, one.symmetries["hidden"])
    equilibrium = nf.solve_equilibrium(measure(one), nf.SGD(0.1, 5), one.model)
    with refused(nf.LossError, "rebalance_", "shape (B,)"):
        nf.rebalance_(one.model, equilibrium, mean, one.batch)


def test_a_frozen_parameter_is_not_moved() -> None:
    one = case("diagonal")
    one.model[2].weight.requires_grad_(False)
    with refused(nf.FrozenParameterError, "'hidden'", "2.weight", "unfreeze"):
        measure(one)


def test_a_frozen_model_has_no_noise() -> None:
    one = case("diagonal")
    one.model.requires_grad_(False)
    with refused(nf.FrozenParameterError, "no parameter that requires gradients"):
        measure(one)


def test_a_batch_without_examples_in_front() -> None:
    one = case("diagonal")

    def transposed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return squared_error(model, (batch[0].mT, batch[1].mT))

    x, y = one.batch
    with refused(nf.LossError, "24 examples", "(4, 24)", "(3, 24)"):
        measure(one, loss=transposed, loader=[(x.mT, y.mT)])


def test_every_error_is_of_one_family() -> None:
    errors = [thing for name in nf.__all__ if isinstance(thing := getattr(nf, name), type) and name.endswith("Error")]
    assert len(errors) >= 12
    assert all(issubclass(error, nf.NoetherflowError) for error in errors)


def test_arguments_in_another_order_are_answered_with_the_order() -> None:
    one = case("diagonal")
    with pytest.raises(nf.SettingsError, match=r"got DiagonalSymmetry: the order of arguments is model, loss, data"):
        nf.verify_symmetry(one.symmetries["hidden"], one.model, one.loss, one.batch)
    with pytest.raises(nf.SettingsError, match="as dynamics"):
        nf.simulate(nf.SGD(0.1, 2), one.model, one.loss, one.batch, steps=1)

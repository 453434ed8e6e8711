"""Real models against a float64 loop over single examples, from finding symmetries to moving along them."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import model_table
import noetherflow as nf
from cases import mlp, squared_error
from model_table import Checkpointed, Net, Row
from noetherflow import _model_function, _params, _verify
from noetherflow._model_function import ModelFunction
from noetherflow._precision import TOLERANCES, Watch

SGD = nf.SGD(lr=0.1, batch_size=8, weight_decay=0.01)
HALF = 12


def slack(dtype: torch.dtype) -> float:
    """Relative error allowed of a sum of squares of gradients.

    Each of the three layers, forward and backward, rounds to a relative eps / 2, and squares double that: a dozen eps
    at worst if no errors cancel.
    """
    return 12 * torch.finfo(dtype).eps


def split(batch: Any, size: int) -> list[Any]:
    """A batch of tensors, pairs or dicts of them in smaller batches."""
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    if isinstance(batch, dict):
        return [dict(zip(batch, parts, strict=True)) for parts in split(tuple(batch.values()), size)]
    return list(zip(*(one.split(size) for one in batch), strict=True))


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(one) for key, one in value.items()}
    return tuple(double(one) for one in value)


def by_loop(row: Row, model: nn.Module) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Loss and gradient of every example in float64: a model, a loss and `backward`, nothing else."""
    loss = copy.deepcopy(row.loss).double() if isinstance(row.loss, nn.Module) else row.loss
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for example in split(double(row.batch), 1):
        model.zero_grad()
        value = loss(model, example).sum()
        value.backward()
        yield (
            value.item(),
            {name: torch.zeros_like(one) if one.grad is None else one.grad.clone() for name, one in named.items()},
        )


def plain(names: Any) -> dict[str, Any]:
    """By the names that parameters have without a compiler."""
    return {name.removeprefix("_orig_mod."): one for name, one in names.items()}


def load(row: Row, params: dict[str, Tensor]) -> nn.Module:
    """A float64 copy of the model with other parameters."""
    model = row.double()
    with torch.no_grad():
        for name, one in plain(params).items():
            dict(model.named_parameters())[name].copy_(one)
    return model


def gram(symmetry: Any, axes: Any, centred: dict[str, Tensor]) -> Tensor:
    """N on one side: of the Gram matrix of rows of centred gradients, as much as the symmetry has coordinates."""
    total: Any = 0.0
    for axis in axes:
        assert axis.within is None
        assert axis.repeat == 1
        stack = centred[axis.name.removeprefix("_orig_mod.")]
        rows = stack.movedim(axis.dim % (stack.ndim - 1) + 1, 0)[axis.start : axis.stop].flatten(1)
        product = rows @ rows.mT / len(stack)
        if isinstance(symmetry, nf.ScalarSymmetry):
            product = product.trace()
        total = total + (product.diagonal() if isinstance(symmetry, nf.DiagonalSymmetry) else product)
    return torch.as_tensor(total)


def close(found: Tensor, expected: Tensor, scale: float, allowed: float, what: str) -> None:
    error = float((found.double() - expected).abs().max()) / (scale or 1.0)
    assert error <= allowed, f"{what}: {error:.1e} > {allowed:.1e}"


def noise_is_right(row: Row, noise: nf.NoiseMoments, truth: dict[str, Tensor]) -> None:
    allowed = slack(row.precision)
    mean = {name: stack.mean(0) for name, stack in truth.items()}
    centred = {name: stack - mean[name] for name, stack in truth.items()}
    trace = float(sum(one.square().sum() for one in centred.values())) / len(next(iter(truth.values())))
    assert math.isclose(float(noise.trace), trace, rel_tol=allowed)
    size = max(float(one.abs().max()) for one in mean.values())
    for name, one in plain(noise.mean).items():
        close(one, mean[name], size, allowed, f"mean gradient of {name}")
    for name, symmetry in noise.symmetries.items():
        sides = [gram(symmetry, side, centred) for side in (symmetry.plus, symmetry.minus)]
        for found, expected in zip(noise.grams[name], sides, strict=True):
            close(found, expected, float(expected.abs().max()), allowed, name)


def noise_of(row: Row, symmetries: dict[str, nf.Symmetry] | None = None, **more: Any) -> nf.NoiseMoments:
    return nf.estimate_noise(row.model, row.loss, split(row.batch, HALF), symmetries, progress=False, **more)


def go_through(row: Row) -> None:
    """From the model to its equilibrium; every number against the loop."""
    found = list(by_loop(row, row.double()))
    losses = torch.tensor([value for value, _ in found]).double()
    truth = {name: torch.stack([gradient[name] for _, gradient in found]) for name in found[0][1]}
    before = {name: one.clone() for name, one in row.model.state_dict().items()}
    state = torch.get_rng_state()
    symmetries = nf.find_symmetries(row.model, row.loss, row.batch)
    assert symmetries
    for exact in (True, False):
        noise_is_right(row, noise_of(row, symmetries, exact=exact), truth)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in row.model.state_dict().items())
    assert all(one.grad is None for one in row.model.parameters())
    noise = noise_of(row, symmetries).select(*(name for name in symmetries if row.chosen in name))
    assert all(bool(torch.isfinite(one).all()) for one in nf.drift(noise, SGD, row.model).values())
    equilibrium = nf.solve_equilibrium(noise, SGD, row.model)
    nf.rebalance_(row.model, equilibrium, row.loss, row.batch)
    moved = dict(row.model.named_parameters())
    assert any(not torch.equal(one, before[name]) for name, one in moved.items())
    after = torch.tensor([value for value, _ in by_loop(row, load(row, moved))]).double()
    # The moved parameters are rounded to their type, and with them the function.
    kind = max((one.dtype for one in moved.values() if one.is_floating_point()), key=lambda one: torch.finfo(one).eps)
    close(after, losses, float(losses.mean()), slack(kind), "losses after the move")


@pytest.mark.parametrize("name", model_table.NAMES)
def test_every_number_is_that_of_a_loop(name: str) -> None:
    if name == "compiled" and torch.__version__.startswith("2.6."):
        # PyTorch 2.6 exports no compiled model; later releases do.
        with pytest.raises(nf.TraceError, match="dynamo-optimized"):
            go_through(model_table.row(name))
        return
    go_through(model_table.row(name))


def gradients_are_right(row: Row) -> None:
    """At parameters other than the model's: losses, the gradient of their sum, and those of single examples."""
    function = ModelFunction(row.model, row.loss)
    before = {name: (one, one.clone()) for name, one in row.model.state_dict(keep_vars=True).items()}
    generator = torch.Generator().manual_seed(1)
    params = {
        name: one * (1 + 0.3 * torch.randn(one.shape, generator=generator)).to(one.dtype)
        for name, one in function.trained.items()
    }
    found = list(by_loop(row, load(row, params)))
    size = len(found)
    losses, gradient = function.gradient(params, row.batch)
    values, stacks = function.example_gradients(params, row.batch, size, slice(3, 9), "the batch")
    allowed = slack(row.precision)
    expected = torch.tensor([value for value, _ in found]).double()
    for one, part in ((function.losses(params, row.batch), slice(None)), (losses, slice(None)), (values, slice(3, 9))):
        close(one, expected[part], float(expected.mean()), allowed, "losses")
    truth = {name: torch.stack([one[name] for _, one in found]) for name in found[0][1]}
    largest = max(float(stack.abs().max()) for stack in truth.values())
    for name, stack in truth.items():
        close(plain(stacks)[name], stack[3:9], largest, allowed, f"gradients of {name}")
        close(plain(gradient)[name], stack.sum(0), size * largest, allowed, f"sum of gradients of {name}")
    assert function.observe(row.batch).precision is row.precision
    for name, one in row.model.state_dict(keep_vars=True).items():
        assert one is before[name][0], name
        assert torch.equal(one, before[name][1]), name
        assert one.grad is None


@pytest.mark.parametrize("name", model_table.NAMES)
def test_gradients_at_other_parameters_are_those_of_a_model_that_has_them(name: str) -> None:
    gradients_are_right(model_table.row(name))


def test_dropout_under_a_checkpoint_drops_the_same_units_again() -> None:
    """Against all four masks of two hidden units, to four standard errors."""
    torch.manual_seed(3)
    model = Checkpointed(dropout=0.5).double()
    model.middle, model.outer = nn.Linear(5, 2).double(), nn.Linear(2, 3).double()
    x, y = (one.expand(400, -1) for one in (torch.randn(1, 4).double(), torch.randn(1, 3).double()))
    row = Row(model, squared_error, (x, y))
    stacks: list[Tensor] = []
    for mask in ((0, 0), (0, 2), (2, 0), (2, 2)):
        hidden = model.middle(model.inner(x[:1]).relu()).relu() * torch.tensor(mask)
        value = (model.outer(hidden) - y[:1]).square().sum()
        gradient = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
        stacks.append(torch.cat([one.flatten() for one in gradient]))
    truth = torch.stack(stacks)
    squares = (truth - truth.mean(0)).square().sum(1)
    error = float(squares.std(correction=0)) / len(x) ** 0.5
    symmetries = nf.find_symmetries(model, squared_error, (x[:4], y[:4]))
    assert len(symmetries) == 2
    for exact in (True, False):
        assert abs(float(noise_of(row, symmetries, exact=exact).trace) - float(squares.mean())) < 4 * error + 1e-9


# What is refused, and the remedy that the sentence names.


def test_batch_statistics_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(nf.CoupledExamplesError, match=r"After model\.eval\(\)"):
        noise_of(Row(net, squared_error, model_table.row("tied weights").batch), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_examples_that_are_coupled_are_refused_in_any_type(dtype: torch.dtype) -> None:
    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = model(batch[0])
        return (scores - scores.mean(0)).square().sum(1)

    row = model_table.row("bfloat16")
    row.model, row.batch = row.model.to(dtype), tuple(one.to(dtype) for one in row.batch)
    with pytest.raises(nf.CoupledExamplesError, match="MicrobatchMeter"):
        noise_of(Row(row.model, contrastive, row.batch), {})


def test_a_teacher_outside_the_model_is_refused_where_the_type_is_changed() -> None:
    teacher, row = mlp(4, 3), model_table.row("ReLU in place")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            goal = teacher(batch[0])
        return (model(batch[0]) - goal).square().sum(1)

    row.loss = loss
    with pytest.raises(nf.LossError, match=r"Make it part of the model .*dtype=torch\.float32"):
        nf.find_symmetries(row.model, loss, row.batch, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"computed in torch\.float32"):
        nf.find_symmetries(row.model, loss, row.batch)
    symmetries = nf.find_symmetries(row.model, loss, row.batch, dtype=torch.float32)
    assert list(symmetries) == ["0 -> 2"]
    assert noise_of(row, symmetries, exact=False).trace > 0


def test_a_reentrant_checkpoint_that_cuts_the_gradient_is_refused() -> None:
    class First(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.middle(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)).relu())

    row = Row(First(), squared_error, model_table.row("checkpoint").batch)
    symmetry = nf.MatrixSymmetry([nf.Axis("inner.weight", 0), nf.Axis("inner.bias", 0)], [nf.Axis("middle.weight", 1)])
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(nf.LossError, match=r"does not depend on \['inner\.weight', 'inner\.bias'\]"),
    ):
        noise_of(row, {"first": symmetry})


# Twins: each mechanism taken away, and the check above that notices.


def outside(self: ModelFunction, params: Any, batch: Any, names: Any, weights: Any) -> Any:
    leaves = {name: params[name].detach().requires_grad_() for name in names or params}
    with torch.enable_grad():
        losses = self({**params, **leaves}, batch)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    return losses.detach(), dict(zip(leaves, gradients, strict=True))


def after(self: ModelFunction, params: Any, batch: Any, action: Any) -> Tensor:
    losses = self(params, batch)
    action(losses)
    return losses


def at_once(self: ModelFunction, params: Any, tensors: Any, rebuild: Any, stacked: Any, randomness: str) -> Any:
    def one(params: Any, *leaves: Tensor) -> Tensor:
        return self(params, rebuild(list(leaves))).sum()

    dims = tuple(0 if mine else None for mine in stacked)
    gradients, values = torch.func.vmap(torch.func.grad_and_value(one), dims)(params, *tensors)
    return values, gradients


def first_place_only(holder: nn.Module, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    return {f"model.{name}": name for name, _ in model.named_parameters()}, {}


def all_places(holder: nn.Module, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    first = _params.aliases(model)
    return {f"model.{name}": first[name] for name, _ in model.named_parameters(remove_duplicate=False)}, {}


def cast_all(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or tensor.dtype)


def unwatched(self: Watch, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
    return func(*args, **(kwargs or {}))


GPT2 = "GPT-2, gradient checkpointing"
# Where, what, what instead, the check that has to fail, the models for which it has to.
TWINS: dict[str, tuple[Any, str, Any, Any, list[str]]] = {
    "backward outside": (
        ModelFunction, "_differentiate", outside, gradients_are_right,
        ["checkpoint", "nested checkpoints", "checkpoint and tied weights", "compiled", GPT2],
    ),
    "backward after": (ModelFunction, "then", after, go_through, ["checkpoint", "batch is a dict"]),
    "vectorised, or not at all": (
        ModelFunction, "_each", at_once, gradients_are_right,
        ["checkpoint", "reentrant checkpoint", "function by hand", "function that reads its layer"],
    ),
    "reentrant unnoticed": (
        _model_function, "is_reentrant", lambda nodes: False, gradients_are_right, ["reentrant checkpoint"],
    ),
    "one place for a tied weight": (
        _model_function, "places_of", first_place_only, gradients_are_right, ["tied weights", "buffers written"],
    ),
    "two places for one module": (
        _model_function, "places_of", all_places, gradients_are_right, ["module under two names"],
    ),
    "the loss has no state": (_model_function, "places_of", first_place_only, go_through, ["loss is a module"]),
    "all types converted": (_params, "in_dtype", cast_all, go_through, ["frozen integers"]),
    "types unwatched": (
        Watch, "__torch_function__", unwatched, gradients_are_right,
        ["bfloat16, loss in float32", "autocast in the model", "always float32", "always bfloat16"],
    ),
    "the tolerance of float32": (
        ModelFunction, "tolerance", TOLERANCES[torch.float32], go_through,
        ["bfloat16", "bfloat16, loss in float32", "autocast around the loss", "Llama in bfloat16"],
    ),
    "the tolerance of float64": (
        _verify.Residual, "precision", property(lambda self: torch.float64, lambda self, value: None), go_through,
        ["always float32", "always bfloat16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("twin", "name"), [(twin, name) for twin, (*_, names) in TWINS.items() for name in names])
def test_a_mechanism_taken_away_is_noticed(monkeypatch: pytest.MonkeyPatch, twin: str, name: str) -> None:
    where, what, instead, check, _ = TWINS[twin]
    row = model_table.row(name)
    monkeypatch.setattr(where, what, instead, raising=False)
    with pytest.raises((AssertionError, RuntimeError, IndexError, UserWarning, nf.NoetherflowError)):
        check(row)


# Other callers that evaluate a model at parameters that are not the model's.


@pytest.mark.parametrize("reentrant", [False, True])
def test_replicas_of_a_checkpointed_model_move_as_those_of_a_plain_model(reentrant: bool) -> None:
    checkpointed, net = Checkpointed(reentrant).double(), Net().double()
    net.load_state_dict(checkpointed.state_dict())
    data = double(model_table.row("checkpoint").batch)
    start = {n: p.detach() * (1 + 0.2 * torch.randn(3, *p.shape).double()) for n, p in net.named_parameters()}
    found, expected = (
        nf.simulate(model, squared_error, data, nf.GradientDescent(lr=0.01), steps=20, start=start, progress=False)
        for model in (checkpointed, net)
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    assert expected.loss[-1].max() < expected.loss[0].min()
    for name, stack in expected.params.items():
        torch.testing.assert_close(found.params[name], stack, rtol=1e-11, atol=1e-13)


def test_a_checkpointed_model_has_the_generators_of_a_plain_model() -> None:
    class Small(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.into, self.out, self.again = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False), again

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(self.into, x, use_reentrant=False) if self.again else self.into(x)
            return self.out(h.relu())

    batch = torch.randn(6, 2).double(), torch.randn(6, 1).double()
    found, expected = (nf.discover_generators(Small(again).double(), squared_error, batch) for again in (True, False))
    assert len(expected.symmetric) == 2
    spans = [one.symmetric.flatten(1).mT @ one.symmetric.flatten(1) for one in (found, expected)]
    torch.testing.assert_close(*spans, rtol=0, atol=1e-9)

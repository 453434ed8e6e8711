"""Noise measured while training: gradients stay what they are, and nothing is left behind."""

import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

import checks
import noetherflow as nf
import oracles
from noetherflow.noise.capture import finish
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.layerwise import LayerwisePass
from test_fast_noise import TIGHT, Recurrent, classify, examples, in_double, large
from zoo import CLASSIC, Animal, regression

ALONG_AXES = [animal for animal in CLASSIC if animal.name != "stacked maps"]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def one_step(model: nn.Module, loss: nf.Loss, batch: Any, symmetries: dict[str, nf.Symmetry]) -> oracles.Statistics:
    """What a meter must say after a single step, from a loop over single examples."""
    return oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], symmetries)


@pytest.mark.parametrize("animal", ALONG_AXES, ids=lambda animal: animal.name)
def test_a_step_is_what_it_would_have_been(animal: Animal) -> None:
    model, loss, batch = in_double(animal.build())
    symmetries = nf.find_symmetries(model, loss, batch)
    loss(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    meter = nf.NoiseMeter(model, symmetries, variances=True)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    # Llama computes its norms in float32 whatever its parameters are.
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if animal.name == "Llama" else {"rtol": 1e-10, "atol": 1e-12}
    for name, one in gradients(model).items():
        if plain[name] is None:
            assert one is None
        else:
            torch.testing.assert_close(one, plain[name], **tolerance)
    before = gradients(model)
    expected = one_step(model, loss, batch, symmetries)
    checks.noise_is(meter.noise, expected, tolerance["rtol"])
    assert meter.noise.variance.keys() == scaled_parameters(symmetries)
    # The same again without training: what is in .grad stays there.
    for some in (symmetries, {}):
        meter = nf.NoiseMeter(model, some)
        with meter.step(batch, train=False):
            loss(model, batch).mean().backward()
        fewer = expected._replace(grams={name: expected.grams[name] for name in some})
        checks.noise_is(meter.noise, fewer, tolerance["rtol"])
    for name, one in gradients(model).items():
        assert one is before[name] is None or torch.equal(one, before[name])


def scaled_parameters(symmetries: dict[str, nf.Symmetry]) -> set[str]:
    """Where variances are kept: the parameters on which scalings and rescalings act."""
    kinds = nf.ScalarSymmetry | nf.DiagonalSymmetry
    return {name for one in symmetries.values() if isinstance(one, kinds) for name in one.names}


def test_a_side_that_is_wrong_is_seen() -> None:
    """The twin of all comparisons with loops: one side doubled, swapped, or of another symmetry."""
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    meter = nf.NoiseMeter(model, symmetries, variances=True)
    with meter.step(batch):
        classify(model, batch).mean().backward()
    noise, expected = meter.noise, one_step(model, classify, batch, symmetries)
    checks.noise_is(noise, expected)
    wrong = [
        {name: nf.Grams(sides.plus, 2 * sides.minus) for name, sides in noise.scatter.items()},
        {name: nf.Grams(2 * sides.plus, sides.minus) for name, sides in noise.scatter.items()},
        {name: nf.Grams(sides.minus, sides.plus) for name, sides in noise.scatter.items()},
    ]
    for scatter in wrong:
        with pytest.raises(AssertionError):
            checks.noise_is(replace(noise, scatter=scatter), expected)
    doubled = {name: 2 * squares for name, squares in noise.square_scatter.items()}
    for changes in ({"square_scatter": doubled}, {"total_scatter": 2 * noise.total_scatter}, {"count": 15}):
        with pytest.raises(AssertionError):
            checks.noise_is(replace(noise, **changes), expected)


@pytest.mark.parametrize(("reduce", "weight"), [("mean", None), ("sum", 1.0), ("third", 1 / 48)])
def test_what_an_example_counts_in_the_loss_is_taken_out(reduce: str, weight: float | None) -> None:
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    expected = one_step(model, classify, batch, symmetries)
    loss = {"mean": Tensor.mean, "sum": Tensor.sum, "third": lambda losses: losses.mean() / 3}[reduce]
    meter, wrong = nf.NoiseMeter(model, symmetries), nf.NoiseMeter(model, symmetries)
    with meter.step(batch, weight=weight):
        loss(classify(model, batch)).backward()
    checks.noise_is(meter.noise, expected)
    with wrong.step(batch, weight=1 / 16 if reduce == "sum" else 1.0):
        loss(classify(model, batch)).backward()
    with pytest.raises(AssertionError):
        checks.noise_is(wrong.noise, expected)


def test_steps_are_centred_by_themselves_and_pooled() -> None:
    model = large()
    batches = [examples(size, seed) for seed, size in enumerate((16, 10, 1, 16))]
    symmetries = nf.find_symmetries(model, classify, batches[0])
    meter = nf.NoiseMeter(model, symmetries, variances=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps = []
    for batch in batches:
        steps.append(oracles.examples_of_step(model, classify, batch))
        optimizer.zero_grad()
        with meter.step(batch):
            classify(model, batch).mean().backward()
        optimizer.step()
    checks.noise_is(meter.noise, oracles.pooled(model, steps, symmetries))
    assert meter.noise.count == 42
    assert all(torch.isfinite(one.net).all() for one in meter.noise.standard_errors.values())
    assert nf.solve_equilibrium(meter.noise, nf.SGD(0.5, 16, 1e-3), model).trace_after > 0
    meter.reset()
    with pytest.raises(nf.EmptyDataError, match="nothing was measured"):
        assert meter.noise


@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_narrow_numbers_stay_within_their_bounds(dtype: torch.dtype, bound: float, variances: bool) -> None:
    model = large().to(dtype)
    batches = [(x.to(dtype), y) for x, y in (examples(64, 1), examples(48, 2))]
    symmetries = nf.find_symmetries(large(), classify, examples(64, 1))
    meter = nf.NoiseMeter(model, symmetries, variances=variances)
    for batch in batches:
        with meter.step(batch):
            classify(model, batch).mean().backward()
    wide = copy.deepcopy(model).double()
    steps = [oracles.examples_of_step(wide, classify, (x.double(), y)) for x, y in batches]
    expected = oracles.pooled(wide, steps, symmetries)
    torch.testing.assert_close(meter.noise.trace, expected.trace, rtol=bound, atol=0)
    for name, sides in expected.grams.items():
        for found, side in zip(meter.noise.grams[name], sides, strict=True):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, side, rtol=bound, atol=bound * side.max().item())
    assert meter.noise.variance.keys() == (scaled_parameters(symmetries) if variances else set())
    for name, variance in meter.noise.variance.items():
        entries = expected.variance[name]
        torch.testing.assert_close(variance, entries, rtol=bound, atol=bound * entries.max().item())


def test_equilibria_need_variances() -> None:
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    meter = nf.NoiseMeter(model, symmetries)
    with meter.step(batch):
        classify(model, batch).mean().backward()
    with pytest.raises(nf.SettingsError, match="variances=True"):
        nf.solve_equilibrium(meter.noise, nf.SGD(0.5, 16, 1e-3), model)


def test_nothing_is_left_behind_whatever_is_raised() -> None:
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    before = {name: (set(vars(module)), module.training) for name, module in model.named_modules()}
    parameters = {name: (set(vars(one)), one._backward_hooks) for name, one in model.named_parameters()}
    meter = nf.NoiseMeter(model, symmetries)

    def broken(where: str) -> None:
        with meter.step(batch):
            value = classify(model, batch).mean()
            if where == "backward":
                value.register_hook(lambda _: 1 / 0)
            if where == "forward":
                raise ZeroDivisionError
            value.backward()

    # Held, so that what were left at them would stay.
    nodes = [get_gradient_edge(one).node for one in model.parameters()]
    for where in ("forward", "backward"):
        with pytest.raises(ZeroDivisionError):
            broken(where)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finish, "arrived", lambda *_: pytest.fail("a hook was left behind"))
            classify(model, batch).mean().backward()
        assert [get_gradient_edge(one).node for one in model.parameters()] == nodes
        assert not _get_current_function_mode_stack()
        assert {name: (set(vars(module)), module.training) for name, module in model.named_modules()} == before
        assert {name: (set(vars(one)), one._backward_hooks) for name, one in model.named_parameters()} == parameters
        assert not any(vars(tensor) for tensor in batch)
    model.zero_grad()
    with meter.step(batch):
        classify(model, batch).mean().backward()
    checks.noise_is(meter.noise, one_step(model, classify, batch, symmetries))


def test_hooks_of_parameters_see_the_whole_gradient() -> None:
    """Those that were there before, where a gradient arrives and after it was added to `.grad`."""
    model, batch = large(), examples(16)
    seen: dict[str, Tensor] = {}

    def double(gradient: Tensor) -> Tensor:
        seen["before"] = gradient.clone()
        return 2 * gradient

    def after(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen["after"] = parameter.grad.clone()

    weight = model[0].weight
    classify(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    weight.register_hook(double)
    weight.register_post_accumulate_grad_hook(after)
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        classify(model, batch).mean().backward()
    expected = plain["0.weight"]
    assert expected is not None
    torch.testing.assert_close(seen["before"], expected, **TIGHT)
    torch.testing.assert_close(seen["after"], 2 * expected, **TIGHT)
    torch.testing.assert_close(gradients(model), plain | {"0.weight": 2 * expected}, **TIGHT)
    checks.noise_is(meter.noise, one_step(large(), classify, batch, {}))


@pytest.mark.parametrize("train", [True, False])
def test_a_parameter_that_was_frozen_since_has_no_gradient(train: bool) -> None:
    model, batch = large(), examples(16)
    meter = nf.NoiseMeter(model, {})
    model[0].weight.requires_grad_(False)
    with meter.step(batch, train=train):
        classify(model, batch).mean().backward()
    assert model[0].weight.grad is None
    checks.noise_is(meter.noise, one_step(model, classify, batch, {}))


@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize("count", [2, 3])
def test_threads_change_nothing(count: int, variances: bool) -> None:
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    found = []
    for threads in (1, count):
        meter = nf.NoiseMeter(model, symmetries, variances=variances)
        torch.set_num_threads(threads)
        try:
            for train in (True, False):
                with meter.step(batch, train=train):
                    classify(model, batch).mean().backward()
        finally:
            torch.set_num_threads(1)
        found.append((meter.noise, gradients(model)))
        model.zero_grad()
    (alone, plain), (shared, other) = found
    torch.testing.assert_close(other, plain, **TIGHT)
    torch.testing.assert_close(shared.scatter, alone.scatter, **TIGHT)
    torch.testing.assert_close(shared.square_scatter, alone.square_scatter, rtol=1e-10, atol=1e-12)


def test_a_step_that_only_measures_calls_no_hooks() -> None:
    model, batch = large(), examples(16)
    model[0].weight.register_hook(lambda _: pytest.fail("there is no gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: pytest.fail("nor anything to add it to"))
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch, train=False):
        classify(model, batch).mean().backward()
    assert all(one is None for one in gradients(model).values())
    checks.noise_is(meter.noise, one_step(large(), classify, batch, {}))


def test_two_backward_passes_are_no_step() -> None:
    """The gradient of an example is the sum of both, which was never there to be squared; `.grad` is right."""
    model, batch = large(), examples(16)
    classify(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    meter = nf.NoiseMeter(model, {})

    def twice() -> None:
        with meter.step(batch):
            for share in (0.25, 0.75):
                (share * classify(model, batch).mean()).backward()

    with pytest.raises(nf.SettingsError, match="second backward pass"):
        twice()
    torch.testing.assert_close(gradients(model), plain, **TIGHT)


def test_what_cannot_be_taken_apart_is_named_and_its_gradient_is_right() -> None:
    model, loss, batch = in_double(regression(Recurrent(), (5, 3), (5, 2)))
    loss(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    meter = nf.NoiseMeter(model, {})
    inner = {name for name, _ in model.named_parameters() if name.startswith("cell")}
    symmetries = {
        "before": nf.ScalarSymmetry(plus=nf.Axis("before.weight", 0)),
        "across": nf.ScalarSymmetry(plus=nf.Axis("before.weight", 0), minus=nf.Axis("cell.weight_ih_l0", 0)),
    }
    expected = one_step(model, loss, batch, symmetries)
    for train in (True, False):
        meter = nf.NoiseMeter(model, symmetries)
        with meter.step(batch, train=train):
            loss(model, batch).mean().backward()
        torch.testing.assert_close(gradients(model), plain, rtol=1e-10, atol=1e-12)
        assert set(meter.unmeasured) == set(meter.noise.unmeasured) == inner
        assert list(meter.noise.grams) == ["before"]
        torch.testing.assert_close(meter.noise.grams["before"], expected.grams["before"], **TIGHT)
        with pytest.raises(nf.SettingsError, match=r"cell\.weight_hh_l0 \(lstm\)"):
            assert meter.noise.trace


def test_coupled_examples_are_refused_with_a_way_out() -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)).double()
    batch = examples(12)
    meter = nf.NoiseMeter(model, {})
    with pytest.raises(nf.CoupledExamplesError, match="MicrobatchMeter"), meter.step(batch):
        pass
    with pytest.raises(nf.CoupledExamplesError, match="MicrobatchMeter"):
        nf.estimate_noise(model, classify, [batch], {})


def test_a_step_without_a_backward_pass_is_a_mistake() -> None:
    model, batch = large(), examples(12)
    meter = nf.NoiseMeter(model, {})
    with pytest.raises(nf.SettingsError, match="inside"), meter.step(batch):
        classify(model, batch).mean()
    with pytest.raises(nf.EmptyDataError, match="no tensor"), meter.step(()):
        pass


def test_a_step_that_overflows_is_left_out_and_counted() -> None:
    model, batch = large(), examples(12)
    meter = nf.NoiseMeter(model, {})
    for scale in (1.0, float("inf")):
        with meter.step(batch):
            (scale * classify(model, batch).mean()).backward()
    assert meter.skipped == 1
    assert torch.isfinite(meter.noise.trace)


def test_a_generator_given_as_a_matrix_is_refused() -> None:
    with pytest.raises(nf.SettingsError, match="estimate_noise"):
        nf.NoiseMeter(nn.Linear(1, 1), {"one": nf.DenseSymmetry(torch.eye(1), ["bias"])})


def test_checkpointed_layers_are_measured() -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = large(), examples(16)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inner = checkpoint(model[:3], batch[0], use_reentrant=False)
        return functional.cross_entropy(model[3:](inner), batch[1], reduction="none")

    loss(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        loss(model, batch).mean().backward()
    torch.testing.assert_close(gradients(model), plain, rtol=1e-10, atol=1e-12)
    exact = nf.estimate_noise(model, classify, [batch], {}, exact=True)
    checks.noise_is(meter.noise, one_step(model, classify, batch, {}))
    fast = nf.estimate_noise(model, loss, [batch], {}, exact=False)
    assert not fast.fallback
    torch.testing.assert_close(fast.trace, exact.trace, **TIGHT)


def test_memory_is_free_without_the_cycle_collector() -> None:
    """Whatever a step holds on to is let go of with its block, or training would take fresh memory at every step."""
    model, batch = large(), examples(16)
    meter = nf.NoiseMeter(model, {})
    gc.collect()
    gc.disable()
    try:
        with meter.step(batch):
            hidden = model[0](batch[0]).contiguous()  # the tensor itself: the step keeps a reference of its own
            seen = weakref.ref(hidden)
            functional.cross_entropy(model[1:](hidden), batch[1]).backward()
        del hidden
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("hooked", [False, True])
def test_no_tensor_outlives_its_step(hooked: bool) -> None:
    """What a step makes of parameters is let go of as well: in training, and where only noise is measured."""
    model, batch = large(), examples(16)
    if hooked:
        model[0].weight.register_hook(lambda gradient: gradient)
    meter = nf.NoiseMeter(model, {})
    counts: list[int] = []

    def count() -> None:
        counts.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))

    def trained() -> None:
        for _ in range(5):
            model.zero_grad()
            with meter.step(batch):
                classify(model, batch).mean().backward()
            count()

    def given() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            count()
            yield batch

    for run in (trained, lambda: nf.estimate_noise(model, classify, given(), {}, exact=False)):
        counts.clear()
        gc.collect()
        gc.disable()
        try:
            run()
        finally:
            gc.enable()
        # One that holds the squares of a step waits until it is put together with others.
        assert counts[4] - counts[3] <= 1, counts


def test_where_examples_are_is_found_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many steps; its twin keeps the answers of the first step."""
    calls = [0]
    ask = Places._answer

    def counted(self: Places, *given: Any) -> Any:
        calls[0] += 1
        return ask(self, *given)

    monkeypatch.setattr(Places, "_answer", counted)
    model, batch = large(), examples(16)

    def asked_in(steps: int, every: int) -> int:
        calls[0] = 0
        meter = nf.NoiseMeter(model, {}, check_every=every)
        for _ in range(steps):
            with meter.step(batch):
                classify(model, batch).mean().backward()
        return calls[0]

    once = asked_in(1, 100)
    assert once > 0
    assert asked_in(5, 100) == once
    assert asked_in(5, 2) == 3 * once


def test_examples_are_compared_again_after_some_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = LayerwisePass.check

    def counted(self: LayerwisePass, *given: Any, where: str, **more: Any) -> None:
        checked.append(where)
        check(self, *given, where=where, **more)

    monkeypatch.setattr(LayerwisePass, "check", counted)
    model, batches = large(), [examples(8, seed) for seed in range(5)]
    noise = nf.estimate_noise(model, classify, batches, {}, exact=False, check_every=2)
    assert checked == ["batch 0", "batch 2", "batch 4"]
    torch.testing.assert_close(noise.trace, nf.estimate_noise(model, classify, batches, {}, exact=True).trace)


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_between_checks_is_positive(every: int) -> None:
    with pytest.raises(nf.SettingsError, match="check_every"):
        nf.NoiseMeter(large(), {}, check_every=every)
    with pytest.raises(nf.SettingsError, match="check_every"):
        nf.estimate_noise(large(), classify, [examples(8)], {}, check_every=every)

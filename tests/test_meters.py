"""Noise measured while training: gradients stay what they are, and nothing is left behind."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

import noetherflow as nf
from noetherflow.noise import passes
from noetherflow.noise.capture import Capture
from test_fast_noise import TIGHT, Recurrent, classify, examples, in_double, large
from zoo import ZOO, Animal, regression

ALONG_AXES = [animal for animal in ZOO if animal.name != "stacked maps"]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


def pooled(parts: list[nf.NoiseMoments]) -> tuple[Tensor, dict[str, Tensor]]:
    """Tr Sigma and the charges' noise from the scatter about each part's own mean, unbiased."""
    freedom = sum(part.count - 1 for part in parts)
    trace = sum(part.total_scatter for part in parts) / freedom
    names = parts[0].scatter
    return trace, {name: sum(part.scatter[name].plus for part in parts) / freedom for name in names}


def assert_measured(noise: nf.NoiseMoments, parts: list[nf.NoiseMoments], **tolerance: float) -> None:
    trace, plus = pooled(parts)
    tolerance = tolerance or TIGHT
    torch.testing.assert_close(noise.trace, trace, **tolerance)
    for name, expected in plus.items():
        torch.testing.assert_close(
            noise.grams[name].plus, expected, rtol=tolerance["rtol"], atol=tolerance["rtol"] * trace.item()
        )


@pytest.mark.parametrize("animal", ALONG_AXES, ids=lambda animal: animal.name)
def test_a_step_is_what_it_would_have_been(animal: Animal) -> None:
    model, loss, batch = in_double(animal.build())
    symmetries = nf.find_symmetries(model, loss, batch)
    loss(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    meter = nf.NoiseMeter(model, symmetries)
    with meter.step(batch):
        loss(model, batch).mean().backward()
    # Llama computes its norms in float32 whatever its parameters are.
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if animal.name == "Llama" else {"rtol": 1e-10, "atol": 1e-12}
    for name, one in gradients(model).items():
        if plain[name] is None:
            assert one is None
        else:
            torch.testing.assert_close(one, plain[name], **tolerance)
    exact = nf.estimate_noise(model, loss, [batch], symmetries, exact=True)
    assert_measured(meter.noise, [exact], **tolerance)
    # The same again without training: what is in .grad stays there.
    before = gradients(model)
    for some in (symmetries, {}):
        meter = nf.NoiseMeter(model, some)
        with meter.step(batch, train=False):
            loss(model, batch).mean().backward()
        assert_measured(
            meter.noise, [replace(exact, scatter={name: exact.scatter[name] for name in some})], **tolerance
        )
    for name, one in gradients(model).items():
        assert one is before[name] is None or torch.equal(one, before[name])


@pytest.mark.parametrize(("reduce", "weight"), [("mean", None), ("sum", 1.0), ("third", 1 / 48)])
def test_what_an_example_counts_in_the_loss_is_taken_out(reduce: str, weight: float | None) -> None:
    model, batch = large(), examples(16)
    symmetries = nf.find_symmetries(model, classify, batch)
    exact = [nf.estimate_noise(model, classify, [batch], symmetries, exact=True)]
    loss = {"mean": Tensor.mean, "sum": Tensor.sum, "third": lambda losses: losses.mean() / 3}[reduce]
    meter, wrong = nf.NoiseMeter(model, symmetries), nf.NoiseMeter(model, symmetries)
    with meter.step(batch, weight=weight):
        loss(classify(model, batch)).backward()
    assert_measured(meter.noise, exact)
    with wrong.step(batch, weight=None if reduce == "sum" else 1.0):
        loss(classify(model, batch)).backward()
    with pytest.raises(AssertionError):
        assert_measured(wrong.noise, exact)


def test_steps_are_centred_by_themselves_and_pooled() -> None:
    model = large()
    batches = [examples(size, seed) for seed, size in enumerate((16, 10, 1, 16))]
    symmetries = nf.find_symmetries(model, classify, batches[0])
    meter = nf.NoiseMeter(model, symmetries, variances=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parts = []
    for batch in batches:
        if len(batch[0]) > 1:
            parts.append(nf.estimate_noise(model, classify, [batch], symmetries, exact=True))
        optimizer.zero_grad()
        with meter.step(batch):
            classify(model, batch).mean().backward()
        optimizer.step()
    assert_measured(meter.noise, parts)
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
    exact = [nf.estimate_noise(model, classify, [one], symmetries, exact=True, dtype=torch.float64) for one in batches]
    assert_measured(meter.noise, exact, rtol=bound, atol=0)
    assert all(one.dtype == torch.float64 for grams in meter.noise.grams.values() for one in grams)
    for name, variance in meter.noise.variance.items():
        expected = sum(part.square_scatter[name] for part in exact) / sum(part.count - 1 for part in exact)
        torch.testing.assert_close(variance, expected, rtol=bound, atol=bound * expected.max().item())


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
            patch.setattr(Capture, "_finish", lambda *_: pytest.fail("a hook was left behind"))
            classify(model, batch).mean().backward()
        assert [get_gradient_edge(one).node for one in model.parameters()] == nodes
        assert not _get_current_function_mode_stack()
        assert {name: (set(vars(module)), module.training) for name, module in model.named_modules()} == before
        assert {name: (set(vars(one)), one._backward_hooks) for name, one in model.named_parameters()} == parameters
        assert not any(vars(tensor) for tensor in batch)
    model.zero_grad()
    with meter.step(batch):
        classify(model, batch).mean().backward()
    assert_measured(meter.noise, [nf.estimate_noise(model, classify, [batch], symmetries, exact=True)])


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
    assert_measured(meter.noise, [nf.estimate_noise(model, classify, [batch], {}, exact=True)])


@pytest.mark.parametrize("train", [True, False])
def test_a_parameter_that_was_frozen_since_has_no_gradient(train: bool) -> None:
    model, batch = large(), examples(16)
    meter = nf.NoiseMeter(model, {})
    model[0].weight.requires_grad_(False)
    with meter.step(batch, train=train):
        classify(model, batch).mean().backward()
    assert model[0].weight.grad is None
    assert_measured(meter.noise, [nf.estimate_noise(model, classify, [batch], {}, exact=True)])


@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize("count", [2, 3])
def test_threads_change_nothing(count: int, variances: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_LOAD", 1)
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
    assert_measured(meter.noise, [nf.estimate_noise(model, classify, [batch], {}, exact=True)])


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
    for train in (True, False):
        with pytest.raises(nf.SettingsError, match=r"cell\.weight_hh_l0 \(lstm\)"), meter.step(batch, train=train):
            loss(model, batch).mean().backward()
        torch.testing.assert_close(gradients(model), plain, rtol=1e-10, atol=1e-12)


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
    assert_measured(meter.noise, [exact])
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

"""Noise between microbatches, those of gradient accumulation and those of ranks."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import checks
import noetherflow as nf
import oracles
from test_fast_noise import classify, examples, large

Batch = tuple[Tensor, ...]


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    return [tuple(part) for part in zip(*(one.split(sizes) for one in batch), strict=True)]


def run_microbatches(meter: nf.MicrobatchMeter, model: nn.Module, parts: list[Batch]) -> None:
    total = sum(len(part[0]) for part in parts)
    with meter.step() as done:
        for part in parts:
            share = len(part[0]) / total
            (share * classify(model, part).mean()).backward()
            done(size=len(part[0]), weight=share)


def test_microbatches_agree_with_single_examples_on_average() -> None:
    """Unbiased: over many draws of a data set's examples, sizes equal or not."""
    model = large()
    data = examples(60)
    symmetries = nf.find_symmetries(model, classify, data)
    exact = nf.estimate_noise(model, classify, [data], symmetries, exact=True)
    generator = torch.Generator().manual_seed(0)
    for sizes in ([4] * 8, [2, 6, 3, 9]):
        meter = nf.MicrobatchMeter(model, symmetries)
        for _ in range(150):
            chosen = torch.randint(60, (sum(sizes),), generator=generator)
            run_microbatches(meter, model, split(tuple(one[chosen] for one in data), sizes))
        torch.testing.assert_close(meter.noise.trace, exact.trace, rtol=0.05, atol=0)
        for name, grams in exact.grams.items():
            errors = meter.noise.standard_errors[name]
            score = (meter.noise.grams[name].plus - grams.plus) / errors.plus
            assert 0.7 < score.square().mean().sqrt() < 1.4


def test_microbatches_of_one_are_the_scatter_of_examples() -> None:
    model, batch = large(), examples(12)
    symmetries = nf.find_symmetries(model, classify, batch)
    (1e9 * classify(model, batch).sum()).backward()  # gradients that were there already do not matter
    meter = nf.MicrobatchMeter(model, symmetries)
    run_microbatches(meter, model, split(batch, [1] * 12))
    checks.noise_is(
        meter.noise,
        oracles.pooled(model, [oracles.examples_of_step(model, classify, batch)], symmetries),
        rtol=1e-8,
    )


def test_every_statistic_of_several_steps() -> None:
    """Microbatches of unequal sizes, at parameters that move, against means over loops of single examples."""
    model = large()
    symmetries = nf.find_symmetries(model, classify, examples(12))
    meter = nf.MicrobatchMeter(model, symmetries, variances=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps = []
    for seed, sizes in enumerate(([5, 3, 4], [2, 6], [1, 1, 1, 7])):
        parts = split(examples(sum(sizes), seed), sizes)
        steps.append(oracles.microbatches_of_step(model, classify, parts))
        optimizer.zero_grad()
        run_microbatches(meter, model, parts)
        optimizer.step()
    expected = oracles.pooled(model, steps, symmetries)
    checks.noise_is(meter.noise, expected)
    assert meter.noise.variance.keys() == {"0.weight", "0.bias", "3.weight", "3.bias", "5.weight"}
    with pytest.raises(AssertionError):
        checks.noise_is(meter.noise, oracles.pooled(model, steps[:2], symmetries))


def test_every_statistic_of_rotations_and_scalings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)).double()
    symmetries = nf.find_symmetries(model, classify, examples(12))
    assert {type(one) for one in symmetries.values()} == {nf.MatrixSymmetry, nf.DiagonalSymmetry}
    both = {"layers": nf.ScalarSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], nf.Axis("1.weight", 0))}
    meters = nf.MicrobatchMeter(model, symmetries | both, variances=True), nf.NoiseMeter(model, symmetries | both)
    parts = split(examples(15), [5, 3, 7])
    run_microbatches(meters[0], model, parts)
    for part in parts:
        with meters[1].step(part):
            classify(model, part).mean().backward()
    steps = [oracles.microbatches_of_step(model, classify, parts)]
    checks.noise_is(meters[0].noise, oracles.pooled(model, steps, symmetries | both))
    steps = [oracles.examples_of_step(model, classify, part) for part in parts]
    checks.noise_is(meters[1].noise, oracles.pooled(model, steps, symmetries | both))


def test_gradients_are_what_they_would_have_been() -> None:
    model, parts = large(), split(examples(12), [5, 3, 4])
    for part in parts:
        classify(model, part).sum().backward()
    plain = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    meter = nf.MicrobatchMeter(model, {})
    with meter.step() as done:
        for part in parts:
            classify(model, part).sum().backward()
            done(size=len(part[0]), weight=len(part[0]))
    torch.testing.assert_close({name: one.grad for name, one in model.named_parameters()}, plain, rtol=0, atol=0)


def test_a_microbatch_alone_says_nothing() -> None:
    model, batch = large(), examples(12)
    meter = nf.MicrobatchMeter(model, {})
    with pytest.raises(nf.SettingsError, match=r"there were 1.*accumulation.*group"):
        run_microbatches(meter, model, [batch])
    with pytest.raises(nf.EmptyDataError):
        assert meter.noise
    with pytest.raises(nf.SettingsError, match="size=0"), meter.step() as done:
        done(size=0)


def test_a_microbatch_without_a_backward_pass_is_a_mistake() -> None:
    model, batch = large(), examples(12)
    meter = nf.MicrobatchMeter(model, {})
    classify(model, batch).mean().backward()
    with pytest.raises(nf.SettingsError, match="no gradient has come"), meter.step() as done:
        done(size=12)
    with meter.step() as done:
        for part in split(batch, [6, 6]):
            classify(model, part).mean().backward()
            done(size=6)
        with pytest.raises(nf.SettingsError, match="no gradient has come"):
            done(size=6)
    assert meter.noise.count == 12


def test_parameters_that_a_microbatch_does_not_reach_have_no_gradient_there() -> None:
    """Nor does it matter whether gradients are sparse, of a forward pass before the block, or of several passes."""
    tables = [nn.Embedding(5, 2, sparse=sparse).double() for sparse in (False, True)]
    unused = nn.Linear(2, 1).double()
    batch = torch.tensor([[0, 1], [1, 1], [3, 0], [4, 2]]), torch.randn(4, 2, dtype=torch.float64)
    noises = []
    for table in tables:
        table.load_state_dict(tables[0].state_dict())
        model = nn.ModuleList([table, unused])
        losses = [(model[0](x).sum(1) - y).square().sum() for x, y in zip(*batch, strict=True)]
        meter = nf.MicrobatchMeter(model, {})
        with meter.step() as done:
            losses[0].backward()
            losses[1].backward()
            done(size=2, weight=2)
            (losses[2] + losses[3] + unused(batch[1][2:]).sum()).backward()
            done(size=2, weight=2)
        noises.append(meter.noise)
    torch.testing.assert_close(noises[0].trace, noises[1].trace, rtol=1e-12, atol=0)
    weight = tables[0].weight
    first, second = (
        sum(
            torch.autograd.grad((functional.embedding(x, weight).sum(1) - y).square().sum(), weight)[0]
            for x, y in zip(*pair, strict=True)
        )
        / 2
        for pair in zip(*(one.split(2) for one in batch), strict=True)
    )
    gap = (first - second).square().sum() + (batch[1][2:].sum(0) / 2).square().sum() + 1.0
    torch.testing.assert_close(noises[0].trace, 2 * 2 / 4 * gap, rtol=1e-12, atol=0)


def test_half_precision_is_added_up_in_single() -> None:
    model = nn.Linear(3, 1, bias=False).bfloat16()
    x = torch.randn(64, 3).bfloat16()
    meter = nf.MicrobatchMeter(model, {})
    with meter.step() as done:
        for one in x:
            model(one).sum().backward()
            done(size=1)
    torch.testing.assert_close(meter.noise.trace, x.double().var(0).sum(), rtol=1e-5, atol=0)


def test_a_step_that_overflows_is_left_out_and_counted() -> None:
    model, parts = large(), split(examples(12), [6, 6])
    meter = nf.MicrobatchMeter(model, {})
    run_microbatches(meter, model, parts)
    before = meter.noise.trace
    for bad in (0, 1):
        with meter.step() as done:
            for index, part in enumerate(parts):
                ((float("inf") if index == bad else 1.0) * classify(model, part).mean()).backward()
                done(size=6)
    assert meter.skipped == 2
    assert torch.equal(meter.noise.trace, before)


def test_nothing_is_left_behind_whatever_is_raised() -> None:
    model, batch = large(), examples(12)
    before = {name: (set(vars(one)), one._backward_hooks) for name, one in model.named_parameters()}
    meter = nf.MicrobatchMeter(model, {})

    seen: list[Any] = []

    def broken() -> None:
        with meter.step() as done:
            seen.append(done.__self__)
            classify(model, batch).mean().backward()
            assert seen[0]._arrived
            raise ZeroDivisionError

    later = classify(model, batch).mean()  # holds on to where gradients go
    with pytest.raises(ZeroDivisionError):
        broken()
    later.backward()
    assert not seen[0]._arrived
    model.zero_grad()
    assert {name: (set(vars(one)), one._backward_hooks) for name, one in model.named_parameters()} == before


def test_memory_is_free_without_the_cycle_collector() -> None:
    """Even while the function that the block gave is kept, as it is until the next step."""
    model, parts = large(), split(examples(12), [6, 6])
    meter = nf.MicrobatchMeter(model, {})
    gc.collect()
    gc.disable()
    try:
        with meter.step() as done:
            for part in parts:
                classify(model, part).mean().backward()
                done(size=6)
            kept = [weakref.ref(one) for one in done.__self__._mean.values()]
            assert all(one() is not None for one in kept)
        assert all(one() is None for one in kept)
    finally:
        gc.enable()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_rank_alone_accumulates(group: dist.ProcessGroup) -> None:
    model, parts = large(), split(examples(12), [5, 7])
    meters = [nf.MicrobatchMeter(model, {}, group=one) for one in (group, None)]
    with pytest.raises(nf.SettingsError, match="there were 1"):
        run_microbatches(meters[0], model, parts[:1])
    for meter in meters:
        run_microbatches(meter, model, parts)
    torch.testing.assert_close(meters[0].noise.trace, meters[1].noise.trace, rtol=1e-12, atol=0)


def test_ranks_that_are_coupled_are_refused(group: dist.ProcessGroup) -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.SyncBatchNorm(6), nn.Linear(6, 5)).double()
    meter = nf.MicrobatchMeter(model, {}, group=group)
    with pytest.raises(nf.CoupledExamplesError, match=r"'1' \(SyncBatchNorm\)"), meter.step():
        pass
    model.eval()
    run_microbatches(meter, model, split(examples(12), [5, 7]))
    assert meter.noise.count == 12

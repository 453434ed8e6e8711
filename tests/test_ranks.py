"""Several ranks measure what a single process measures that has all examples, and training does not notice."""

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import checks
import noetherflow as nf
import oracles
import ranks
import ranks_examples
import ranks_killed
import ranks_run
import ranks_sharded

Batch = tuple[Tensor, ...]
Seen = list[dict[str, dict[str, Any]]]


@contextlib.contextmanager
def started(work: Callable[[int, Path], None], folder: Path, size: int) -> Iterator[Any]:
    """Processes, none of which outlives the block."""
    processes = torch.multiprocessing.spawn(work, (folder,), nprocs=size, join=False)
    try:
        yield processes
    finally:
        for process in processes.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What two ranks have seen, each a process, by kind of meter and model."""
    folder = tmp_path_factory.mktemp("ranks")
    with started(ranks_run.work, folder, 2) as processes:
        deadline = time.monotonic() + 240
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.fixture
def microbatches(seen: Seen) -> list[dict[str, ranks.Seen]]:
    return [rank["microbatches"] for rank in seen]


def assert_is_noise_of(noise: nf.NoiseMoments, parts: list[Batch]) -> None:
    """The statistics, against the definition: every microbatch's gradient, formed and kept."""
    model, symmetries = ranks.build(), ranks.symmetries()
    params = dict(model.named_parameters())
    stack = {name: [] for name in params}
    for part in parts:
        gradients = torch.autograd.grad(ranks.loss(model, part).mean(), list(params.values()))
        for kept, gradient in zip(stack.values(), gradients, strict=True):
            kept.append(gradient)
    sizes = torch.tensor([len(part[0]) for part in parts], dtype=torch.float64)
    centred = {}
    for name, gradients in stack.items():
        stacked = torch.stack(gradients)
        weights = sizes.reshape(-1, *(1,) * (stacked.ndim - 1))
        gap = stacked - (weights * stacked).sum(0) / sizes.sum()
        centred[name] = gap * (weights / (len(parts) - 1)).sqrt()
    trace = torch.stack([one.square().sum() for one in centred.values()]).sum()
    tolerance = {"rtol": 1e-8, "atol": 1e-8 * trace.item()}
    assert noise.count == sizes.sum()
    torch.testing.assert_close(noise.trace, trace, rtol=1e-8, atol=0)
    assert symmetries
    for name, symmetry in symmetries.items():
        torch.testing.assert_close(noise.grams[name], symmetry.grams(centred, batched=True), **tolerance)
    assert noise.variance
    for name, variance in noise.variance.items():
        torch.testing.assert_close(variance, centred[name].square().sum(0), **tolerance)


@pytest.mark.parametrize("case", ranks.CASES)
def test_ranks_are_microbatches_and_training_does_not_notice(case: str, seen: Seen) -> None:
    one, other = (rank["microbatches"][case] for rank in seen)
    assert_is_noise_of(one.noise, [part for own in ranks.parts_of(ranks.CASES[case]) for part in own])
    assert_same_on(one, other)
    for rank in (one, other):
        torch.testing.assert_close(rank.gradients, rank.plain, rtol=1e-12, atol=1e-14)
    if case != "none on one":  # where they were not averaged
        torch.testing.assert_close(one.gradients, other.gradients, rtol=0, atol=0)


def assert_same_on(one: ranks.Seen, other: ranks.Seen) -> None:
    assert (one.noise.count, one.skipped) == (other.noise.count, other.skipped)
    for what in ("trace", "grams", "variance"):
        torch.testing.assert_close(getattr(one.noise, what), getattr(other.noise, what), rtol=0, atol=0)


def test_several_backward_passes_can_be_one_microbatch(microbatches: list[dict[str, ranks.Seen]]) -> None:
    parts = ranks.parts_of(ranks.CASES["accumulated"])
    whole = [tuple(torch.cat(one) for one in zip(*own, strict=True)) for own in parts]
    noise = microbatches[0]["one per rank"].noise
    assert_is_noise_of(noise, whole)
    with pytest.raises(AssertionError):
        assert_is_noise_of(noise, [part for own in parts for part in own])
    torch.testing.assert_close(
        microbatches[0]["one per rank"].gradients,
        microbatches[0]["accumulated"].plain,
        rtol=1e-12,
        atol=1e-14,
    )


def test_what_is_sent_in_pieces_is_the_same(microbatches: list[dict[str, ranks.Seen]]) -> None:
    assert_is_noise_of(
        microbatches[0]["in pieces"].noise,
        [part for own in ranks.parts_of(ranks.CASES["more on one"]) for part in own],
    )
    assert_same_on(*(rank["in pieces"] for rank in microbatches))


def test_gradients_taken_after_they_were_averaged_are_caught(microbatches: list[dict[str, ranks.Seen]]) -> None:
    wrong = microbatches[0]["afterwards"]
    torch.testing.assert_close(wrong.gradients, microbatches[0]["equal"].gradients, rtol=1e-12, atol=1e-14)
    assert wrong.noise.trace < 1e-20 * microbatches[0]["equal"].noise.trace
    with pytest.raises(AssertionError):
        assert_is_noise_of(wrong.noise, [own[0] for own in ranks.parts_of(ranks.CASES["equal"])])


def test_an_overflow_on_one_rank_is_skipped_on_all(microbatches: list[dict[str, ranks.Seen]]) -> None:
    assert [rank["overflow"].skipped for rank in microbatches] == [1, 1]
    assert [rank["equal"].skipped for rank in microbatches] == [0, 0]
    assert_same_on(*(rank["overflow"] for rank in microbatches))
    assert_is_noise_of(microbatches[1]["overflow"].noise, [own[0] for own in ranks.parts_of(ranks.CASES["equal"])])


def together(sizes: list[list[int]]) -> Batch:
    """The examples of all ranks as a batch."""
    parts = [part for own in ranks.parts_of(sizes) for part in own]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def in_one_process(batch: Batch, *, entries: bool = True) -> ranks_examples.Measured:
    return ranks_examples.measured(ranks_examples.one_step(batch), alone=True, wrap=False, entries=entries)


def assert_steps(steps: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], rtol: float) -> None:
    assert len(steps) == len(expected) > 0
    for step, wanted in zip(steps, expected, strict=True):
        assert step.keys() == wanted.keys()
        for name, value in wanted.items():
            # A squared norm is a difference: its rounding is that of the squared length of the mean gradient.
            terms = wanted[name.replace("norm_sq", "trace").replace("norm", "trace")] / wanted["examples"]
            size = value.abs() + terms if "norm" in name else value.abs()
            torch.testing.assert_close(step[name], value, rtol=rtol, atol=rtol * size.max().item())


@pytest.mark.parametrize("case", ranks_examples.SIZES)
def test_examples_of_ranks_are_those_of_a_single_process(case: str, seen: Seen) -> None:
    batch = together(ranks_examples.SIZES[case])
    alone = in_one_process(batch)
    expected = oracles.pooled(
        ranks.build(), [oracles.examples_of_step(ranks.build(), ranks.loss, batch)], ranks.symmetries()
    )
    for rank in seen:
        for name in (case, f"{case}, only measured"):
            one = rank["examples"][name]
            checks.noise_is(one.noise, expected)
            assert_steps(one.steps, alone.steps, 1e-12)
            assert_steps(one.steps, seen[0]["examples"][case].steps, 0 if name == case else 1e-12)
        assert not rank["examples"][f"{case}, only measured"].gradients
    # The gradient that DistributedDataParallel leaves is the mean over ranks.
    model = ranks.build()
    for (part,) in ranks.parts_of(ranks_examples.SIZES[case]):
        (ranks.loss(model, part).mean() / 2).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(seen[1]["examples"][case].gradients, gradients, rtol=1e-12, atol=1e-14)


def test_the_mean_over_ranks_is_another_mean_if_sizes_differ(seen: Seen) -> None:
    """Twins: the squares of the gradient that was averaged, and each rank for itself."""
    one = seen[0]["examples"]["unequal"]
    averaged = sum(gradient.square().sum() for gradient in one.gradients.values())
    squares = one.steps[0]["norm_sq"].sum() + one.steps[0]["trace"].sum() / one.steps[0]["examples"]
    assert abs(averaged / squares - 1) > 1e-3
    with pytest.raises(AssertionError):
        assert_steps(seen[0]["examples"]["each for itself"].steps, seen[0]["examples"]["clipped"].steps, 1e-2)


def test_a_rank_without_a_group_measures_its_examples(seen: Seen) -> None:
    """Also of vectors, whose gradients become .grad, which is averaged inside the block."""
    for rank, ((batch,), there) in enumerate(zip(ranks.parts_of(ranks_examples.SIZES["unequal"]), seen, strict=True)):
        assert_steps(there["examples"]["each for itself"].steps, in_one_process(batch, entries=False).steps, 1e-12)
        assert there["examples"]["each for itself"].steps[0]["examples"] == (3, 8)[rank]


def test_gradients_may_be_changed_inside_the_block(seen: Seen) -> None:
    alone = in_one_process(together(ranks_examples.SIZES["unequal"]), entries=False)
    for rank in seen:
        assert_steps(rank["examples"]["clipped"].steps, alone.steps, 1e-12)
        torch.testing.assert_close(
            {name: 100 * gradient for name, gradient in rank["examples"]["clipped"].gradients.items()},
            rank["examples"]["unequal"].gradients,
        )


def test_ranks_in_single_precision(seen: Seen) -> None:
    alone = in_one_process(together(ranks_examples.SIZES["unequal"]))
    for rank in seen:
        assert_steps(rank["examples"]["in single precision"].steps, alone.steps, 1e-6)


def test_every_step_of_accumulation_is_measured_whether_ranks_are_averaged_or_not(seen: Seen) -> None:
    first, second = (together([[a], [b]]) for a, b in ((2, 5), (4, 3)))
    parts = ranks.parts_of([[2, 4], [5, 3]])
    batches = [tuple(torch.cat(both) for both in zip(*(own[k] for own in parts), strict=True)) for k in (0, 1)]
    assert len(first[0]) == len(second[0]) == 7
    steps = [step for batch in batches for step in in_one_process(batch).steps]
    expected = oracles.pooled(
        ranks.build(),
        [oracles.examples_of_step(ranks.build(), ranks.loss, batch) for batch in batches],
        ranks.symmetries(),
    )
    for rank in seen:
        assert_steps(rank["examples"]["accumulated"].steps, steps, 1e-12)
        checks.noise_is(rank["examples"]["accumulated"].noise, expected)


def test_examples_that_overflow_on_a_rank_are_skipped_on_all(seen: Seen) -> None:
    for rank in seen:
        one = rank["examples"]["overflow"]
        assert one.skipped == 1
        assert_steps(one.steps, rank["examples"]["unequal"].steps, 1e-12)


def test_a_step_that_a_rank_refuses_is_refused_on_all(seen: Seen) -> None:
    first, second = (rank["examples"]["refused"] for rank in seen)
    assert "could not be measured on rank 1" in first.error
    assert second.error.startswith("EmptyDataError: the batch holds no tensor")
    torch.testing.assert_close(first.gradients, seen[0]["examples"]["unequal"].gradients, rtol=1e-12, atol=1e-14)


def test_a_parameter_that_is_not_measured_on_a_rank_is_not_measured_on_any(seen: Seen) -> None:
    first, second = (rank["examples"]["recurrent on one"] for rank in seen)
    assert (
        first.unmeasured.keys()
        == second.unmeasured.keys()
        == {f"second.{kind}_{where}_l0" for kind in ("weight", "bias") for where in ("ih", "hh")}
    )
    assert "on another rank" in first.unmeasured["second.weight_ih_l0"]
    assert second.unmeasured["second.weight_ih_l0"] == "rnn_tanh"


def test_ranks_with_different_parameters_are_refused(seen: Seen) -> None:
    for rank in seen:
        assert "rank 1 trains other parameters" in rank["examples"]["stages"].error


def sharded_in_one_process(sizes: list[list[int]]) -> ranks_sharded.Sharded:
    """Two steps of training with all microbatches, each rank of which counts half."""
    model = ranks_sharded.Tied()
    meter = nf.MicrobatchMeter(model, ranks_sharded.symmetries(), variances=True, weighted=True)
    steps = ranks_examples.observed(meter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with meter.step(weights=ranks_examples.weights(meter)) as done:
            for own in ranks.parts_of(sizes):
                for part in own:
                    share = len(part[0]) / sum(len(x) for x, _ in own) / 2
                    (share * ranks_sharded.loss(model, part).mean()).backward()
                    done(size=len(part[0]), weight=share)
        optimizer.step()
    shards = {name: one.detach() for name, one in model.named_parameters()}
    return ranks_sharded.Sharded(meter.noise, steps, shards, shards)


EXACT = [
    (sizes, f"{sizes}, {nested=}, {reshard=}")
    for sizes in ranks_sharded.SIZES
    for nested in (False, True)
    for reshard in ranks_sharded.RESHARDS
]
EXACT += [("accumulated", name) for name in ("replicated", "mesh (1, 2)", "mesh (2, 1)")]


@pytest.mark.parametrize(("sizes", "case"), EXACT)
def test_a_sharded_model_is_measured_as_a_complete_model(sizes: str, case: str, seen: Seen) -> None:
    expected = sharded_in_one_process(ranks_sharded.SIZES[sizes])
    assert expected.noise.variance
    for rank in seen:
        one = rank["sharded"][case]
        assert_steps(one.steps, expected.steps, 1e-11)
        assert_same_noise(one.noise, expected.noise, 1e-11)
        assert_steps(one.steps, seen[0]["sharded"][case].steps, 0)
        torch.testing.assert_close(one.shards, one.plain, rtol=0, atol=0)


def assert_same_noise(noise: nf.NoiseMoments, expected: nf.NoiseMoments, rtol: float) -> None:
    assert noise.count == expected.count
    for what in ("trace", "grams", "variance"):
        for a, b in zip(*(flat(getattr(one, what)) for one in (noise, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def flat(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def test_shards_in_single_and_in_mixed_precision(seen: Seen) -> None:
    expected = sharded_in_one_process(ranks_sharded.SIZES["accumulated"])
    for rank in seen:
        single, mixed = (rank["sharded"][f"{kind} precision"] for kind in ("single", "mixed"))
        assert_steps(single.steps[:1], expected.steps[:1], 1e-6)
        assert_steps(mixed.steps[:1], expected.steps[:1], 0.1)
        with pytest.raises(AssertionError):
            assert_steps(mixed.steps[:1], expected.steps[:1], 1e-4)  # gradients have eight bits
        for one in (single, mixed):
            torch.testing.assert_close(one.shards, one.plain, rtol=0, atol=0)


def test_one_microbatch_more_is_noticed(seen: Seen) -> None:
    wrong = sharded_in_one_process([[2, 3], [5]])
    with pytest.raises(AssertionError):
        assert_steps(seen[0]["sharded"]["replicated"].steps, wrong.steps, 1e-2)


def test_the_noise_scale_of_a_sharded_model_under_adamw(seen: Seen) -> None:
    """In the metric of an optimizer whose state is sharded; every rank logs the same numbers."""
    for rank in seen:
        replicated, sharded = (rank["sharded"][f"watched, {in_shards=}"] for in_shards in (False, True))
        assert sharded == pytest.approx(replicated, rel=1e-9, nan_ok=True)
        assert sharded == pytest.approx(seen[0]["sharded"]["watched, in_shards=True"], rel=0, abs=0, nan_ok=True)
        assert "noise/scale_preconditioned" in sharded
        assert sharded["noise/trace"] > 0


@pytest.mark.parametrize(
    ("case", "sentence"),
    {
        "tensor parallel": r"'0.weight' is a DTensor .*mesh \('tp',\) of 2 ranks.*tensor parallelism",
        "tensor parallel and sharded": r"'0.weight' is a DTensor .*\('dp', 'tp'\)",
        "another group": r"over a mesh of 2 ranks, and the group has 1 ranks",
        "each for itself": r"^$",
        "flat": r"FullyShardedDataParallel, which joins .*fully_shard",
        "examples, flat": r"FullyShardedDataParallel, which joins",
        "examples": r"parameters of the model are sharded.*Use MicrobatchMeter",
        "forward pass outside": r"were not seen .*\['1.weight', '1.bias'\].*inside",
        "a parameter that is ignored": r"were not seen .*\['2.weight'\]",
    }.items(),
)
def test_what_cannot_be_measured_is_refused_on_every_rank(case: str, sentence: str, seen: Seen) -> None:
    for rank in seen:
        assert re.search(sentence, rank["sharded"]["refusals"][case]), rank["sharded"]["refusals"][case]


def test_a_rank_that_is_late_or_killed_ends_the_step_of_all_and_is_named(tmp_path: Path) -> None:
    """No survivor waits for longer than the timeout of the group; rank 0 of the group says who is missing."""
    with started(ranks_killed.work, tmp_path, 3) as processes:
        for process in processes.processes:
            process.join(120)
        codes = [process.exitcode for process in processes.processes]
    assert codes == [0, -signal.SIGKILL, 0]
    first, last = (pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 2))
    for one in (first, last):
        assert not one["all there"].error
        assert one["killed"].seconds < ranks_killed.PATIENCE + 2
    assert "Ranks 1 failed to pass" in first["killed"].error
    assert "rank 0 of the 3 ranks" in first["killed"].error
    assert "rank 2 of the 3 ranks" in last["killed"].error
    assert "rank 0" in last["killed"].error
    assert "Ranks 1 failed to pass" in first["late"].error  # the second of two
    assert first["late"].seconds < ranks_killed.SHORT + 1
    assert last["late"].error


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(ranks_run.__file__).with_name("ranks_torchrun.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def test_torchrun_logs_the_numbers_of_a_single_process() -> None:
    done = torchrun()
    assert done.returncode == 0, done.stderr
    traces = [float.fromhex(trace) for trace in re.findall(r"trace (\S+)", done.stdout)]
    assert len(traces) == 2, done.stdout + done.stderr
    assert traces[0] == traces[1]
    model, batch = ranks.build(), together([[6], [6]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        with watch.step(batch):
            ranks.loss(model, batch).mean().backward()
        optimizer.step()
    assert traces[0] == pytest.approx(watch.metrics()["noise/trace"], rel=1e-12)


def test_torchrun_ends_and_names_the_rank_that_was_killed() -> None:
    done = torchrun("killed")
    assert done.returncode != 0
    assert re.search(r"Root Cause.*rank *: 1 .*SIGKILL", done.stderr, re.DOTALL), done.stderr

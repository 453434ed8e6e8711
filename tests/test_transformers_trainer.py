"""The Trainer of Hugging Face, watched: the figures of a plain loop, and training as it would have been."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import trainer_runs as runs
from noetherflow.integrations.transformers import NoiseCallback
from trainer_ranks import metrics_of

EVERY_STEP: dict[str, Any] = {"every": 1, "window": float("inf")}


def gradients(model: nn.Module, losses: list[Tensor]) -> Tensor:
    """The gradient of each loss, shape (len(losses), number of entries)."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])


def coefficients(window: list[dict[str, Tensor]], *, of_step: bool) -> list[Tensor]:
    """What each token's loss counts in the loss of the step, by microbatch, shape (B, 1)."""
    tokens = [(batch["labels"][:, 1:] != -100).sum(1, keepdim=True).double() for batch in window]
    total = sum(float(count.sum()) for count in tokens)
    if of_step:
        return [torch.full_like(count, 1 / total) for count in tokens]
    return [1 / (count * len(count) * len(window)) for count in tokens]


def truth(model: nn.Module, window: list[dict[str, Tensor]], *, of_step: bool, between: str) -> tuple[float, float]:
    """Tr Sigma and |G|^2 of a step, from the gradients of single examples."""
    scores = getattr(model, "inner", model)
    examples, sizes = [], [len(batch["labels"]) for batch in window]
    for batch, coefficient in zip(window, coefficients(window, of_step=of_step), strict=True):
        logits = scores(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        factor = sum(sizes) if of_step else len(window) * len(batch["labels"])
        losses = (runs.by_token(logits, batch["labels"]) * coefficient * factor).sum(1)
        examples.append(gradients(model, list(losses)))
    points = examples[0]
    weights = torch.ones(len(points), dtype=torch.float64)
    if between == "microbatches":
        points, weights = torch.stack([rows.mean(0) for rows in examples]), torch.tensor(sizes).double()
    mean = (weights / weights.sum()) @ points
    trace = float((weights * (points - mean).square().sum(1)).sum() / (len(points) - 1))
    return trace, float(mean.square().sum()) - trace / float(weights.sum())


@pytest.mark.parametrize("between", ["examples", "microbatches"])
@pytest.mark.parametrize("of_step", [True, False], ids=["mean of the step", "mean of the batch"])
def test_every_step_is_that_of_single_examples_also_at_the_end_of_an_epoch(
    of_step: bool, between: str, tmp_path: Path
) -> None:
    # Windows of 4, of 2 microbatches: the last of the epoch has 8 + 3 examples. No step moves the parameters.
    data = runs.rows(43, padded=True)
    model = (runs.gpt2() if of_step else runs.MeanOfBatch()).double()
    loss = {"compute_loss_func": runs.next_token} if of_step else {}
    options = {"learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": 4, **loss}
    run, _ = runs.watched_run(model, tmp_path, data, watched=EVERY_STEP | {"between": between}, **options)
    both = zip(range(2), runs.windows(data, 4), strict=False)
    expected = [truth(model, window, of_step=of_step, between=between) for _, window in both]
    for steps, entry in enumerate(runs.logged(run), 1):
        trace, norm_sq = torch.tensor(expected[:steps], dtype=torch.float64).mean(0).tolist()
        assert entry["noise/trace"] == pytest.approx(trace, rel=1e-9)
        assert entry["grad/norm_sq_unbiased"] == pytest.approx(norm_sq, rel=1e-9)
    # Both windows differ, and so does each convention from the other.
    other = truth(model, next(runs.windows(data, 4)), of_step=not of_step, between=between)
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-2)
    assert expected[0][0] != pytest.approx(other[0], rel=1e-3)


def lora() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(runs.llama(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "GPT-2": (runs.gpt2, {}),
    "Llama, accumulated": (runs.llama, {"gradient_accumulation_steps": 4}),
    "clipped": (runs.gpt2, {"max_grad_norm": 1e-3, "gradient_accumulation_steps": 4}),
    "bf16": (runs.llama, {"bf16": True}),
    "LoRA": (lora, {"gradient_accumulation_steps": 4}),
    "checkpoints": (runs.llama, {"activation_checkpointing": True}),
    "label smoothing": (runs.gpt2, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 4}),
    "loss outside": (runs.gpt2, {"compute_loss_func": runs.next_token}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", CASES)
def test_the_figures_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    data = runs.rows(padded=True)
    run, noise = runs.watched_run(make(), tmp_path, data, **options)
    expected = runs.by_hand(make(), tmp_path, data, {"every": 2}, **options)
    assert len(expected) == 6
    for entry, numbers in zip(runs.logged(run), expected, strict=True):
        assert entry == pytest.approx(numbers, rel=1e-6, abs=1e-12)
    assert noise.watch.preconditioned is not None
    assert not noise.watch.unmeasured
    # Other settings give other figures.
    assert runs.logged(runs.watched_run(make(), tmp_path, data, watched={"every": 3}, **options)[0])[-1] != (
        pytest.approx(expected[-1], rel=1e-2)
    )


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_training_is_what_it_is_without_the_callback(between: str, tmp_path: Path) -> None:
    # Dropout draws the numbers that it would have drawn.
    model = runs.gpt2(dropout=0.1)
    options = {"gradient_accumulation_steps": 2}
    plain = runs.trainer(copy.deepcopy(model), tmp_path, **options)
    plain.train()
    run, _ = runs.watched_run(model, tmp_path, watched={"every": 2, "between": between}, **options)
    for name, parameter in run.model.named_parameters():
        # Between examples, gradients are added up in another order.
        close = 0.0 if between == "microbatches" else 1e-5
        torch.testing.assert_close(parameter, plain.model.get_parameter(name), rtol=close, atol=close)
    rest = [{k: v for k, v in entry.items() if k in ("loss", "step", "epoch")} for entry in run.state.log_history]
    for entry, before in zip(rest, plain.state.log_history, strict=True):
        assert entry == pytest.approx({key: before[key] for key in entry}, rel=1e-5)


def test_a_gradient_scaler_leaves_the_figures_as_they_are(tmp_path: Path) -> None:
    entries = []
    for factor in (None, 1024.0):
        run = runs.trainer(runs.gpt2(), tmp_path, max_grad_norm=0.0)
        NoiseCallback(every=2).attach(run)
        if factor is not None:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        run.train()
        entries.append(runs.logged(run)[-1])
    assert entries[0] == pytest.approx(entries[1], rel=1e-5)


def on_two_ranks(folder: Path) -> list[Any]:
    """What each rank of a run in DistributedDataParallel has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("trainer_ranks.py")), str(folder)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    for rank in ranks:
        rank.communicate(timeout=170)
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]


def test_two_ranks_have_the_figures_of_a_process_with_all_microbatches(tmp_path: Path) -> None:
    (first, first_compared), (second, second_compared) = on_two_ranks(tmp_path)
    # Between examples, the first microbatches of both ranks together are the first microbatch of twice their size.
    twice = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2 * runs.BATCH}
    four = {"gradient_accumulation_steps": 4}
    for measured, between, options in ((first, "examples", twice), (first_compared, "microbatches", four)):
        metrics, weights = metrics_of(tmp_path, between, **options)
        assert measured[0] == pytest.approx(metrics, rel=1e-9, abs=1e-12)
        assert measured[1] == pytest.approx(weights, rel=1e-9)
    assert first_compared == second_compared
    assert first == second

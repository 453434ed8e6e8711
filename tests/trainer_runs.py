"""Runs of the Trainer of Hugging Face on tiny models, and the same steps written out by hand."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

import noetherflow as nf
from noetherflow.integrations.transformers import NoiseCallback

VOCAB, LENGTH, BATCH = 17, 6, 8
Rows = list[dict[str, Tensor]]
Metrics = dict[str, float]


def gpt2(dropout: float = 0.0) -> nn.Module:
    """A GPT-2, whose embedding is tied."""
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, bos_token_id=1, eos_token_id=2))
    # Transformers does not see from the name of this class that the loss is that of the next token: it would count the
    # first token of a sequence as a target, too.
    model.loss_type = "ForCausalLM"
    return model


def llama() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


@final
class MeanOfBatch(nn.Module):
    """A model that knows nothing of the other microbatches: the Trainer divides its loss by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": by_token(scores, labels).sum(1).div((labels[:, 1:] != -100).sum(1)).mean()}


def by_token(scores: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(scores[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)


def next_token(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss outside of the model, in its precision."""
    return by_token(outputs["logits"], labels).sum() / num_items_in_batch


def rows(count: int = 96, *, padded: bool = False) -> Rows:
    """Sequences of tokens; if they are padded, with lengths from 3 to 6."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (count, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (count,), generator=generator) if padded else torch.tensor([LENGTH] * count)
    mask = torch.arange(LENGTH) < lengths[:, None]
    columns = {"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}
    return [{name: column[index] for name, column in columns.items()} for index in range(count)]


def trainer(model: nn.Module, folder: Path, data: Rows | None = None, **options: Any) -> transformers.Trainer:
    """A Trainer that takes the rows in order."""
    others = {name: options.pop(name) for name in ("callbacks", "compute_loss_func", "eval_dataset") if name in options}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**settings | options)
    return transformers.Trainer(model, arguments, train_dataset=rows() if data is None else data, **others)


def logged(run: transformers.Trainer) -> list[Metrics]:
    """What `trainer.state.log_history` has of ours, by step of the optimizer."""
    return [ours(entry) for entry in run.state.log_history if "loss" in entry]


def ours(entry: Metrics) -> Metrics:
    return {name: value for name, value in entry.items() if name.startswith(("noise/", "grad/", "charge/"))}


def windows(data: Rows, accumulation: int) -> Iterator[list[dict[str, Tensor]]]:
    """The microbatches of each step of the optimizer, for ever."""
    while True:
        batches = [default_collate(data[at : at + BATCH]) for at in range(0, len(data), BATCH)]
        yield from (batches[at : at + accumulation] for at in range(0, len(batches), accumulation))


def by_hand(model: nn.Module, folder: Path, data: Rows, watched: dict[str, Any], **options: Any) -> list[Metrics]:
    """The metrics after each step of a plain loop, with the losses and the optimizer of a Trainer that is never run."""
    options = dict(options)
    steps, k = options.get("max_steps", 6), options.get("gradient_accumulation_steps", 1)
    cast: Callable[[], Any] = contextlib.nullcontext
    if options.pop("bf16", False):
        cast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    if options.pop("activation_checkpointing", False):
        model.activation_checkpointing_enable()  # type: ignore[operator]
    never = trainer(model, folder, data, **options)
    never.create_optimizer_and_scheduler(steps)
    watch = nf.NoiseScale(model, optimizer=never.optimizer, **watched)
    metrics = []
    model.train()
    for _, window in zip(range(steps), windows(data, k), strict=False):
        count = sum(len(batch["input_ids"]) for batch in window)
        items = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in window]).sum()
        for number, batch in enumerate(window):
            block = contextlib.nullcontext() if number else watch.step(batch, weight=1 / count)
            with block:
                with cast():
                    loss = never.compute_loss(model, dict(batch), num_items_in_batch=items)
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.get("max_grad_norm", 1.0))
        never.optimizer.step()
        never.lr_scheduler.step()
        model.zero_grad()
        metrics.append(watch.metrics(layers=False))
    return metrics


def watched_run(model: nn.Module, folder: Path, data: Rows | None = None, **options: Any) -> tuple[Any, NoiseCallback]:
    """A Trainer that has trained a copy of a model, and its callback; `watched` has the settings of the callback."""
    watched = options.pop("watched", {"every": 2})
    run = trainer(copy.deepcopy(model), folder, data, **options)
    noise = NoiseCallback(**watched).attach(run)
    run.train()
    return run, noise

"""F12: a character-level GPT-2 of Hugging Face, under AdamW, on text from a small grammar."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow._extras import require
from noetherflow._types import Batch
from noetherflow.paper.f12_measured import Measured
from noetherflow.paper.f12_networks import Task, Trainer, compare, trace_by_signs, train
from noetherflow.paper.f12_settings import Config

require("paper", "transformers", purpose="the GPT-2 of figure F12")

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

ALPHABET = ". abcdefghijklmnopqrstuvwxyz"
WORDS = (
    ("the cat", "a dog", "the old king", "my friend", "a small bird", "the queen"),
    (" sees ", " follows ", " never finds ", " paints ", " dreams of ", " writes to "),
    ("the moon", "a house", "the green river", "many letters", "its shadow", "a king"),
    (". ",),
)
# Characters of a window, and of the text from which windows are drawn.
WINDOW, TEXT = 16, 200_000
# Windows that a forecast sees, and batches.
_WINDOWS, _BATCHES = 128, 8


def network(seed: int) -> nn.Module:
    """GPT-2 with a layer, two heads and 16 features, without dropout, 4,016 parameters in float64."""
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": len(ALPHABET), "n_positions": WINDOW, "n_embd": 16, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    # Fused attention has no second derivative.
    settings: dict[str, Any] = {**none, **sizes, **tokens, "use_cache": False, "attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**settings)).double()


def text(generator: torch.Generator) -> Tensor:
    """Sentences of words drawn at random, a number for every character, shape (TEXT,)."""
    parts: list[str] = []
    length = 0
    while length < TEXT:
        for words in WORDS:
            parts.append(words[int(torch.randint(len(words), (), generator=generator))])
            length += len(parts[-1])
    return torch.tensor([ALPHABET.index(character) for character in "".join(parts)[:TEXT]])


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Cross-entropy of the next character, averaged over a window: shape (B,)."""
    (tokens,) = batch
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def of_gpt2(config: Config) -> list[Measured]:
    """GPT-2 trained on from where it still learns, and from rest: after a learning rate that decays to zero."""
    seed = 1000 * (config.seed + 1)
    windows = text(torch.Generator().manual_seed(seed)).unfold(0, WINDOW, 1)

    def sample(count: int, generator: torch.Generator) -> tuple[Tensor]:
        return (windows[torch.randint(len(windows), (count,), generator=generator)],)

    def given(seed: int) -> list[Batch]:
        return list(zip(sample(_WINDOWS, torch.Generator().manual_seed(seed))[0].chunk(_BATCHES), strict=True))

    def trace(model: nn.Module, seed: int) -> float:
        batch = sample(_WINDOWS, torch.Generator().manual_seed(seed))
        return trace_by_signs(model, loss, batch, config.vectors // 2, seed)

    task = Task(network, loss, sample, given, trace)
    decay, size = config.gpt2_decay, config.gpt2_batch_size
    learner = Trainer(torch.optim.AdamW, config.gpt2_learn_lr, decay, size)
    trainer = Trainer(torch.optim.AdamW, config.gpt2_lr, decay, size)

    def cooling(step: int) -> float:
        part = (step - config.gpt2_learn) / (config.gpt2_rest - config.gpt2_learn)
        return 1.0 if part < 0 else (1 + math.cos(math.pi * part)) / 2

    fresh = task.starts(range(seed, seed + config.seeds))
    generator = torch.Generator().manual_seed(seed + 7)
    early, rest = train(task, fresh, learner, config.gpt2_rest, generator, record=[config.gpt2_learn], schedule=cooling)
    run = partial(compare, task=task, trainer=trainer, steps=config.gpt2_steps, records=config.records // 3, seed=seed)
    return [run("GPT-2, learning", start=early), run("GPT-2, at rest", start=rest)]

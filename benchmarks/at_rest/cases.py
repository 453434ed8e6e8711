"""The models, their data and the settings with which SGD trains them."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import noetherflow as nf
from noetherflow.paper import f2_problem

EXAMPLES = Path(__file__).parents[2] / "examples"
ALPHABET = ". abcdefghijklmnopqrstuvwxyz"
WINDOW = 32
# Training ends when the mean of the loss of all examples over the last `PATIENCE` epochs is less than this share below
# the mean over the `PATIENCE` epochs before. The loss after a single epoch fluctuates.
FLAT, PATIENCE = 0.01, 10


class Case(NamedTuple):
    """A model with its data, and how long SGD may take.

    Args:
        model: The model, float64.
        loss: One loss for each example.
        data: Tensors of the same length: a batch is a selection of rows.
        sgd: The settings, for batches that are drawn with replacement.
        steps: The budget of SGD.
        epochs: The most epochs of training until the loss is flat.
    """

    model: nn.Module
    loss: nf.Loss
    data: tuple[Tensor, ...]
    sgd: nf.SGD
    steps: int
    epochs: int

    @property
    def size(self) -> int:
        return len(self.data[0])

    def batches(self) -> list[tuple[Tensor, ...]]:
        """All examples, in order."""
        return list(zip(*(tensor.split(256) for tensor in self.data), strict=True))

    def mean_loss(self) -> float:
        """The mean loss over all examples, without weight decay."""
        with torch.no_grad():
            return float(torch.cat([self.loss(self.model, batch) for batch in self.batches()]).mean())


class Stepper:
    """SGD on a model: batches drawn with replacement, the same for equal seeds."""

    def __init__(self, case: Case, seed: int) -> None:
        sgd = case.sgd
        self._case, self._generator = case, torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.SGD(
            case.model.parameters(), sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay
        )

    def run(self, steps: int) -> None:
        case, optimizer = self._case, self._optimizer
        for _ in range(steps):
            rows = torch.randint(case.size, (case.sgd.batch_size,), generator=self._generator)
            optimizer.zero_grad()
            case.loss(case.model, tuple(tensor[rows] for tensor in case.data)).mean().backward()
            optimizer.step()

    def operations(self) -> int:
        """Floating-point operations of a step, which is taken."""
        with FlopCounterMode(display=False) as counter:
            self.run(1)
        return counter.get_total_flops()


class Training(NamedTuple):
    """Epochs of training, the loss before and after, and whether the loss was flat at the end."""

    epochs: int
    loss_before: float
    loss_after: float
    flat: bool


def train(case: Case, seed: int) -> Training:
    """Train the model with the settings of the case until its loss is flat."""
    stepper, losses = Stepper(case, seed), [case.mean_loss()]
    flat = False
    while not flat and len(losses) <= case.epochs:
        stepper.run(-(-case.size // case.sgd.batch_size))
        losses.append(case.mean_loss())
        flat = is_flat(losses)
    return Training(len(losses) - 1, losses[0], losses[-1], flat)


def is_flat(losses: list[float]) -> bool:
    """Whether training has ended, by the losses before training and after every epoch."""
    if len(losses) <= 2 * PATIENCE:
        return False
    before, last = sum(losses[-2 * PATIENCE : -PATIENCE]), sum(losses[-PATIENCE:])
    return before - last < FLAT * before


def factorisation(steps: int, epochs: int, seed: int) -> Case:
    """F2 from the Kaiming initialisation, on examples that are drawn once."""
    config = f2_problem.Config()
    generator = torch.Generator().manual_seed(seed)
    problem = f2_problem.make_problem(config, generator)
    start = f2_problem.starts(config, problem, generator)
    replica = config.replicas_of(f2_problem.INITS.index("Kaiming")).start
    model = f2_problem.network(config)
    model.load_state_dict({name: stack[replica] for name, stack in start.items()})
    sgd = nf.SGD(config.lr, config.batch_size)
    return Case(model, f2_problem.loss, problem.sample(2048, generator), sgd, steps, epochs)


def digits(steps: int, epochs: int, seed: int) -> Case:
    """examples/digits_mlp.py as it is built there, which includes ten epochs of training."""
    model, loss, loader, sgd = example("digits_mlp").build()
    drawn = dataclasses.replace(sgd, replacement=True, dataset_size=None)
    return Case(model, loss, loader.dataset.tensors, drawn, steps, epochs)


def gpt2(steps: int, epochs: int, seed: int) -> Case:
    """Hugging Face's GPT-2 with 2 layers, 32 wide, from random weights, on windows of generated text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": len(ALPHABET), "n_positions": WINDOW, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rest)).double()
    sgd = nf.SGD(lr=0.05, batch_size=16, weight_decay=1e-3, momentum=0.9)
    return Case(model, next_character, (windows(512, seed),), sgd, steps, epochs)


def windows(count: int, seed: int) -> Tensor:
    """Sentences of a small grammar, cut into windows of characters: integers of shape (count, WINDOW)."""
    generator = torch.Generator().manual_seed(seed)
    parts = (
        ("the cat", "a dog", "the old king", "my friend", "a small bird"),
        ("sees", "follows", "never finds", "paints", "dreams of"),
        ("the moon", "a house", "the green river", "many letters", "its shadow"),
    )
    text = ""
    while len(text) < count * WINDOW:
        words = [part[int(torch.randint(len(part), (), generator=generator))] for part in parts]
        text += " ".join(words) + ". "
    return torch.tensor([ALPHABET.index(character) for character in text[: count * WINDOW]]).view(count, WINDOW)


def next_character(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy of the next character, averaged over a window: a number for each window."""
    (tokens,) = batch
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def example(name: str) -> Any:
    """A module of examples/."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


class Size(NamedTuple):
    """How a case is built, the budget of SGD in steps, and the most epochs of training."""

    build: Callable[[int, int, int], Case]
    steps: int
    epochs: int


CASES = {
    "F2": Size(factorisation, 40_000, 200),
    "digits MLP": Size(digits, 80_000, 1_000),
    "GPT-2": Size(gpt2, 4_000, 120),
}

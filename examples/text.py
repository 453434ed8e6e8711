"""Text from a small grammar, a number for each character: the data of the language models in this folder."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import noetherflow as nf

ALPHABET = ". abcdefghijklmnopqrstuvwxyz"
MASK = len(ALPHABET)  # hides a character from a masked language model
LENGTH = 32

SUBJECTS = ("the cat", "a dog", "the old king", "my friend", "a small bird", "the queen of spain")
VERBS = ("sees", "follows", "never finds", "paints", "dreams of", "writes to")
OBJECTS = ("the moon", "a house", "the green river", "many letters", "its shadow", "a king")
# A second set of objects, for fine-tuning.
NEW_OBJECTS = ("a theorem", "the lemma", "zero", "an integral", "the proof", "many primes")


def windows(count: int, generator: torch.Generator, objects: tuple[str, ...] = OBJECTS) -> TensorDataset:
    """Windows of text of 32 characters, as integers of shape (count, 32)."""

    def drawn(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    text = ""
    while len(text) < count * LENGTH:
        text += f"{drawn(SUBJECTS)} {drawn(VERBS)} {drawn(objects)}. "
    numbers = torch.tensor([ALPHABET.index(character) for character in text[: count * LENGTH]])
    return TensorDataset(numbers.view(count, LENGTH))


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Cross-entropy of the next character, averaged over a window: a number for each window."""
    (tokens,) = batch
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def train(
    model: nn.Module,
    loss: nf.Loss,
    dataset: Dataset,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Go through the data in random order, again and again."""
    for _ in range(epochs):
        for batch in DataLoader(dataset, batch_size, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()

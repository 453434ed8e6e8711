"""The models of the experiments: those of examples/, trained from several seeds, with a part of the data kept back."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import digits_cnn
import digits_mlp
import gpt2
import text
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf

OPTIMIZERS = ("SGD", "SGD with momentum", "AdamW")
MOMENTUM = 0.9
DIGITS_USED = 1200


@dataclass(frozen=True)
class Subject:
    """A trained model, its loss, its data, data that it has not seen, and the settings of its training."""

    name: str
    model: nn.Module
    loss: nf.Loss
    used: TensorDataset
    unused: TensorDataset
    sgd: nf.SGD
    adam_lr: float
    # Whether the noise between batches is measured, in train mode.
    microbatches: bool = False

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def equilibrium(self, model: nn.Module | None = None, sgd: nf.SGD | None = None, **more: Any) -> nf.Equilibrium:
        """The equilibrium of the model, or of a model that is trained further."""
        size = self.sgd.batch_size if self.microbatches else 128
        unused = [*DataLoader(self.unused, size, drop_last=self.microbatches)] if more.pop("holdout", False) else None
        return nf.equilibrate(
            self.model if model is None else model,
            self.loss,
            DataLoader(self.used, size, drop_last=self.microbatches),
            self.sgd if sgd is None else sgd,
            microbatches=self.microbatches,
            holdout=unused,
            progress=False,
            **more,
        )

    def move(
        self, model: nn.Module, equilibrium: nf.Equilibrium, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        nf.rebalance_(model, equilibrium, self.loss, self.used[:64], optimizer=optimizer)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Shuffled batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from DataLoader(self.used, self.sgd.batch_size, shuffle=True, generator=generator, drop_last=True)

    def mean_loss(self, model: nn.Module, *, unused: bool = False) -> float:
        """The mean loss over the used or the unused data; a model with BatchNorm stays in its mode."""
        parts = DataLoader(self.unused if unused else self.used, 300)
        copied = copy.deepcopy(model)  # running statistics of the model stay
        with torch.no_grad():
            return float(torch.cat([self.loss(copied, batch) for batch in parts]).mean())

    def optimizer(self, kind: str, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
        decay = self.sgd.weight_decay
        if kind == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=lr or self.adam_lr, weight_decay=decay)
        # The effective learning rate lr / (1 - momentum), and with it the equilibrium, is that of the settings.
        momentum = MOMENTUM if kind == "SGD with momentum" else 0.0
        rate = (lr or self.sgd.lr) * (1 - momentum)
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)

    def steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[tuple[Tensor, ...]],
        count: int,
        seen: Callable[[float], None] = lambda value: None,
    ) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            value = self.loss(model, next(batches)).mean()
            seen(float(value.detach()))
            value.backward()
            optimizer.step()


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1,200 digits to train on, and 597 more."""
    everything = digits_mlp.data()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(*everything[order[:DIGITS_USED]]), TensorDataset(*everything[order[DIGITS_USED:]])


def mlp(seed: int, epochs: int = digits_mlp.EPOCHS, weight_decay: float = digits_mlp.WEIGHT_DECAY) -> Subject:
    used, unused = digits(seed)
    model = digits_mlp.network(torch.Generator().manual_seed(seed))
    size = digits_mlp.BATCH_SIZE
    sgd = nf.SGD(digits_mlp.LR, size, weight_decay, replacement=False, dataset_size=len(used))
    return _trained(Subject("digits MLP", model, digits_mlp.loss, used, unused, sgd, 1e-3), seed, epochs)


def cnn(seed: int, epochs: int = digits_cnn.EPOCHS, weight_decay: float = digits_cnn.WEIGHT_DECAY) -> Subject:
    used, unused = digits(seed)
    size = digits_cnn.BATCH_SIZE
    sgd = nf.SGD(digits_cnn.LR, size, weight_decay, replacement=False, dataset_size=len(used))
    model = digits_cnn.network(seed).train()
    return _trained(Subject("digits CNN", model, digits_mlp.loss, used, unused, sgd, 1e-3, True), seed, epochs)


def language(seed: int, weight_decay: float = gpt2.WEIGHT_DECAY) -> Subject:
    """GPT-2, trained with AdamW; the settings are those with which SGD continues."""
    model, _, used, generator = gpt2.trained(seed)
    unused = text.windows(gpt2.EXAMPLES, generator)
    sgd = nf.SGD(0.1, gpt2.BATCH_SIZE, weight_decay, replacement=False, dataset_size=len(used))
    return Subject("GPT-2", model, text.loss, used, unused, sgd, gpt2.LR)


def _trained(subject: Subject, seed: int, epochs: int) -> Subject:
    optimizer = subject.optimizer("SGD", subject.model)
    count = epochs * (len(subject.used) // subject.sgd.batch_size)
    subject.steps(subject.model, optimizer, subject.batches(seed), count)
    return subject


MAKERS: dict[str, tuple[Callable[[int], Subject], int]] = {
    "digits MLP": (mlp, 10),
    "digits CNN": (cnn, 5),
    "GPT-2": (language, 3),
}

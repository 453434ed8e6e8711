"""F12: an MLP and a CNN on handwritten digits whose labels are drawn anew for every step.

A share of labels is random, and every draw of an image has a label of its own. So the noise of the gradients does not
vanish when the network has learnt, and the expected loss has its minimum at finite weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from noetherflow._extras import require
from noetherflow._types import Batch
from noetherflow.paper.f12_measured import Measured
from noetherflow.paper.f12_networks import Task, Trainer, compare, stacked, trace_by_jacobians, train
from noetherflow.paper.f12_settings import Config

require("paper", "sklearn", purpose="figure F12")

from sklearn.datasets import load_digits  # noqa: E402

CLASSES = 10
# Draws of every image that a forecast sees, and batches.
_DRAWS, _BATCHES = 4, 8
# Gradients of L-BFGS that are kept.
_HISTORY = 50


@final
@dataclass(frozen=True)
class Digits:
    """Images, shape (N, 64), their classes, and the share of random labels."""

    images: Tensor
    classes: Tensor
    flipped: float

    @classmethod
    def first(cls, count: int, flipped: float) -> "Digits":
        """The first images of scikit-learn's digits."""
        data = load_digits()
        return cls(torch.tensor(data.data / 16.0)[:count], torch.tensor(data.target)[:count], flipped)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels at random."""
        return self._labelled(torch.randint(len(self.images), (count,), generator=generator), generator)

    def given(self, seed: int) -> list[Batch]:
        """Batches with every image several times, with labels of its own each time."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(_DRAWS * len(self.images), generator=generator) % len(self.images)
        images, labels = self._labelled(order, generator)
        return list(zip(images.chunk(_BATCHES), labels.chunk(_BATCHES), strict=True))

    def expected(self) -> Tensor:
        """The probability of every label, shape (N, classes)."""
        return (1 - self.flipped) * one_hot(self.classes, CLASSES).double() + self.flipped / CLASSES

    def _labelled(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        flipped = torch.rand(len(chosen), generator=generator) < self.flipped
        drawn = torch.randint(0, CLASSES, (len(chosen),), generator=generator)
        return self.images[chosen], torch.where(flipped, drawn, self.classes[chosen])


def mlp(seed: int) -> nn.Sequential:
    """An MLP with a hidden layer, 1,210 parameters."""
    return _seeded(seed, lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES)))


def cnn(seed: int) -> nn.Sequential:
    """Two convolutions with ReLU and pooling, and a linear layer."""
    return _seeded(
        seed,
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        ),
    )


def _seeded(seed: int, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    """A network in float64, with the initial weights of PyTorch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example, shape (B,)."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def of_digits(config: Config, name: str) -> list[Measured]:
    """The network "mlp" or "cnn", trained on from where it still learns, and from rest."""
    build, rest, steps = {
        "mlp": (mlp, config.mlp_rest, config.mlp_steps),
        "cnn": (cnn, config.cnn_rest, config.cnn_steps),
    }[name]
    digits, seed = Digits.first(config.images, config.flipped), 1000 * (config.seed + 1)
    task = Task(build, loss, digits.sample, digits.given, lambda model, _: trace_by_jacobians(model, digits.images))
    decay, size = config.digits_decay, config.digits_batch_size
    fresh = task.starts(range(seed, seed + config.seeds))
    learner = Trainer(torch.optim.SGD, config.digits_learn_lr, decay, size)
    (early,) = train(task, fresh, learner, config.digits_learn, torch.Generator().manual_seed(seed))
    resting = [task.network(early, replica) for replica in range(config.seeds)]
    for model in resting:
        descend(model, digits, decay, rest)
    trainer = Trainer(torch.optim.SGD, config.digits_lr, decay, size)
    run = partial(compare, task=task, trainer=trainer, steps=steps, records=config.records, seed=seed)
    title = f"digits {name.upper()}"
    return [run(f"{title}, learning", start=early), run(f"{title}, at rest", start=stacked(resting))]


def descend(model: nn.Module, digits: Digits, decay: float, steps: int) -> None:
    """Bring a network to a minimum of the expected loss with weight decay, by L-BFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )
    labels = digits.expected()

    def objective() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()
        value = cross_entropy(model(digits.images), labels) + decay / 2 * squares
        value.backward()
        return value.detach()

    optimizer.step(objective)

"""A ReLU network that learnt digits, and Tr H of a ReLU network from a formula of its own."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import noetherflow as nf
from holds.case import SEEDS, case

SETTINGS = nf.SGD(0.1, 16, 1e-3)
FLIPPED, LEARN, TRAIN, EVERY = 0.2, 3000, 4000, 10


def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn, with a share of labels drawn at random, so that the noise does not vanish."""
    data, generator = load_digits(), torch.Generator().manual_seed(7)
    labels = torch.tensor(data.target)
    flipped = torch.rand(len(labels), generator=generator) < FLIPPED
    drawn = torch.randint(0, 10, (len(labels),), generator=generator)
    return torch.tensor(data.data / 16.0), torch.where(flipped, drawn, labels)


def relu_network(sizes: Iterable[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = list(sizes)
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def relu_trace(model: nn.Sequential, images: Tensor) -> float:
    r"""Tr H of the mean cross-entropy of a ReLU network.

    With the probabilities p and the gradients J_c of the logit c of an example, Tr H is the mean over examples of
    $\sum_c p_c |J_c|^2 - |\sum_c p_c J_c|^2$. For the linear layer with input a, |J_c|^2 = (|a|^2 + 1) |d_c|^2.
    """
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    inputs, total = [images], torch.zeros(len(images), dtype=images.dtype)
    with torch.no_grad():
        for layer in linear:
            inputs.append(layer(inputs[-1] if layer is linear[0] else inputs[-1].relu()))
        p = inputs[-1].softmax(1)
        backward = torch.eye(p.shape[1], dtype=images.dtype).expand(len(images), -1, -1)
        for depth in reversed(range(len(linear))):
            a = inputs[depth] if depth == 0 else inputs[depth].relu()
            mean = torch.einsum("bc,bcn->bn", p, backward)
            spread = (p * backward.square().sum(2)).sum(1) - mean.square().sum(1)
            total += (a.square().sum(1) + 1) * spread
            if depth:
                backward = backward @ linear[depth].weight * (inputs[depth] > 0).unsqueeze(1)
    return float(total.mean())


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model: nn.Sequential, images: Tensor, labels: Tensor, steps: int, seed: int, every: int = 0) -> list[float]:
    """SGD with replacement; returns Tr H every so many steps, at the start and at the end too."""
    generator, seen = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
    for step in range(steps + 1):
        if every and step % every == 0:
            seen.append(relu_trace(model, images))
        chosen = torch.randint(0, len(labels), (SETTINGS.batch_size,), generator=generator)
        optimizer.zero_grad()
        losses(model, (images[chosen], labels[chosen])).mean().backward()
        optimizer.step()
    return seen


def of_digits() -> list[dict[str, Any]]:
    """A ReLU network that learnt digits and is trained on, as it is and moved along the orbit of its first neurons."""
    images, labels = digits()
    batches = list(zip(images.split(256), labels.split(256), strict=True))
    results = []
    for name, factor in (("digits MLP", 1.0), ("digits MLP, moved", 2.0)):
        curves, forecasts = [], []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = relu_network((64, 24, 16, 10))
            train(model, images, labels, LEARN, seed)
            with torch.no_grad():
                for tensor, power in ((model[0].weight, 1), (model[0].bias, 1), (model[2].weight, -1)):
                    tensor.mul_(factor**power)
            forecasts.append(nf.forecast(model, losses, batches, SETTINGS, progress=False))
            curves.append(train(model, images, labels, TRAIN, seed + 100, EVERY))
        stacked = torch.tensor(curves, dtype=torch.float64).T
        ends = stacked[-len(stacked) * 3 // 10 :].mean(0)
        results.append(case(name, EVERY * torch.arange(len(stacked)), stacked, ends, forecasts, lr=SETTINGS.lr))
    return results

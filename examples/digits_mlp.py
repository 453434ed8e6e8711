"""A ReLU network on handwritten digits: what `noetherflow analyze` needs to know of a model, in one function.

Run it with ``noetherflow analyze examples/digits_mlp.py``.

Expected: 3 symmetries, all converged.
"""

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf

WIDTHS = (64, 48, 32, 24, 10)
EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 10, 32, 0.05, 1e-4


def data() -> TensorDataset:
    """The 1,797 digits that come with scikit-learn, 8 x 8 pixels each."""
    digits = load_digits()
    return TensorDataset(torch.tensor(digits.data / 16.0), torch.tensor(digits.target))


def network(generator: torch.Generator) -> nn.Sequential:
    """Three hidden ReLU layers with biases, in float64."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
        nn.init.kaiming_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy, one number per example."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after a brief training, its loss, its data and the settings it trains with."""
    generator = torch.Generator().manual_seed(0)
    dataset = data()
    model = network(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for batch in DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=BATCH_SIZE, replacement=False, dataset_size=len(dataset))
    return model, loss, DataLoader(dataset, batch_size=256), sgd

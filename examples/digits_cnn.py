"""A convolutional network with BatchNorm on handwritten digits, in eval mode.

Run it with ``noetherflow analyze examples/digits_cnn.py``.

In eval mode BatchNorm is a linear map of every channel, and the gradient of a single example exists. In train mode the
statistics of a batch couple its examples, so only the noise between batches can be measured:

    model.train()
    analysis = nf.analyze(model, loss, DataLoader(dataset, BATCH_SIZE), sgd, microbatches=True)

Both have the same symmetries, but the noise differs, and with it the equilibrium. That of training is measured in train
mode.

Expected: 2 symmetries, all converged.
"""

import torch
from digits_mlp import data, loss
from torch import nn
from torch.utils.data import DataLoader

import noetherflow as nf

EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 5, 32, 0.05, 1e-4


def network(seed: int = 0) -> nn.Sequential:
    """Two convolutions, each with BatchNorm and ReLU, and a linear layer, in float64."""
    torch.manual_seed(seed)
    layers = [
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(*layers).double()


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after five epochs, in eval mode, its loss, its data and the settings it trains with."""
    dataset = data()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=BATCH_SIZE, replacement=False, dataset_size=len(dataset))
    return model.eval(), loss, DataLoader(dataset, batch_size=256), sgd

"""Matrix factorisation, such as of ratings: a vector for each user and for each item, and the product predicts.

Run it with ``noetherflow analyze examples/matrix_factorisation.py``.

An invertible matrix on all users and its inverse on all items leave every product as it is.

Expected: 1 symmetry, converged.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf

USERS, ITEMS, RANK, RATINGS = 60, 40, 4, 1200
EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 40, 16, 0.05, 1e-3


class Factors(nn.Module):
    """Vectors of users and items; the prediction is their product."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.users = nn.Embedding.from_pretrained(drawn(USERS, generator), freeze=False)
        self.items = nn.Embedding.from_pretrained(drawn(ITEMS, generator), freeze=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Predictions of shape (B,) for pairs of a user and an item, shape (B, 2)."""
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(-1)


def drawn(rows: int, generator: torch.Generator) -> Tensor:
    """A random matrix of rows of length 4, in float64."""
    return torch.randn(rows, RANK, dtype=torch.float64, generator=generator) / 2


def data(generator: torch.Generator) -> TensorDataset:
    """Noisy entries of a matrix of rank 4, with their places."""
    truth = drawn(USERS, generator) @ drawn(ITEMS, generator).mT * 2
    users = torch.randint(USERS, (RATINGS,), generator=generator)
    items = torch.randint(ITEMS, (RATINGS,), generator=generator)
    noise = 0.3 * torch.randn(RATINGS, dtype=torch.float64, generator=generator)
    return TensorDataset(torch.stack([users, items], 1), truth[users, items] + noise)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error, a number for each rating."""
    pairs, ratings = batch
    return (model(pairs) - ratings).square()


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The factors after 3,000 steps of SGD, the loss, the ratings, and the settings of training."""
    generator = torch.Generator().manual_seed(0)
    dataset = data(generator)
    model = Factors(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for batch in DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=BATCH_SIZE, replacement=False, dataset_size=len(dataset))
    return model, loss, DataLoader(dataset, batch_size=200), sgd

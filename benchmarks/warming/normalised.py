"""A convolutional network with normalisations on digits of which a fifth have random labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.paper.f12_digits import loss as losses
from warming.case import SEEDS, Schedule, State

CHANNELS = 8, 16
FLIPPED = 0.2
BATCH, FORECAST, FORECAST_BATCH, VECTORS = 16, 128, 32, 4


def digits() -> tuple[Tensor, Tensor]:
    """The digits of scikit-learn, with a share of labels drawn at random, so that the noise does not vanish."""
    data, generator = load_digits(), torch.Generator().manual_seed(7)
    labels = torch.tensor(data.target)
    flipped = torch.rand(len(labels), generator=generator) < FLIPPED
    drawn = torch.randint(0, 10, (len(labels),), generator=generator)
    return torch.tensor(data.data / 16.0), torch.where(flipped, drawn, labels)


@dataclass
class Normalised:
    """The network from an initialisation."""

    name: str
    lr: float
    weight_decay: float
    std: float | None = None

    def __post_init__(self) -> None:
        images, self.labels = digits()
        self.images = images.float()
        self.settings = nf.SGD(self.lr, BATCH, self.weight_decay)

    def starts(self) -> State:
        stacked = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = Net()
            if self.std is not None:
                for layer in (model.body[0], model.body[3]):
                    nn.init.normal_(layer.weight, std=self.std)
            stacked.append({name: tensor.detach() for name, tensor in model.named_parameters()})
        return {name: torch.stack([each[name] for each in stacked]) for name in stacked[0]}

    def forecast(self, params: State, seed: int) -> nf.Forecast:
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:FORECAST]
        batches = zip(self.images[drawn].split(FORECAST_BATCH), self.labels[drawn].split(FORECAST_BATCH), strict=True)
        return nf.forecast(
            self._model(params, 0), losses, list(batches), self.settings, vectors=VECTORS, progress=False
        )

    def train(self, params: State, schedules: Sequence[Schedule], steps: int, seeds: Sequence[int]) -> State:
        """`torch.optim.SGD` with weight decay."""
        ends = []
        for row, (seed, schedule) in enumerate(zip(seeds, schedules, strict=True)):
            model, generator = self._model(params, row), torch.Generator().manual_seed(seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = schedule(step)
                chosen = torch.randint(0, len(self.labels), (BATCH,), generator=generator)
                optimizer.zero_grad()
                losses(model, (self.images[chosen], self.labels[chosen])).mean().backward()
                optimizer.step()
            ends.append({name: tensor.detach() for name, tensor in model.named_parameters()})
        return {name: torch.stack([end[name] for end in ends]) for name in ends[0]}

    def loss(self, params: State) -> Tensor:
        """The mean loss over all digits."""
        with torch.no_grad():
            models = [self._model(params, row) for row in range(len(next(iter(params.values()))))]
            return torch.stack([losses(model, (self.images, self.labels)).mean() for model in models])

    def _model(self, params: State, row: int) -> nn.Module:
        model = Net()
        model.load_state_dict({name: tensor[row] for name, tensor in params.items()})
        return model


class Net(nn.Module):
    """Convolution, normalisation, ReLU, twice; then a linear layer. Without eps, kernels have no scale."""

    def __init__(self) -> None:
        super().__init__()
        first, second = CHANNELS
        self.body = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, first, eps=0.0),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1, bias=False),
            nn.GroupNorm(1, second, eps=0.0),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * second, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.body(images.view(-1, 1, 8, 8))
        return result


def of_normalised() -> list[Normalised]:
    """Small kernels, and the default initialisation."""
    return [
        Normalised("CNN, kernels of std 1e-4", 0.2, 1e-4, 1e-4),
        Normalised("CNN, default", 0.05, 1e-4),
    ]

"""A convolutional network with normalisations on digits of which a fifth have random labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import noetherflow as nf
from holds.digits import digits, losses
from warming.case import SEEDS, Schedule, State

CHANNELS = 8, 16
BATCH, FORECAST, FORECAST_BATCH, VECTORS = 16, 256, 64, 4


@dataclass
class Normalised:
    """The network from an initialisation."""

    name: str
    lr: float
    weight_decay: float
    std: float | None = None

    def __post_init__(self) -> None:
        self.images, self.labels = digits()
        self.model = Net()
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
        self.model.load_state_dict({name: tensor[0] for name, tensor in params.items()})
        drawn = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:FORECAST]
        batches = zip(
            self.images[drawn].split(FORECAST_BATCH), self.labels[drawn].split(FORECAST_BATCH), strict=True
        )
        return nf.forecast(self.model, losses, list(batches), self.settings, vectors=VECTORS, progress=False)

    def train(self, params: State, schedules: Sequence[Schedule], steps: int) -> State:
        """SGD with weight decay, as `torch.optim.SGD` has it; every seed draws examples of its own."""
        generator = torch.Generator().manual_seed(2)
        gradient = vmap(grad(self._mean))
        count = len(schedules)
        for step in range(steps):
            drawn = torch.randint(0, len(self.labels), (count, BATCH), generator=generator)
            slopes = gradient(params, self.images[drawn], self.labels[drawn])
            lr = torch.tensor([each(step) for each in schedules], dtype=torch.float64)
            params = {
                name: tensor - _as(lr, tensor) * (slopes[name] + self.weight_decay * tensor)
                for name, tensor in params.items()
            }
        return params

    def loss(self, params: State) -> Tensor:
        """The mean loss over all digits."""
        with torch.no_grad():
            return vmap(lambda each: self._mean(each, self.images, self.labels))(params)

    def _mean(self, params: State, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.model, params, (images,)), labels)


class Net(nn.Module):
    """Convolution, normalisation, ReLU, twice; then a linear layer. Without eps, kernels have no scale."""

    def __init__(self) -> None:
        super().__init__()
        first, second = CHANNELS
        self.body = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.GroupNorm(1, first, eps=0.0),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, second, eps=0.0),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * second, 10),
        ).double()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.body(images.view(-1, 1, 8, 8))
        return result


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in like.shape[1:]))


def of_normalised() -> list[Normalised]:
    """Small kernels, the default initialisation, and a large learning rate."""
    return [
        Normalised("CNN, kernels of std 1e-4", 0.2, 1e-4, 1e-4),
        Normalised("CNN, default", 0.05, 1e-4),
        Normalised("CNN, default, large step", 2.0, 1e-4),
    ]

"""Networks of the forecast tests, and their Hessian from a slow and obvious computation."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

import noetherflow as nf
from cases import cross_entropy
from noetherflow.forecasting.mean_loss import MeanLoss

SGD = nf.SGD(0.1, 32)
Data = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Net:
    """A network with its data, and the Hessian of its mean loss."""

    model: nn.Module
    loss: nf.Loss
    batches: Data
    hessian: Tensor

    @property
    def sizes(self) -> list[int]:
        return [p.numel() for p in self.model.parameters()]

    @property
    def diagonal(self) -> dict[str, Tensor]:
        parts = self.hessian.diagonal().split(self.sizes)
        return {n: part.view_as(p) for (n, p), part in zip(self.model.named_parameters(), parts, strict=True)}

    def mean_loss(self, settings: nf.SGD | nf.AdamW = SGD) -> MeanLoss:
        return MeanLoss(self.model, self.loss, self.batches, settings, torch.float64)


def hessian(model: nn.Module, loss: nf.Loss, batches: Data) -> Tensor:
    """The full Hessian of the mean loss, from two derivatives of a function of the flattened parameters."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def mean(flat: Tensor) -> Tensor:
        parts = zip(params, flat.split(sizes), strict=True)
        state = {name: part.view_as(params[name]) for name, part in parts}
        called = Called(model, state)
        return loss(called, (inputs, targets)).mean()

    flat = torch.cat([p.flatten() for p in params.values()])
    return jacrev(grad(mean), chunk_size=128)(flat)


class Called(nn.Module):
    """A model at given parameters."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["call"] = lambda x: functional_call(model, state, (x,))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def digits(activation: type[nn.Module], widths: tuple[int, ...] = (64, 24, 16, 10), steps: int = 300) -> Net:
    """A network on 512 handwritten digits after a brief training; 2,130 parameters."""
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.data[:512] / 16.0), torch.tensor(data.target[:512])
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        index = torch.randint(0, 512, (32,))
        optimizer.zero_grad()
        cross_entropy(model, (images[index], labels[index])).mean().backward()
        optimizer.step()
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    return Net(model, cross_entropy, batches, hessian(model, cross_entropy, batches))


def counted(loss: nf.Loss, calls: list[int]) -> nf.Loss:
    """A loss that counts its calls."""

    def counting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls[0] += 1
        return loss(model, batch)

    return counting


def first_rise(change: Callable[[float], float]) -> float:
    """The first step from 0 at which a change of loss is no longer negative: a fine scan, then bisection."""
    high = 1e-6
    while change(high) < 0:
        high *= 1.1
    low = high / 1.1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if change(middle) < 0 else (low, middle)
    return low

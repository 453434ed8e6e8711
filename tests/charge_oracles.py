"""Charges from explicit matrices in extended precision; models and optimizers of the tests of `ChargeLedger`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import noetherflow as nf
import oracles

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]


def network() -> nn.Sequential:
    """Two linear maps with nothing in between, then a layer of ReLU neurons."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    nn.init.constant_(model[1].bias, 0.5)  # no neuron is dead
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def batches(count: int, size: int = 6, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, 2, generator=generator, dtype=torch.float64)
        yield x, torch.stack([x.prod(1), x.sum(1).abs()], 1) + 0.3 * noise


def symmetries() -> dict[str, nf.Symmetry]:
    """A matrix, a rescaling, a scaling, and a generator given as a matrix."""
    declared = {
        "0 -> 1": nf.MatrixSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("1.weight", 1)]),
        "1 -> 3": nf.DiagonalSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], [nf.Axis("3.weight", 1)]),
    }
    scaling = nf.ScalarSymmetry([nf.Axis("1.weight", 0), nf.Axis("1.bias", 0)], [nf.Axis("3.weight", 1)])
    signs = torch.cat([torch.ones(25), -torch.ones(10)]).double()
    dense = nf.DenseSymmetry(torch.diag(signs), ("1.weight", "1.bias", "3.weight"))
    return declared | {"scaling": scaling, "dense": dense}


def vector(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """All entries in extended precision."""
    return oracles.flat({name: tensor.detach() for name, tensor in tensors.items()}).numpy().astype(np.longdouble)


class Forms:
    """The quadratic form of every coordinate of a symmetry, as an explicit matrix on all parameters."""

    def __init__(self, symmetry: nf.Symmetry, model: nn.Module) -> None:
        self.shape = symmetry.identity({name: p.detach() for name, p in model.named_parameters()}).shape
        matrices = []
        for index in np.ndindex(*self.shape):
            x = torch.zeros(self.shape, dtype=torch.float64)
            x[index] = 1.0
            x = (x + x.mT) / 2 if x.ndim == 2 else x
            matrices.append(oracles.generator(symmetry, model, x).numpy())
        self.matrices = np.stack(matrices).astype(np.longdouble)

    def __call__(self, v: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
        """B(v, w), or C(v)."""
        return ((self.matrices @ (v if w is None else w)) @ v).reshape(self.shape)


class Lion(torch.optim.Optimizer):
    """A sign of two averages, with decoupled weight decay."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * average + 0.1 * p.grad).sign())
                average.mul_(0.99).add_(p.grad, alpha=0.01)


class Orthogonal(torch.optim.Optimizer):
    """Muon-like: the nearest orthogonal matrix to an average of gradients; no weight decay on vectors."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.ndim == 2:
                    left, _, right = torch.linalg.svd(average, full_matrices=False)
                    average = left @ right
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average, alpha=group["lr"])


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Matrices by Muon, vectors by AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=2e-3, weight_decay=0.1),
    ]


S = torch.optim
# By name: how to make it, and what has to be said of its weight decay.
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Optimizers], Any]] = {
    "SGD": (lambda m: S.SGD(m.parameters(), lr=0.01), None),
    "SGD decay": (lambda m: S.SGD(m.parameters(), lr=0.01, weight_decay=0.02), None),
    "momentum": (lambda m: S.SGD(m.parameters(), lr=2e-3, momentum=0.9, weight_decay=0.02), None),
    "Nesterov": (lambda m: S.SGD(m.parameters(), lr=2e-3, momentum=0.9, weight_decay=0.02, nesterov=True), None),
    "dampening": (lambda m: S.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=0.02, dampening=0.5), None),
    "Adam": (lambda m: S.Adam(m.parameters(), lr=2e-3), None),
    "Adam decay": (lambda m: S.Adam(m.parameters(), lr=2e-3, weight_decay=0.02), None),
    "AdamW": (lambda m: S.AdamW(m.parameters(), lr=2e-3, weight_decay=0.1), None),
    "NAdam": (lambda m: S.NAdam(m.parameters(), lr=2e-3, weight_decay=0.1, decoupled_weight_decay=True), None),
    "RMSprop": (lambda m: S.RMSprop(m.parameters(), lr=2e-3, weight_decay=0.02), None),
    "Lion": (lambda m: Lion(m.parameters(), lr=1e-3, weight_decay=0.1), "decoupled"),
    "Orthogonal": (lambda m: Orthogonal(m.parameters(), lr=1e-3, weight_decay=0.1), "decoupled"),
    "Muon": (muon, None),
}
# The fraction by which weight decay shrinks parameters in a step, by hand.
SHRINK = {
    "SGD decay": 0.01 * 0.02,
    "momentum": 2e-3 * 0.02 * 10,
    "Nesterov": 2e-3 * 0.02 * 10,
    "dampening": 0.01 * 0.02 * 5,
    "AdamW": 2e-4,
    "NAdam": 2e-4,
    "Lion": 1e-4,
    "Orthogonal": 1e-4,
    "Muon": 2e-4,
}


def all_of(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    return optimizers if isinstance(optimizers, list) else [optimizers]


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    loss(model, batch).mean().backward()

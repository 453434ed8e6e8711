"""What describes an architecture whose symmetries are known, and losses and data for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Kinds = dict[tuple[str, int], int]


@dataclass(frozen=True)
class Animal:
    """One architecture.

    Args:
        name: What it is.
        build: Model, loss and batch.
        expected: How many symmetries there are of each kind and dimension, such as {("diagonal", 4): 1}.
        coarse: Whether parts are computed in a coarser type than that of the parameters, so that a check in float64
            has the rounding of that type.
        slow: Whether sweeps over the zoo take long for this architecture; only `make test-all` has all of them.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    expected: Kinds = field(default_factory=dict)
    coarse: bool = False
    slow: bool = False

    @property
    def dimension(self) -> int:
        """All symmetric generators together."""
        return sum(size * count for (_, size), count in self.expected.items())

    @property
    def rescalings(self) -> int:
        """Generators that are diagonal matrices: k of the k (k + 1) / 2 generators of a matrix symmetry."""
        return sum(
            count * (math.isqrt(2 * size) if kind == "matrix" else size)
            for (kind, size), count in self.expected.items()
        )


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().flatten(1).mean(1)


def regression(model: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...], count: int = 4) -> Any:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(count, *shape, generator=generator) for shape in (inputs, outputs))
    return model, squared, (x, y)


def sequential(inputs: tuple[int, ...], outputs: tuple[int, ...], *layers: nn.Module) -> Any:
    return regression(nn.Sequential(*layers).eval(), inputs, outputs)


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def tokens_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens).transpose(1, 2), tokens.roll(1, 1), reduction="none").mean(1)


def language(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def ids(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(2))

"""Methods of measuring gradient noise, and a float32 loop over single examples as the truth."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import noetherflow as nf

from .models import Built

# Bytes that stacked gradients of single examples may take.
STACKED = 8 * 2**30


@dataclass
class Sums:
    """Sums over examples: of gradients, of their squares, and of the charges of each gradient."""

    symmetries: Mapping[str, nf.Symmetry]
    count: int = 0
    squares: float = 0.0
    total: dict[str, Tensor] = field(default_factory=dict)
    charges: dict[str, Tensor] = field(default_factory=dict)

    def add(self, gradient: dict[str, Tensor]) -> None:
        """Add the gradient of an example."""
        self.count += 1
        self.squares += sum(float(torch.linalg.vector_norm(g.float()).double().square()) for g in gradient.values())
        for name, part in gradient.items():
            self.total[name] = part.float() if name not in self.total else self.total[name].add_(part)
        for name, symmetry in self.symmetries.items():
            charge = symmetry.charge({key: gradient[key] for key in symmetry.names})
            self.charges[name] = charge.double() + self.charges.get(name, 0)

    def trace(self) -> float:
        """Tr Sigma, unbiased."""
        mean = sum(float(part.double().square().sum()) for part in self.total.values()) / self.count
        return (self.squares - mean) / (self.count - 1)

    def nets(self) -> dict[str, Tensor]:
        """N_+ - N_- for each symmetry, unbiased."""
        return {
            name: (
                self.charges[name] - symmetry.charge({n: self.total[n] for n in symmetry.names}).double() / self.count
            )
            / (self.count - 1)
            for name, symmetry in self.symmetries.items()
        }


def singles(built: Built) -> Iterator[dict[str, Tensor]]:
    """The gradient of every example, by a backward pass for each."""
    named = dict(built.model.named_parameters())
    for index in range(built.size):
        losses = built.losses(built.model, built.example(index))
        yield dict(zip(named, torch.autograd.grad(losses.sum(), list(named.values())), strict=True))


@contextmanager
def without_tf32() -> Iterator[None]:
    """A block in which float32 products have all their digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Truth:
    """What a float32 loop says: Tr Sigma, and N_+ - N_- for each symmetry, on the CPU."""

    trace: float
    nets: dict[str, Tensor]

    @classmethod
    def of(cls, built: Built) -> "Truth":
        """Measure; no memory of the GPU stays in use."""
        sums = Sums(built.symmetries)
        with without_tf32():
            for gradient in singles(built.in_float32()):
                sums.add(gradient)
            return cls(sums.trace(), {name: net.cpu() for name, net in sums.nets().items()})


@dataclass
class Method:
    """What is timed, and what the last step says.

    Args:
        step: One step.
        trace: Tr Sigma, unbiased within the batch.
        noise: The moments, if the method measures Grams.
    """

    step: Callable[[], object]
    trace: Callable[[], float]
    noise: Callable[[], nf.NoiseMoments] | None = None


def plain(built: Built) -> Method:
    def step() -> None:
        built.losses(built.model, built.batch).mean().backward()

    return Method(step, lambda: float("nan"))


def metered(built: Built, *, grams: bool = False, train: bool = True) -> Method:
    meter = nf.NoiseMeter(built.model, built.symmetries if grams else {})

    def step() -> None:
        with meter.step(built.batch, train=train):
            built.losses(built.model, built.batch).mean().backward()

    return Method(step, lambda: float(meter.noise.trace), (lambda: meter.noise) if grams else None)


def looped(built: Built) -> Method:
    sums: list[Sums] = []

    def step() -> None:
        sums[:] = [Sums({})]
        for gradient in singles(built):
            sums[0].add(gradient)

    return Method(step, lambda: sums[0].trace())


def vectorised(built: Built) -> Method:
    """torch.func, in parts whose stacked gradients fit into memory."""
    params = {name: parameter.detach() for name, parameter in built.model.named_parameters()}
    buffers = dict(built.model.named_buffers())
    per_example = sum(p.numel() * p.element_size() for p in params.values())
    part = max(1, min(built.size, STACKED // per_example))
    found = [0.0]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = built.model

        def forward(self, *example: Tensor) -> Tensor:
            return built.losses(self.model, tuple(tensor[None] for tensor in example)).sum()

    called = Called()

    def value(params: dict[str, Tensor], *example: Tensor) -> Tensor:
        state = {f"model.{name}": tensor for name, tensor in (params | buffers).items()}
        return functional_call(called, state, example)

    gradients = vmap(grad(value), in_dims=(None, *(0 for _ in built.batch)), randomness="different")

    def step() -> None:
        squares, total = 0.0, dict.fromkeys(params, 0.0)
        for start in range(0, built.size, part):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                stacks = gradients(params, *(t[start : start + part] for t in built.batch))
            for name, stack in stacks.items():
                norms = torch.linalg.vector_norm(stack.flatten(1).float(), dim=1).double()
                squares = squares + norms.square().sum()
                total[name] = total[name] + stack.float().sum(0)
        mean = sum(t.double().square().sum() for t in total.values()) / built.size
        found[0] = float((squares - mean) / (built.size - 1))

    return Method(step, lambda: found[0])


def opacus(built: Built) -> Method:
    from opacus import GradSampleModule

    inner = copy.deepcopy(built.model)
    model = GradSampleModule(inner, loss_reduction="mean")
    parameters: dict[str, Any] = dict(inner.named_parameters())

    def step() -> None:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            built.losses(model, built.batch).mean().backward()

    def trace() -> float:
        squares = sum(
            torch.linalg.vector_norm(p.grad_sample.flatten(1).float(), dim=1).double().square().sum()
            for p in parameters.values()
        )
        total = sum((p.grad.double() * built.size).square().sum() for p in parameters.values())
        return float((squares - total / built.size) / (built.size - 1))

    return Method(step, trace)


METHODS: dict[str, Callable[[Built], Method]] = {
    "while training": metered,
    "with Grams": partial(metered, grams=True),
    "measure only": partial(metered, train=False),
    "torch.func": vectorised,
    "loop": looped,
    "Opacus": opacus,
}

"""Small models with known symmetries: a list that most tests go through."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import noetherflow as nf


@dataclass(frozen=True)
class Case:
    """A model in float64, its loss, a data set, and its symmetries."""

    name: str
    model: nn.Module
    loss: nf.Loss
    batch: Any
    symmetries: dict[str, nf.Symmetry]
    wrong: dict[str, nf.Symmetry] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def params(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}

    @property
    def decays(self) -> dict[str, float]:
        """A weight decay for each parameter, zero for some."""
        values = itertools.cycle((0.03, 0.0, 0.11, 0.02, 0.07))
        return {name: next(values) for name in self.params}

    def loader(self, size: int = 7) -> list[Any]:
        """The data set in batches, the last one smaller."""
        x, y = self.batch
        return list(zip(x.split(size), y.split(size), strict=True))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().flatten(1).sum(1)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def axis(name: str, dim: int, **more: int) -> nf.Axis:
    return nf.Axis(name, dim, **more)


class ScaleInvariant(nn.Module):
    """A linear map with its weight normalised: only the direction counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight / self.weight.norm()).mT


class Tied(nn.Module):
    """Two inputs through one weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x[:, 0]).relu() + self.second(x[:, 1]).relu())


class TiedBothWays(nn.Module):
    """Hidden units that are written and read by the same matrix: its rows grow as its columns shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.outer.weight = self.inner.weight
        self.into, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.outer(self.inner(self.into(x).relu()).relu()).relu())


class Packed(nn.Module):
    """Two heads, u_h w_h, in one packed inner matrix and one packed outer matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(torch.cat([h[:, :2], h[:, 2:].relu()], dim=1))


class Squared(nn.Module):
    """A ReLU, squared: twice as homogeneous."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class SquaredRelu(nn.Module):
    """A neuron whose incoming weights count twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).relu().square()[:, None] * self.u


def mlp(*widths: int, bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def rescaling(layer: int, *, bias: bool = True) -> nf.DiagonalSymmetry:
    """The neurons of a hidden layer of `mlp`."""
    into = [axis(f"{layer}.weight", 0)] + [axis(f"{layer}.bias", 0)] * bias
    return nf.DiagonalSymmetry(plus=into, minus=[axis(f"{layer + 2}.weight", 1)])


def _regression(inputs: tuple[int, ...], outputs: int, count: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *inputs), torch.randn(count, outputs)


def _scalar() -> Case:
    return Case(
        "scalar, plus only",
        ScaleInvariant(),
        squared_error,
        _regression((4,), 2),
        {"length": nf.ScalarSymmetry(plus=axis("weight", 0))},
    )


def _pair() -> Case:
    pair = nf.ScalarSymmetry(plus=axis("0.weight", 0), minus=axis("2.weight", 0))
    wrong = nf.ScalarSymmetry(plus=(axis("0.weight", 0), axis("2.weight", 0)))
    return Case(
        "scalar, two sides",
        mlp(4, 5, 2, bias=False),
        squared_error,
        _regression((4,), 2),
        {"layers": pair},
        {"layers": wrong},
    )


def _diagonal() -> Case:
    return Case(
        "diagonal",
        mlp(4, 5, 3),
        squared_error,
        _regression((4,), 3),
        {"hidden": rescaling(0)},
        {"hidden": rescaling(0, bias=False)},
    )


def _coupled() -> Case:
    x = torch.randn(40, 5)
    return Case(
        "diagonal, coupled layers",
        mlp(5, 6, 4, 6, 3, activation=nn.LeakyReLU),
        cross_entropy,
        (x, torch.randint(3, (40,))),
        {f"layer {k}": rescaling(k) for k in (0, 2, 4)},
        {"layer 2": rescaling(2, bias=False)},
    )


def _mixed() -> Case:
    scalar = nf.ScalarSymmetry(plus=axis("0.weight", 0), minus=axis("4.weight", 0))
    return Case(
        "scalar and diagonal on shared tensors",
        mlp(4, 5, 4, 2, bias=False),
        squared_error,
        _regression((4,), 2),
        {"ends": scalar, "first": rescaling(0, bias=False), "second": rescaling(2, bias=False)},
    )


def _matrix() -> Case:
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5))
    plus = (axis("0.weight", 0), axis("0.bias", 0))
    return Case(
        "matrix",
        net,
        squared_error,
        _regression((6,), 5),
        {"rotation": nf.MatrixSymmetry(plus, minus=axis("1.weight", 1))},
        {"rotation": nf.MatrixSymmetry(plus[:1], minus=axis("1.weight", 1))},
    )


def _convolution() -> Case:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))
    plus = (axis("0.weight", 0), axis("0.bias", 0))
    return Case(
        "convolution, flatten, linear",
        net,
        squared_error,
        _regression((2, 4, 4), 2),
        {"channels": nf.DiagonalSymmetry(plus, minus=axis("3.weight", 1, repeat=4))},
        {"channels": nf.DiagonalSymmetry(plus[:1], minus=axis("3.weight", 1, repeat=4))},
    )


def _packed() -> Case:
    def half(start: int) -> tuple[tuple[nf.Axis, nf.Axis], nf.Axis]:
        ends = {"start": start, "stop": start + 2}
        return (axis("inner.weight", 0, **ends), axis("inner.bias", 0, **ends)), axis("outer.weight", 1, **ends)

    return Case(
        "slices of packed matrices",
        Packed(),
        squared_error,
        _regression((4,), 3),
        {"linear head": nf.MatrixSymmetry(*half(0)), "ReLU head": nf.DiagonalSymmetry(*half(2))},
        {"ReLU head": nf.MatrixSymmetry(*half(2))},
    )


def _tied() -> Case:
    return Case(
        "a tied weight, named by its alias",
        Tied(),
        squared_error,
        (torch.randn(24, 2, 4), torch.randn(24, 2)),
        {"hidden": nf.DiagonalSymmetry(plus=axis("second.weight", 0), minus=axis("out.weight", 1))},
    )


def _tied_both_ways() -> Case:
    # All three hidden layers scale by the same number, so that the shared matrix is multiplied by e^x and e^-x at once.
    plus = (axis("into.weight", 0), axis("into.bias", 0), axis("outer.weight", 0))
    minus = (axis("inner.weight", 1), axis("out.weight", 1))
    return Case(
        "a tied weight in both roles",
        TiedBothWays(),
        squared_error,
        _regression((4,), 2),
        {"all": nf.ScalarSymmetry(plus, minus)},
        {"all": nf.ScalarSymmetry(plus, minus[:1])},
    )


def _twice() -> Case:
    plus, minus = (axis("0.weight", 0), axis("0.bias", 0)), (axis("2.weight", 1),)
    return Case(
        "an axis that counts twice",
        mlp(4, 5, 3, activation=Squared),
        squared_error,
        _regression((4,), 3),
        {"hidden": nf.DiagonalSymmetry(plus, minus * 2)},
        {"hidden": nf.DiagonalSymmetry(plus, minus)},
    )


def _dense() -> Case:
    generator = torch.diag(torch.tensor([1.0] * 3 + [-2.0] * 2))
    return Case(
        "dense, eigenvalues 1 and -2",
        SquaredRelu(),
        squared_error,
        _regression((3,), 2),
        {"neuron": nf.DenseSymmetry(generator, names=("w", "u"))},
        {"neuron": nf.DenseSymmetry(generator.sign(), names=("w", "u"))},
    )


_MAKERS: tuple[Callable[[], Case], ...] = (
    _scalar,
    _pair,
    _diagonal,
    _coupled,
    _mixed,
    _matrix,
    _convolution,
    _packed,
    _tied,
    _tied_both_ways,
    _twice,
    _dense,
)


def make(maker: Callable[[], Case], seed: int = 0) -> Case:
    """A case drawn from a seed, all of it in float64; the global generator and dtype stay as they are."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            return maker()
        finally:
            torch.set_default_dtype(before)


def cases() -> list[Case]:
    """Every case, made anew, so that a test may change its model."""
    return [make(maker) for maker in _MAKERS]


def case(name: str) -> Case:
    """One of them."""
    return next(one for one in cases() if one.name == name)

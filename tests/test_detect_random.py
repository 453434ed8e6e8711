"""Random architectures: nothing false is found, and nothing breaks the search."""

import warnings
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import noetherflow as nf
from zoo import Attention, Call, Gated, RMSNorm, regression

SIZE = 6


class Sum(nn.Module):
    """Two branches added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Side(nn.Module):
    """Two branches side by side, and a map back."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.back = first, second, nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.cat([self.first(x), self.second(x)], -1))


class Wide(nn.Module):
    """A gate that fits."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.gated, self.after = nn.Linear(SIZE, 3), Gated(torch.relu), nn.Linear(3, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gated(self.before(x)))


class Convolved(nn.Module):
    """Convolutions along the positions."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(SIZE, 4, 3, padding=1), nn.Conv1d(4, SIZE, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.mT))).mT


LEAVES = [
    lambda: nn.Linear(SIZE, SIZE),
    lambda: nn.Linear(SIZE, SIZE, bias=False),
    nn.ReLU,
    nn.Tanh,
    nn.Identity,
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.PReLU(1),
    lambda: nn.LayerNorm(SIZE),
    lambda: nn.RMSNorm(SIZE),
    lambda: RMSNorm(SIZE),
    lambda: nn.Dropout(0.3),
    lambda: Call(lambda x: 2 * x),
    lambda: Call(lambda x: x.abs() + x),
    lambda: Call(lambda x: x + 1),
    lambda: Call(lambda x: x.flip(-1)),
    lambda: Call(lambda x: x.softmax(-1)),
    lambda: Call(lambda x: x * x.mean(-1, keepdim=True)),
    lambda: Call(lambda x: torch.cat([x[..., 2:], x[..., :2]], -1)),
    lambda: Attention(2, 1),
    lambda: Attention(2, 2, "half"),
    lambda: Attention(2, 2, "interleaved", 2, norm=True),
    lambda: nn.MultiheadAttention(SIZE, 2, batch_first=True),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE)),
    Wide,
    lambda: Convolved(1),
    lambda: Convolved(2),
]
TREES = st.recursive(
    st.sampled_from(range(len(LEAVES))),
    lambda parts: st.tuples(st.sampled_from(["chain", "sum", "side", "twice"]), parts, parts),
    max_leaves=6,
)


class SelfAttention(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def grown(tree: Any) -> nn.Module:
    if isinstance(tree, int):
        made = LEAVES[tree]()
        return SelfAttention(made) if isinstance(made, nn.MultiheadAttention) else made
    kind, first, second = tree
    one, other = grown(first), grown(second)
    if kind == "twice":
        return nn.Sequential(one, other, one)
    return {"chain": nn.Sequential, "sum": Sum, "side": Side}[kind](one, other)


def check(tree: Any, seed: int, *, training: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), grown(tree), nn.Linear(SIZE, 2)).double().train(training)
    _, loss, batch = regression(model, (3, SIZE), (3, 2))
    batch = tuple(one.double() for one in batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a candidate that is rejected is a rule that is wrong
        found = nf.find_symmetries(model, loss, batch)
    for name, symmetry in found.items():
        residual = nf.verify_symmetry(model, loss, batch, symmetry, draws=1)
        assert residual < 1e-9, (name, residual)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(TREES, st.integers(0, 2**16), st.booleans())
@hypothesis.example(("twice", ("twice", 16, 16), ("chain", 16, 16)), 0, False)  # activations of 1e-113
@hypothesis.example(("twice", ("twice", 16, 0), ("chain", 16, 16)), 0, False)  # a module under two names
def test_nothing_false_is_found(tree: Any, seed: int, training: bool) -> None:
    check(tree, seed, training=training)


@pytest.mark.slow
@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(TREES, st.integers(0, 2**16), st.booleans())
def test_nothing_false_is_found_in_a_thousand(tree: Any, seed: int, training: bool) -> None:
    check(tree, seed, training=training)

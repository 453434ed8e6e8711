"""Where examples are in results: every function is asked, and compared with what moves when an example changes."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf
from noetherflow.noise.buffers import Buffers, ModelLayout
from noetherflow.noise.capture.layouts import (
    SHARED,
    Apart,
    Layout,
    Listed,
    Lost,
    Regular,
    Several,
    Single,
    layout_of,
)
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.capture.sink import GradientSink
from noetherflow.noise.ops import RULES

SIZE = 4


def capture_of(batch: Tensor, size: int) -> Capture:
    parameter = nn.Parameter(torch.ones(1))
    buffers = Buffers.blank(ModelLayout({}), parameter)
    return Capture({"p": parameter}, buffers, Places(size), [batch], RULES, sink=GradientSink.PASSED_ON)


def layout_after(function: Callable[[Tensor], Any], batch: Tensor) -> Layout:
    """The layout that a forward pass writes down for its last result."""
    capture = capture_of(batch, len(batch))
    with capture:
        result = function(batch)
        return capture.layout(result)


def owners_by_hand(function: Callable[[Tensor], Any], batch: Tensor, change: float) -> Tensor | None:
    """The example of every entry of a result, shape of the result; None if an entry depends on several examples.

    Example by example, all entries are multiplied by random numbers between 1 and 1 + change.
    """
    before = function(batch)
    owners = torch.full(before.shape, -1)
    for example in range(len(batch)):
        changed = batch.clone()
        changed[example] *= 1.0 + change * torch.rand_like(batch[example])
        moved = function(changed) != before
        if bool((moved & (owners >= 0)).any()):
            return None
        owners[moved] = example
    return owners


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "a function of entries": lambda x: x.tanh() * 2.0 + 1.0,
    "tokens first": lambda x: x.transpose(0, 1),
    "tokens first, flattened": lambda x: x.transpose(0, 1).reshape(-1, x.shape[2]),
    "flattened": lambda x: x.flatten(0, 1),
    "flattened and back": lambda x: x.flatten(0, 1).unflatten(0, (len(x), -1)),
    "heads beside examples": lambda x: x.unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1),
    "heads between": lambda x: x.unflatten(2, (2, 2)).permute(2, 0, 1, 3).flatten(0, 1),
    "examples last": lambda x: x.permute(1, 2, 0),
    "one example": lambda x: x[2],
    "an example of a loop, stacked": lambda x: torch.stack([row.sum(0) for row in x]),
    "examples in another order": lambda x: x[torch.tensor([2, 0, 3, 1])],
    "some of them": lambda x: x[1:3],
    "every other token": lambda x: x[:, ::2],
    "tokens that a mask picks": lambda x: x[torch.arange(x.shape[1]).repeat(len(x), 1) % 3 == 0],
    "tokens that values pick": lambda x: x[x[:, :, 0] > 0.5],
    "rows by number": lambda x: x.flatten(0, 1)[torch.tensor([5, 0, 3, 3])],
    "softmax over tokens": lambda x: x.softmax(1),
    "sum over tokens": lambda x: x.sum(1),
    "norm of a layer": lambda x: F.layer_norm(x, x.shape[2:]),
    "with a constant": lambda x: torch.cat([torch.zeros(len(x), 1, x.shape[2]), x], 1),
    "padded": lambda x: F.pad(x, (0, 0, 1, 2)),
    "rolled along tokens": lambda x: x.roll(1, 1),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "products of stacks": lambda x: x @ x.mT,
    "a weight": lambda x: x @ torch.ones(4, 3),
    "a weight from the left": lambda x: torch.ones(3, x.shape[1]) @ x,
    "einsum": lambda x: torch.einsum("btd,bsd->tsb", x, x),
    "convolution": lambda x: F.conv1d(x.mT, torch.ones(2, 4, 3), padding=1),
    "pooling": lambda x: F.avg_pool1d(x.mT, 2),
    "the largest": lambda x: x.max(1)[0],
    "sorted": lambda x: x.sort(1)[0],
    "detached": lambda x: x.detach() * 2,
    "written into zeros": lambda x: torch.zeros(len(x), 9, 4).index_copy(1, torch.arange(x.shape[1]), x),
    "added to zeros": lambda x: torch.zeros(40, 4).index_add(0, torch.arange(len(x) * x.shape[1]), x.flatten(0, 1)),
    "losses": lambda x: F.cross_entropy(x.sum(1), torch.zeros(len(x), dtype=torch.long), reduction="none"),
}
JOINED: dict[str, Callable[[Tensor], Any]] = {
    "centred": lambda x: x - x.mean(0),
    "normalised": lambda x: F.batch_norm(x.flatten(1), None, None, training=True),
    "neighbours": lambda x: x - x.roll(1, 0),
    "pairs of neighbours": lambda x: x - x.unflatten(0, (2, -1)).flip(1).flatten(0, 1),
    "similarities": lambda x: x.flatten(1) @ x.flatten(1).T,
    "softmax over examples": lambda x: x.softmax(0),
    "sorted over examples": lambda x: x.sort(0)[0],
    "running sums": lambda x: x.cumsum(0),
    "attention between examples": lambda x: F.scaled_dot_product_attention(*[x.flatten(1)[None]] * 3),
    "a product of means": lambda x: x.mean(0) * x.mean(0),
}
SUMS: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda x: x.square().mean(),
    "sum over examples": lambda x: x.sum(0),
    "mean loss": lambda x: F.cross_entropy(x.sum(1), torch.zeros(len(x), dtype=torch.long)),
    "sum of losses": lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="sum"),
    "a third of the mean": lambda x: x.square().mean() / 3 + 1.0,
    "two means": lambda x: x.square().mean() - 0.5 * x.abs().mean(),
}


def batch_of(size: int, tokens: int) -> Tensor:
    return torch.rand(size, tokens, 4, generator=torch.Generator().manual_seed(size * 31 + tokens)).requires_grad_()


@pytest.mark.parametrize(("size", "tokens"), [(4, 6), (4, 4), (4, 8), (2, 4), (6, 3)])
@pytest.mark.parametrize("name", KEPT)
def test_every_entry_has_the_owner_that_changes_it(name: str, size: int, tokens: int) -> None:
    if size != SIZE and name in ("examples in another order", "one example"):
        pytest.skip("written for four examples")
    batch = batch_of(size, tokens)
    layout = layout_after(KEPT[name], batch)
    assert isinstance(layout, Apart)
    with torch.no_grad():
        owners = owners_by_hand(KEPT[name], batch.detach(), 1e-5)
    assert owners is not None
    labels = layout.labels(owners.shape, size).long() - 1
    # What no example changes may have any owner.
    torch.testing.assert_close(labels[owners >= 0], owners[owners >= 0])


@pytest.mark.parametrize("size", [2, 4, 6, 8, 12])
@pytest.mark.parametrize("name", JOINED)
def test_examples_that_are_joined_are_found_out(name: str, size: int) -> None:
    if size == 2 and name == "pairs of neighbours":
        pytest.skip("a division into groups of one example")
    layout = layout_after(JOINED[name], batch_of(size, 4))
    assert isinstance(layout, Several)
    assert not layout.additive or name == "centred"
    with torch.no_grad():
        assert name in ("a product of means",) or owners_by_hand(JOINED[name], batch_of(size, 4).detach(), 9.0) is None


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_examples_are_no_coupling(name: str) -> None:
    layout = layout_after(SUMS[name], batch_of(4, 6))
    assert isinstance(layout, Several)
    assert layout.additive
    # The twin: a square of the sum.
    squared = layout_after(lambda x: SUMS[name](x).square(), batch_of(4, 6))
    assert isinstance(squared, Several)
    assert not squared.additive


def test_constants_depend_on_no_example() -> None:
    for function in (torch.zeros_like, lambda x: torch.arange(3.0) * 2, lambda x: x.new_ones(3)):
        assert layout_after(function, batch_of(4, 6)) is SHARED


def test_what_was_not_seen_is_lost() -> None:
    batch = batch_of(4, 6)
    outside = batch * 2
    layout = layout_after(lambda _: outside + 1, batch)
    assert isinstance(layout, Lost)
    assert "MulBackward0" in layout.cause
    assert isinstance(layout_after(lambda x: torch.vmap(torch.tanh)(x) + 1, batch), Lost)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_labels_and_layouts_are_inverse(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 5))
    shape = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(1, 3)))]
    dim = data.draw(st.integers(0, len(shape) - 1))
    inner = data.draw(st.integers(1, 3))
    shape[dim] = size * inner * data.draw(st.integers(1, 3))
    labels = Regular(dim, inner).labels(torch.Size(shape), size)
    again = layout_of(labels, size)
    assert isinstance(again, Regular)
    torch.testing.assert_close(again.labels(torch.Size(shape), size), labels)
    values = torch.arange(labels.numel()).reshape(shape)
    rows = Regular(dim, inner).rows(values, 0, size)
    assert rows.owners is None
    for example in range(size):
        assert set(rows.values[example].tolist()) == set(values[labels == example + 1].tolist())


def test_a_list_of_owners_gives_rows_with_owners() -> None:
    layout = Listed(1, torch.tensor([2, 0, 2]))
    values, owners = layout.rows(torch.arange(6).reshape(2, 3), 0, 3)
    assert owners is not None
    assert {(int(v), int(o)) for v, o in zip(values, owners, strict=True)} == {
        (0, 2),
        (3, 2),
        (1, 0),
        (4, 0),
        (2, 2),
        (5, 2),
    }
    assert layout_of(torch.tensor([1.0, 1.0]), 3) == Single(0)


def test_a_penalty_has_no_noise_and_a_factor_of_the_loss_is_refused() -> None:
    """Its twin: a parameter that multiplies the mean loss has a gradient for every example, which is not there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(6, 4)

    def losses(net: nn.Module) -> Tensor:
        return net(x).square().mean(1)

    penalties: dict[str, Callable[[Tensor], Tensor]] = {
        "L2": lambda p: p.square().sum(), "L1": lambda p: p.abs().sum(), "norm": lambda p: p.norm(),
        "orthogonal": lambda p: (p @ p.mT - torch.eye(len(p))).square().sum() if p.ndim == 2 else 0 * p.sum(),
    }  # fmt: skip
    plain = nf.NoiseMeter(net, {})
    with plain.step(x):
        losses(net).mean().backward()
    for penalty in penalties.values():
        net.zero_grad()
        (losses(net).mean() + 0.1 * sum(map(penalty, net.parameters()))).backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        meter = nf.NoiseMeter(net, {})
        with meter.step(x):
            (losses(net).mean() + 0.1 * sum(map(penalty, net.parameters()))).backward()
        assert not meter.unmeasured
        torch.testing.assert_close(meter.noise.trace, plain.noise.trace)
        torch.testing.assert_close([p.grad for p in net.parameters()], gradients)
    scale = nn.Parameter(torch.ones(()))
    net.register_parameter("scale", scale)
    meter = nf.NoiseMeter(net, {})
    with meter.step(x):
        (losses(net).mean() * scale).backward()
    assert list(meter.unmeasured) == ["scale"]

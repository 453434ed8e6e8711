"""A recorded step, and what is left of it once it is condensed, against the function itself."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from noetherflow.simulation.fused import Fused
from noetherflow.simulation.graph import Recording, condense

Function = Callable[..., tuple[Tensor, ...]]


def condensed(function: Function, *tensors: Tensor) -> tuple[Function, Function]:
    return condense(Recording(make_fx(function)(*tensors), tensors))


def operations(function: Function) -> list[str]:
    graph = function.func.__self__.graph
    return [str(node.target) for node in graph.nodes if node.op.startswith("call")]


def products(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.sum(), (a.mT @ b).mT, 2 * (0.3 * a).expand(3, 4, 5), b * torch.full_like(b, 0.1), a**1.0


def weighted(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    weights = torch.arange(1.0, 6.0, dtype=a.dtype)
    return a.mean(), a * weights, (weights * 2).sum() * b, torch.outer(weights, weights) @ b.mT


def twice(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.mean(), a.transpose(1, 2) + 1, b.transpose(1, 2) * 2, a - b


def case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b


@pytest.mark.parametrize("function", [products, weighted, twice])
def test_condensed_functions_give_what_the_function_gives(function: Function) -> None:
    whole, rest = condensed(function, *case(0))
    for seed in range(3):
        expected = function(*case(seed))
        torch.testing.assert_close(whole(*case(seed)), expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(rest(*case(seed)), expected[1:], rtol=1e-14, atol=1e-14)


def test_arguments_that_share_memory_at_first_may_differ_later() -> None:
    a, b = case(0)
    whole, _ = condensed(twice, a, a.detach())
    torch.testing.assert_close(whole(a, b), twice(a, b), rtol=0, atol=0)


def test_what_need_not_be_done_is_not_done() -> None:
    def wasteful(a: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones_like(a).cumsum(0) / 7
        return a.exp().sum(), (a.view(3, 4, 5).expand(3, 4, 5) * 1.0) ** 1.0 + ones

    whole, rest = condensed(wasteful, case(0)[0])
    assert operations(whole) == ["exp", "sum", "add"]
    assert operations(rest) == ["add"]


def test_a_graph_that_writes_into_tensors_is_left_as_it_is() -> None:
    def writes(a: Tensor) -> tuple[Tensor, ...]:
        counts = torch.zeros_like(a)
        before = counts.sum()
        counts.add_(a)
        return before, counts.sum()

    a, _ = case(0)
    with pytest.raises(ValueError, match="writes"):
        condensed(writes, a)
    fused = Fused(writes)
    for _ in range(3):
        torch.testing.assert_close(fused(a), (torch.zeros(()).double(), a.sum()))
        torch.testing.assert_close(fused.rest(a), (a.sum(),))


def test_random_numbers_are_no_constants() -> None:
    def noisy(a: Tensor) -> tuple[Tensor, ...]:
        return a.sum(), torch.rand(4, 5) + 0 * a[0], torch.bernoulli(torch.full((100,), 0.5)), torch.rand_like(a)

    whole, rest = condensed(noisy, case(0)[0])
    for function in (whole, rest):
        first, second = function(case(0)[0]), function(case(0)[0])
        assert not any(torch.equal(x, y) for x, y in zip(first[-3:], second[-3:], strict=True))


def test_a_function_that_changes_is_called_not_replayed() -> None:
    calls = 0

    def counting(a: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return a.sum(), a * calls

    fused, (a, _) = Fused(counting), case(0)
    fused(a)
    before = calls
    torch.testing.assert_close(fused(a)[1], a * (before + 1))
    torch.testing.assert_close(fused.rest(a)[0], a * (before + 2))


def test_a_condensed_graph_with_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(recording: Recording) -> tuple[Function, Function]:
        whole, rest = condense(recording)
        return whole, lambda *tensors: tuple(1.001 * result for result in rest(*tensors))

    # By its name in sys.modules: as an attribute of the package, `simulate` is the function.
    monkeypatch.setattr(sys.modules["noetherflow.simulation.fused"], "condense", wrong)
    fused = Fused(products)
    fused(*case(0))
    torch.testing.assert_close(fused.rest(*case(1)), products(*case(1))[1:])

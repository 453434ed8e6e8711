"""Products that compiled loops form by BLAS, on one thread or several, are those of tensors."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import noetherflow as nf
from noetherflow.noise import native, passes, products, strips
from noetherflow.noise.asked import Asked, Page
from noetherflow.noise.collect import stacked
from noetherflow.noise.ledger import WHOLE, Sums
from noetherflow.noise.squares import square, square_stack
from noetherflow.noise.strips import in_strips
from noetherflow.noise.uses import Convolution, Outer, Product, Rows

pytestmark = pytest.mark.skipif(not native.product_of(torch.float64), reason="PyTorch's BLAS cannot be called here")

HEADS = (nf.Axis("w", 0, 0, 4), nf.Axis("w", 0, 4, 8), nf.Axis("w", 1, 2, 5))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def linear(*, turned: bool = False) -> tuple[Outer, tuple[int, ...]]:
    inputs, outputs = draw(5, 7, 6), draw(5, 7, 12)
    # As the gradient of a packed projection arrives: not contiguous.
    return Outer((), inputs.mT.contiguous().mT if turned else inputs, outputs), (12, 6)


def convolution(dims: int, stride: int, padding: int, dilation: int) -> tuple[Convolution, tuple[int, ...]]:
    x, weight = draw(5, 3, *(9, 8, 7)[:dims]), draw(4, 3, *(3, 2, 3)[:dims])
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    outputs = draw(*function(x, weight, None, stride, padding, dilation).shape)
    steps = [[one] * dims for one in (stride, padding, dilation)]
    return Convolution((), x, outputs, *steps, 1, weight.shape[2:]), tuple(weight.shape)


def tables() -> list[Rows]:
    generator = torch.Generator().manual_seed(0)
    return [Rows((), torch.randint(12, (5, count), generator=generator), draw(5, count, 6)) for count in (3, 4)]


CASES: dict[str, tuple[Product, tuple[int, ...], Asked, list[Rows]]] = {
    "linear": (*linear(), Asked(True, True), []),
    "linear, entries": (*linear(), Asked(entries=True), []),
    "linear, totals": (*linear(turned=True), Asked(), []),
    "linear, heads": (*linear(), Asked(True, False, grams=HEADS), []),
    "linear, a table": (*linear(), Asked(True, True), tables()[:1]),
    "linear, two tables": (*linear(), Asked(True, True), tables()),
} | {
    f"convolution {dims}, {steps}": (*convolution(dims, *steps), asked, [])
    for dims in (1, 2, 3)
    for steps, asked in (
        ((1, 0, 1), Asked(True, True)), ((2, 1, 1), Asked(True, False)), ((1, 2, 2), Asked(False, True, True)),
    )
}  # fmt: skip


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def found_by(use: Product, shape: tuple[int, ...], asked: Asked, others: list[Rows], *, wanted: bool) -> list[Tensor]:
    like = draw(1)
    sums = Sums.blank(Page.of(torch.Size(shape), asked), like)
    total = in_strips(use, sums, like, others, wanted=wanted)
    return [sums.numbers, *(one for one in (sums.entries, total if wanted else None) if one is not None)]


@pytest.mark.parametrize("wanted", [True, False], ids=["with the sum", "without"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("strip", [2**18, 30])
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_tensors(
    name: str, strip: int, count: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_STRIP", strip)
    use, shape, asked, others = CASES[name]
    did: list[bool] = []

    def noted(*args: Any) -> bool:
        did.append(products.scan_products(*args))
        return did[-1]

    monkeypatch.setattr(strips, "scan_products", noted)
    with threads(count):
        mine = found_by(use, shape, asked, others, wanted=wanted)
    assert did == [True]
    sums = Sums.blank(Page.of(torch.Size(shape), asked), draw(1))
    monkeypatch.setattr(passes, "arrays_of", lambda *_, **__: [])
    total = square_stack(stacked([use, *others], torch.Size(shape), draw(1)), sums)
    square(total, sums, WHOLE)
    truth = [sums.numbers, *([] if sums.entries is None else [sums.entries]), *([total] if wanted else [])]
    for one, other in zip(mine, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(one, 1.001 * other, rtol=1e-12, atol=1e-12)


def test_other_numbers_are_left_to_tensors() -> None:
    use, shape = linear()
    for kinds in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)):
        other = Outer((), use.inputs.to(kinds[0]), use.outputs.to(kinds[1]))
        total = torch.zeros(shape, dtype=torch.float32)
        sums = Sums.blank(Page.of(torch.Size(shape), Asked(True)), total)
        assert not products.scan_products(other, sums, total, 12)
        assert not sums.numbers.any()


def test_passes_over_much_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_LOAD", 10)
    x, g = draw(40, 6), draw(40, 5)
    images, gradients = draw(6, 4, 30), draw(6, 4, 30)

    def found() -> list[Tensor]:
        sums = Sums.blank(Page.of(torch.Size((40, 6)), Asked(True, True, True)), x)
        other = Sums.blank(Page.of(torch.Size((5, 6)), Asked(True, True)), x)
        total = torch.ones_like(x)
        passes.scanner(x, sums, 0, total=total)(False)
        passes.scan_outer(x, g, other)
        affine = passes.affine_sums(images, gradients, images[..., :1], images[..., 1:2])
        assert sums.entries is not None
        return [total, sums.numbers, sums.entries, other.numbers, *passes.channel_sums(images, gradients), *affine]

    with threads(1):
        alone = found()
    with threads(3):
        shared = found()
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_tasks_run_once_each_on_several_threads() -> None:
    ran: list[tuple[int, int]] = []

    def task(number: int) -> None:
        time.sleep(0.01)
        ran.append((number, threading.get_ident()))

    native.in_parallel([lambda number=number: task(number) for number in range(5)], 2)
    assert sorted(number for number, _ in ran) == list(range(5))
    assert len({thread for _, thread in ran}) == (2 if native._found("GOMP_parallel") else 1)


def test_without_threads_tasks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_found", lambda name: None)
    ran: list[int] = []
    native.in_parallel([lambda number=number: ran.append(number) for number in range(5)], 2)
    assert ran == list(range(5))


def test_what_a_task_raises_is_raised() -> None:
    ran: list[int] = []

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        native.in_parallel([broken, lambda: ran.append(1)], 2)
    assert ran == [1]


@pytest.mark.parametrize("found", [None, lambda *_: None], ids=["nothing", "something else of that name"])
def test_a_product_that_is_not_there_or_wrong_is_not_used(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = None if found is None else ctypes.CFUNCTYPE(None)(found)
    monkeypatch.setattr(native, "_found", lambda name: function)
    native.product_of.cache_clear()
    try:
        assert native.product_of(torch.float64) == 0
        use, shape = linear()
        total = torch.zeros(shape, dtype=torch.float64)
        assert not products.scan_products(use, Sums.blank(Page.of(torch.Size(shape), Asked()), total), total, 12)
    finally:
        native.product_of.cache_clear()

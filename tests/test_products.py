"""Products that compiled loops form by BLAS, on one thread or several, are those of tensors."""

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import noetherflow as nf
from noetherflow.noise import native, passes, products, strips
from noetherflow.noise.asked import Asked, Page
from noetherflow.noise.collect import stacked
from noetherflow.noise.ledger import EACH, WHOLE, Sums
from noetherflow.noise.squares import square, square_stack
from noetherflow.noise.strips import in_strips, sum_in_strips
from noetherflow.noise.uses import Convolution, Outer, Product, Rows

# Elsewhere tensors' own functions do the same.
linux = pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's libraries offer less here")

HEADS = (
    nf.Axis("w", 0, 4, 8),
    nf.Axis("w", -2, 0, 4),
    nf.Axis("w", -1, 2, 5),
    nf.Axis("w", 0),
    nf.Axis("w", 1, None, 3),
)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def linear(*, turned: bool = False) -> tuple[Outer, tuple[int, ...]]:
    inputs, outputs = draw(5, 7, 6), draw(5, 7, 12)
    # As the gradient of a packed projection arrives: not contiguous.
    return Outer((), inputs.mT.contiguous().mT if turned else inputs, outputs), (12, 6)


def convolution(dims: int, *steps: tuple[int, ...]) -> tuple[Convolution, tuple[int, ...]]:
    """Of some stride, padding and dilation: that of the last dimension, and so on."""
    x, weight = draw(5, 3, *(9, 8, 7)[:dims]), draw(4, 3, *(3, 2, 3)[:dims])
    function: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    steps = tuple(one[:dims] for one in steps)
    outputs = draw(*function(x, weight, None, *steps).shape)
    return Convolution((), x, outputs, *steps, 1, weight.shape[2:]), tuple(weight.shape)


def long(tokens: int, n: int, m: int) -> tuple[Outer, tuple[int, ...]]:
    """More tokens than are added up at a time, or rows that have to be moved apart."""
    return Outer((), draw(3, tokens, m), draw(3, tokens, n)), (n, m)


def wide(channels: int, length: int) -> tuple[Convolution, tuple[int, ...]]:
    """The same of patches."""
    x, outputs = draw(3, channels, length + 1), draw(3, 4, length)
    return Convolution((), x, outputs, [1], [0], [1], 1, torch.Size([2])), (4, channels, 2)


def tables() -> list[Rows]:
    generator = torch.Generator().manual_seed(0)
    return [Rows((), torch.randint(12, (5, count), generator=generator), draw(5, count, 6)) for count in (3, 4)]


CASES: dict[str, tuple[Product, tuple[int, ...], Asked, list[Rows]]] = {
    "linear": (*linear(), Asked(True, True), []),
    "linear, entries": (*linear(), Asked(entries=True), []),
    "linear, totals": (*linear(turned=True), Asked(), []),
    "linear, heads": (*linear(), Asked(True, False, grams=HEADS), []),
    "linear, heads and a table": (*linear(), Asked(grams=HEADS[:2]), tables()[:1]),
    "linear, a table": (*linear(), Asked(True, True), tables()[:1]),
    "linear, two tables": (*linear(), Asked(True, True), tables()),
    "linear, many tokens": (*long(700, 20, 130), Asked(True, True), []),
    "linear, rows apart": (*long(40, 6, 512), Asked(True, True), []),
    "linear, many tokens and rows apart": (*long(300, 6, 512), Asked(True, True), []),
    "convolution, many places": (*wide(50, 700), Asked(True, True), []),
    "convolution, rows apart": (*wide(256, 9), Asked(True, True), []),
} | {
    f"convolution {dims}, {steps}": (*convolution(dims, *steps), asked, [])
    for dims in (1, 2, 3)
    for steps, asked in (
        (((1, 1, 1), (0, 0, 0), (1, 1, 1)), Asked(True, True)),
        (((2, 1, 2), (1, 2, 0), (1, 1, 1)), Asked(True, False)),
        (((1, 2, 1), (2, 0, 1), (2, 1, 2)), Asked(False, True, True)),
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


@contextmanager
def regions(*places: Any) -> Iterator[list[int]]:
    """How many tasks were run at a time, by modules that run any."""
    seen: list[int] = []

    def counted(tasks: list[Any]) -> None:
        seen.append(len(tasks))
        native.in_parallel(tasks)

    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setattr(place, "in_parallel", counted)
        yield seen


@contextmanager
def only_blas() -> Iterator[None]:
    """No kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_kernel_of", lambda kind: 0)
        yield


KINDS = {
    "float64": (torch.float64, 1e-12, nullcontext),
    "float32": (torch.float32, 1e-5, nullcontext),
    "float32, BLAS": (torch.float32, 1e-5, only_blas),
}


@linux
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [True, False], ids=["with the sum", "without"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("strip", [2**18, 30])
@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_tensors(
    name: str, strip: int, count: int, wanted: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, bound, products_of = KINDS[kind]
    monkeypatch.setattr(strips, "_STRIP", strip)
    monkeypatch.setattr(passes, "_LOAD", 1)
    use, shape, asked, others = CASES[name]
    use, others = narrowed(use, dtype), [narrowed(one, dtype) for one in others]
    like, page = draw(1).to(dtype), Page.of(torch.Size(shape), asked)
    found = begun(page, like)
    monkeypatch.setattr(strips, "_strip_of_tensors", lambda *_: pytest.fail("no loop was found"))
    with threads(count), regions(products) as seen, products_of():
        total = in_strips(use, found, like, others, wanted=wanted)
    # One strip, or several; three examples for seven threads are better left to BLAS.
    assert set(seen) == {min(count, use.size) if 2 * use.size > count else 1}
    assert (total is None) == (not wanted and isinstance(use, Outer) and not asked.grams)
    monkeypatch.setattr(passes, "arrays_of", lambda *_, **__: [])
    truth = begun(page, like)
    whole = square_stack(stacked([use, *others], torch.Size(shape), like), truth)
    square(whole, truth, WHOLE)
    require_same(found, truth, total, whole, bound)


@linux
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [True, False], ids=["with the sum", "without"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("asked", [Asked(True, True), Asked(entries=True), Asked(grams=HEADS[:2])])
@pytest.mark.parametrize(("size", "n", "m"), [(7, 40, 6), (300, 40, 200), (5, 40, 512)])
def test_sums_are_those_of_tensors(
    size: int, n: int, m: int, asked: Asked, count: int, wanted: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, bound, products_of = KINDS[kind]
    monkeypatch.setattr(strips, "_STRIP", 15 * m)  # 40 rows are 14, 14 and 12
    monkeypatch.setattr(passes, "_LOAD", 1)
    x, g = draw(size, m).to(dtype), draw(size, n).to(dtype)
    page = Page.of(torch.Size((n, m)), asked)
    found, truth, whole = begun(page, x), begun(page, x), g.mT @ x
    with threads(count), regions(products) as seen, products_of():
        total = sum_in_strips(x, g, found, wanted=wanted)
    assert set(seen) == ({count} if native.kernel_of(dtype) and products_of is nullcontext else set())
    assert (total is None) == (not wanted and not asked.grams)
    square(whole, truth, WHOLE)
    require_same(found, truth, total, whole, bound)


def begun(page: Page, like: Tensor) -> Sums:
    """Sums to which something was added before."""
    sums = Sums.blank(page, like)
    for one in (sums.numbers, sums.entries):
        if one is not None:
            one += 1.0
    return sums


def require_same(found: Sums, truth: Sums, total: Tensor | None, whole: Tensor, bound: float) -> None:
    """What was added up, and the total if there is one, are the truth: and would not be if they were off."""
    for one, other in ((found.numbers, truth.numbers), (found.entries, truth.entries), (total, whole)):
        if one is not None and other is not None:
            size = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=bound, atol=bound * size)
            with pytest.raises(AssertionError):
                torch.testing.assert_close(one, 1.001 * other, rtol=bound, atol=bound * size)


def narrowed(use: Any, dtype: torch.dtype) -> Any:
    """A use in numbers of another type."""
    fields = {"outputs": use.outputs.to(dtype)}
    if not isinstance(use, Rows):
        fields["inputs"] = use.inputs.to(dtype)
    return replace(use, **fields)


def test_other_numbers_are_left_to_tensors() -> None:
    use, shape = linear()
    for kinds in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)):
        other = Outer((), use.inputs.to(kinds[0]), use.outputs.to(kinds[1]))
        total = torch.zeros(shape, dtype=torch.float32)
        assert (
            products.compiled_strip(other, Sums.blank(Page.of(torch.Size(shape), Asked(True)), total), total, 12)
            is None
        )


@linux
def test_threads_are_left_alone_where_they_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little to do, too few examples for so many threads, or too much memory."""
    use, shape = linear()
    like = draw(1)

    def tasks(count: int) -> set[int]:
        with threads(count), regions(products) as seen:
            in_strips(use, Sums.blank(Page.of(torch.Size(shape), Asked()), like), like)
        return set(seen)

    assert tasks(2) == {1}
    monkeypatch.setattr(passes, "_LOAD", 1)
    assert tasks(2) == {2}
    assert tasks(10) == {1}
    monkeypatch.setattr(products, "_SPARE", 0)
    assert tasks(2) == {1}


@pytest.mark.parametrize("name", ["scan", "fresh", "outer", "channels", "groups", "affine"])
def test_passes_over_much_are_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_LOAD", 10)
    x, g = draw(40, 6), draw(40, 5)
    images, gradients = draw(6, 4, 30), draw(6, 4, 30)

    def found() -> tuple[Tensor, ...]:
        if name == "scan":
            sums, total = Sums.blank(Page.of(torch.Size((40, 6)), Asked(True, True, True)), x), torch.ones_like(x)
            passes.scanner(x, sums, EACH, total=total)(False)
            assert sums.entries is not None
            return total, sums.numbers, sums.entries
        if name == "fresh":
            sums, total = Sums.blank(Page.of(torch.Size((70, 6)), Asked(rows=True)), x), torch.ones_like(x)
            passes.scanner(x, sums, WHOLE, 20, total)(True)
            return total, sums.numbers
        if name == "outer":
            sums = Sums.blank(Page.of(torch.Size((5, 6)), Asked(True, True)), x)
            passes.scan_outer(x, g, sums)
            return (sums.numbers,)
        if name == "channels":
            return passes.channel_sums(images, gradients)
        if name == "groups":
            mean, scale = draw(6, 2), draw(6, 2) + 3.0
            return passes.group_norm_back(images, gradients, draw(4), mean, scale)
        return passes.affine_sums(images, gradients, images[..., :1].contiguous(), images[..., 1:2].contiguous())

    with threads(1):
        alone = found()
    with threads(3), regions(passes) as seen:
        shared = found()
    assert seen == [3 if sys.platform == "linux" else 1]
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_tasks_run_once_each_on_several_threads() -> None:
    ran: list[tuple[int, int]] = []

    def task(number: int) -> None:
        time.sleep(0.01)
        ran.append((number, threading.get_ident()))

    with threads(2):
        native.in_parallel([lambda number=number: task(number) for number in range(5)])
    assert sorted(number for number, _ in ran) == list(range(5))
    assert len({thread for _, thread in ran}) == (2 if native._found("GOMP_parallel") else 1)


def test_without_threads_tasks_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_found", lambda name: None)
    ran: list[int] = []
    native.in_parallel([lambda number=number: ran.append(number) for number in range(5)])
    assert ran == list(range(5))
    assert native.team_size() == 1


def test_what_a_task_raises_is_raised() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    for count in (1, 2):
        with threads(count), pytest.raises(ZeroDivisionError):
            native.in_parallel([broken, lambda: None])


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_and_threads_are_there(dtype: torch.dtype) -> None:
    """Or everything above would be done by tensors' own functions, and pass."""
    assert native.product_of(dtype)
    with threads(2):
        assert native.team_size() == 2


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in native._VECTORS, reason="a processor without one")
def test_a_kernel_is_there() -> None:
    assert native.kernel_of(torch.float32, 1, 2, 3)
    assert not native.kernel_of(torch.float64, 1, 2, 3)


def test_no_more_kernels_than_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernel_of", lambda kind: 7)
    monkeypatch.setattr(native, "_SHAPES", set())
    monkeypatch.setattr(native, "_MOST", 2)
    assert [native.kernel_of(torch.float32, 1, 1, m) for m in (1, 2, 3, 1, 2, 3)] == [7, 7, 0, 7, 7, 0]


@pytest.mark.parametrize("found", [None, lambda *_: None], ids=["nothing", "something else of that name"])
def test_a_kernel_that_is_not_there_or_wrong_is_not_used(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = None if found is None else ctypes.CFUNCTYPE(None)(found)
    monkeypatch.setattr(native, "_found", lambda name: function)
    assert native._kernel_of.__wrapped__(torch.float32) == 0


@pytest.mark.parametrize("found", [None, lambda *_: None], ids=["nothing", "something else of that name"])
def test_a_product_that_is_not_there_or_wrong_is_not_used(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    function = None if found is None else ctypes.CFUNCTYPE(None)(found)
    monkeypatch.setattr(native, "_found", lambda name: function)
    native.product_of.cache_clear()
    try:
        assert native.product_of(torch.float64) == 0
        use, shape = linear()
        total = torch.zeros(shape, dtype=torch.float64)
        assert products.compiled_strip(use, Sums.blank(Page.of(torch.Size(shape), Asked()), total), total, 12) is None
    finally:
        native.product_of.cache_clear()

"""Every set of kernels against a float64 loop over single examples: every statistic, of each example and of the sum."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import noetherflow as nf
from noetherflow.noise.buffers import EACH, OF_SUM, Buffer
from noetherflow.noise.collect import collect, stacked
from noetherflow.noise.kernels import choose, group_norm_back, reference, square, square_stack
from noetherflow.noise.kernels.base import Kernels
from noetherflow.noise.kernels.choose import kernels_for
from noetherflow.noise.kernels.costs import Costs
from noetherflow.noise.statistics import Requested, StatisticsLayout
from noetherflow.noise.uses import Convolution, Outer, PerExample, Rows, Use
from oracles import row_positions

SETS = ("reference", "cpu")
# Relative to the largest number of a statistic. Half precision is an input only: sums have float32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(params=SETS, autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("NOETHERFLOW_KERNELS", request.param)
    return kernels_for(torch.zeros(()))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def gradient_of(use: Any, index: int, shape: Sequence[int]) -> Tensor:
    """The gradient of a single example, by a loop over tokens, or by autograd for a convolution."""
    found = torch.zeros(shape, dtype=torch.float64)
    part = use.of(found)
    d = use.gradients[index].double() if isinstance(use, PerExample) else use.outputs[index].double()
    if isinstance(use, PerExample):
        part += d
    elif isinstance(use, Outer):
        for t in range(len(d)):
            part += torch.outer(d[t], use.inputs[index, t].double())
    elif isinstance(use, Rows):
        for t in range(len(d)):
            part[use.ids[index, t]] += d[t]
    else:
        weight = torch.zeros(part.shape, dtype=torch.float64, requires_grad=True)
        function: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[len(use.kernel) - 1]
        image = use.inputs[index : index + 1].double()
        steps = (list(use.stride), list(use.padding), list(use.dilation))
        output = function(image, weight, None, *steps, use.groups)
        part += torch.autograd.grad(output, weight, d[None])[0]
    return found


def statistics(gradients: Sequence[Tensor], asked: Requested, shape: Sequence[int]) -> dict[Any, Tensor]:
    """The sums over gradients of everything that can be requested, from the definitions."""
    like = torch.zeros(shape, dtype=torch.float64)
    entries = torch.zeros_like(like)
    grams = {axis: torch.zeros(()) for axis in asked.grams}
    for one in gradients:
        entries += one.square()
        for axis in grams:
            rows = one.flatten()[row_positions(axis, like)]
            grams[axis] = grams[axis] + torch.einsum("ik,jk->ij", rows, rows)
    rest = tuple(range(1, entries.ndim))
    found: dict[Any, Tensor] = {"total": entries.sum()}
    if asked.rows:
        found["rows"] = entries.sum(rest, keepdim=True) if rest else entries
    if asked.columns:
        found["columns"] = entries.sum(0, keepdim=True)
    if asked.entries:
        found["entries"] = entries
    if asked.weighted:
        found["weighted"] = (weights_of(shape) * entries).sum()
    return found | grams


def weights_of(shape: Sequence[int]) -> Tensor:
    """Weights of the squares of all entries, which differ between rows and columns; numbers that float16 holds."""
    return (0.5 + torch.arange(torch.Size(shape).numel(), dtype=torch.float64) % 13).view(torch.Size(shape))


def begun(layout: StatisticsLayout, kind: torch.dtype) -> Buffer:
    """A buffer to which something was added before."""
    weights = weights_of(layout.shape) if layout.requested.weighted else None
    sums = Buffer.blank(layout, torch.zeros((), dtype=kind), weights)
    for one in (sums.numbers, sums.entries):
        if one is not None:
            one += 1.0
    return sums


def require(found: Tensor, truth: Tensor, bound: float) -> None:
    """Equal up to a bound relative to the largest number, and not equal to what is 0.1 % off."""
    size = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound * size)
    if size:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.double(), 1.001 * truth, rtol=bound, atol=bound * size)


def check(
    uses: Sequence[Use],
    shape: Sequence[int],
    asked: Requested,
    kind: torch.dtype = torch.float64,
    *,
    needs_sum: bool = True,
) -> None:
    """Compare every statistic of a parameter with that of the loop."""
    gradients = [sum(gradient_of(use, b, shape) for use in uses) for b in range(uses[0].size)]
    whole = sum(gradients, torch.zeros(shape, dtype=torch.float64))
    sums = begun(StatisticsLayout.of(torch.Size(shape), asked), reference.accumulator(torch.zeros((), dtype=kind)))
    total = collect(uses, sums, torch.zeros((), dtype=kind), needs_sum=needs_sum)
    assert total is not None or not needs_sum
    if total is not None:
        assert total.shape == torch.Size(shape)
        require(total, whole, BOUNDS[kind])
    for squares, single in ((sums.each, gradients), (sums.of_sum, [whole])):
        for key, truth in statistics(single, asked, shape).items():
            found = squares.gram(key) if isinstance(key, nf.Axis) else getattr(squares, key)
            require(found, truth + 1.0, BOUNDS[kind])


def linear(size: int, tokens: int, n: int, m: int, *, contiguous: bool = True) -> tuple[list[Use], tuple[int, int]]:
    x, d = draw(size, tokens, m), draw(size, tokens, n)
    # As the gradient of a packed projection arrives: not contiguous.
    return [Outer((), x, d) if contiguous else Outer((), x.mT.contiguous().mT, d.mT.contiguous().mT)], (n, m)


def convolution(
    size: int,
    dims: int,
    groups: int,
    *steps: tuple[int, ...],
    n: int = 4,
    channels: int = 4,
    space: Sequence[int] = (9, 8, 7),
) -> Any:
    """Stride, padding and dilation of as many dimensions."""
    x, weight = draw(size, channels, *space[:dims]), draw(n, channels // groups, *(3, 2, 3)[:dims])
    function: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    stride, padding, dilation = (one[:dims] for one in steps)
    d = draw(*function(x, weight, None, stride, padding, dilation, groups).shape)
    return [Convolution((), x, d, stride, padding, dilation, groups, weight.shape[2:])], tuple(weight.shape)


def single_place() -> tuple[list[Use], tuple[int, ...]]:
    """A convolution in one place, whose images have the strides of channels that come last."""
    ((use,), shape) = convolution(6, 1, 1, (1,), (1,), (1,), n=6, channels=6, space=(1,))
    x, d = (tensor.as_strided(tensor.shape, (6, 1, 6)) for tensor in (use.inputs, use.outputs))
    return [replace(use, inputs=x, outputs=d)], shape


def table(size: int, tokens: int, n: int, m: int) -> tuple[list[Use], tuple[int, int]]:
    """Rows are read by several tokens of an example; the first row is padding, whose gradients are zeros."""
    ids = torch.randint(n, (size, tokens), generator=torch.Generator().manual_seed(tokens))
    return [Rows((), ids, draw(size, tokens, m).masked_fill((ids == 0)[..., None], 0.0))], (n, m)


def uses_of(*parts: tuple[Sequence[Use], Any]) -> tuple[list[Use], Any]:
    return [use for uses, _ in parts for use in uses], parts[0][1]


def viewed(parts: tuple[Sequence[Use], Any], shape: tuple[int, ...], *views: Any) -> tuple[list[Use], Any]:
    return [replace(use, views=views) for use in parts[0]], shape


PLAIN = ((1, 1, 1), (0, 0, 0), (1, 1, 1))
CASES: dict[str, Callable[[], tuple[Sequence[Use], Any]]] = {
    "linear": lambda: linear(5, 7, 12, 6),
    "linear, not contiguous": lambda: linear(5, 7, 12, 6, contiguous=False),
    "linear, a single token": lambda: linear(6, 1, 5, 4),
    "linear, a single example": lambda: linear(1, 6, 5, 4),
    "linear, a single example of a single token": lambda: linear(1, 1, 5, 4),
    "linear, no token": lambda: linear(3, 0, 5, 4),
    "linear, all sizes equal": lambda: linear(4, 4, 4, 4),
    "linear, many rows and tokens": lambda: linear(3, 70, 300, 33),
    "linear, tiles of a compiled product": lambda: linear(2, 264, 4, 1300),
    "table": lambda: table(5, 9, 6, 4),
    "table, a single token": lambda: table(5, 1, 6, 4),
    "table, no token": lambda: table(5, 0, 6, 4),
    "vectors": lambda: ([PerExample((), draw(7, 5))], (5,)),
    "numbers": lambda: ([PerExample((), draw(7))], ()),
    "matrices": lambda: ([PerExample((), draw(7, 5, 6))], (5, 6)),
    "cubes": lambda: ([PerExample((), draw(7, 5, 4, 3))], (5, 4, 3)),
    "table and linear": lambda: uses_of(table(5, 9, 6, 4), linear(5, 7, 6, 4)),
    "linear twice": lambda: uses_of(linear(5, 7, 6, 4), linear(5, 3, 6, 4)),
    "part of a packed map": lambda: uses_of(
        viewed(linear(5, 7, 4, 6), (12, 6), lambda w: w[4:8]), viewed(linear(5, 2, 6, 12), (12, 6), lambda w: w.t())
    ),
    "rows of a part, and vectors": lambda: uses_of(
        viewed(table(5, 9, 3, 4), (6, 4), lambda w: w.chunk(2)[1]),
        ([PerExample((lambda w: w[2],), draw(5, 4))], (6, 4)),
    ),
    "convolution and linear": lambda: uses_of(
        convolution(5, 2, 1, *PLAIN), viewed(linear(5, 3, 4, 24), (4, 4, 3, 2), lambda w: w.flatten(1))
    ),
    "convolution, a single place, channels last": single_place,
    "convolution, wide patches": lambda: convolution(
        3, 2, 1, (2, 1), (1, 2), (1, 1), n=6, channels=17
    ),
    "convolution, many places": lambda: convolution(2, 2, 1, (2, 1), (1, 2), (2, 1), n=3, channels=8, space=(70, 40)),
    "convolution, wide patches, many places": lambda: convolution(
        2, 2, 1, (2, 3), (0, 1), (1, 2), n=5, channels=11, space=(30, 60)
    ),
    "convolution, wide patches with gaps": lambda: convolution(3, 2, 1, (1, 2), (2, 0), (2, 2), n=6, channels=17),
} | {
    f"convolution {dims}, {groups} groups, {steps}": lambda dims=dims, groups=groups, steps=steps: convolution(
        5, dims, groups, *steps
    )
    for dims in (1, 2, 3)
    for groups in (1, 2, 4)
    for steps in (PLAIN, ((2, 1, 2), (1, 2, 0), (1, 1, 1)), ((1, 2, 1), (2, 0, 1), (2, 1, 2)))
}  # fmt: skip


def axes(shape: Sequence[int]) -> tuple[nf.Axis, ...]:
    """Axes of every kind that a parameter of a shape can have: all rows, blocks, repeated, within a part."""
    found = []
    for dim, length in enumerate(shape):
        found += [nf.Axis("w", dim), nf.Axis("w", dim - len(shape), 0, max(1, length // 2))]
        if length > 1:
            found.append(nf.Axis("w", dim, length // 2, length))
        if length % 2 == 0:
            found.append(nf.Axis("w", dim, None, None, 2))
        other = (dim + 1) % len(shape)
        if other != dim and shape[other] > 1:
            found.append(nf.Axis("w", dim, within=(other, 1, shape[other])))
    return tuple(found)


REQUESTS: dict[str, Callable[[Sequence[int]], Requested]] = {
    "total": lambda _: Requested(),
    "rows": lambda _: Requested(rows=True),
    "columns": lambda _: Requested(columns=True),
    "rows and columns": lambda _: Requested(True, True),
    "entries": lambda _: Requested(entries=True),
    "Grams of rows": lambda shape: Requested(
        True, grams=tuple(a for a in axes(shape) if a.dim % len(shape) == 0 and a.within is None)
    ),
    "weighted": lambda _: Requested(weighted=True),
    "rows, columns and weighted": lambda _: Requested(True, True, weighted=True),
    "everything": lambda shape: Requested(True, True, True, axes(shape), weighted=True),
    "Grams without parts": lambda shape: Requested(True, True, grams=tuple(a for a in axes(shape) if a.within is None)),
}


@contextmanager
def formula(tokens: bool | None, size: int) -> Iterator[None]:
    """Whether token Grams are used, or what costs least, and how many bytes are formed at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_CACHE", size)
        if tokens is not None:

            def prefer(_: int, n: int, m: int, asked: Requested) -> bool:
                return tokens and not (asked.entries or asked.weighted) and not any(axis.within for axis in asked.grams)

            patch.setattr(Costs, "prefer_tokens", lambda self, *given: prefer(*given))
            patch.setattr(reference, "prefer_tokens_for_sum", lambda *given: prefer(*given) and not given[3].grams)
        yield


FORMULAS = {"cheapest": (None, 2**20), "formed": (False, 2**20), "formed in parts": (False, 250), "tokens": (True, 200)}


@pytest.mark.parametrize("way", FORMULAS)
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", CASES)
def test_every_statistic(name: str, request_name: str, way: str) -> None:
    uses, shape = CASES[name]()
    asked = REQUESTS[request_name](shape)
    with formula(*FORMULAS[way]):
        check(uses, shape, asked)
        check(uses, shape, asked, needs_sum=False)


def cast(use: Any, kind: torch.dtype) -> Use:
    fields = [name for name in ("inputs", "outputs", "gradients") if hasattr(use, name)]
    return replace(use, **{name: getattr(use, name).to(kind) for name in fields})


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["cheapest", "formed", "tokens"])
@pytest.mark.parametrize("name", ["linear", "linear, many rows and tokens", "table", "vectors", "matrices",
                                  "table and linear", "convolution, wide patches"])  # fmt: skip
def test_every_statistic_in_less_precision(name: str, way: str, kind: torch.dtype) -> None:
    """The truth is the loop in float64 over the same numbers."""
    uses, shape = CASES[name]()
    with formula(*FORMULAS[way]):
        check([cast(use, kind) for use in uses], shape, REQUESTS["everything"](shape), kind)
        check([cast(use, kind) for use in uses], shape, Requested(True, True), kind, needs_sum=False)


def test_half_precision_does_not_overflow() -> None:
    x, d = (torch.full((2, 3, 4), 300.0, dtype=torch.float16) for _ in range(2))
    for way in ("formed", "tokens"):
        with formula(*FORMULAS[way]):
            check([Outer((), x, d)], (4, 4), Requested(True, True), torch.float16)


SIZE = st.sampled_from((1, 2, 3, 4, 6, 8))


@hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(SIZE, SIZE, SIZE, SIZE, st.sampled_from(list(FORMULAS)), st.integers(0, 63), st.booleans())
def test_sizes_that_are_equal_or_divide_each_other(
    size: int, tokens: int, n: int, m: int, way: str, flags: int, needs_sum: bool
) -> None:
    grams = axes((n, m)) if flags & 8 else ()
    asked = Requested(bool(flags & 1), bool(flags & 2), bool(flags & 4), grams, bool(flags & 32))
    parts = [linear(size, tokens, n, m, contiguous=bool(flags & 16)), table(size, tokens, n, m)]
    with formula(*FORMULAS[way]):
        for uses, shape in (*parts, uses_of(*parts)):
            check(uses, shape, asked, needs_sum=needs_sum)


class Launches(TorchDispatchMode):
    """Counts the operations of PyTorch that run inside the block, but for views, which launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["formed", "tokens", "cheapest"])
@pytest.mark.parametrize("name", ["linear", "table", "convolution", "tied", "vectors"])
def test_launches_do_not_depend_on_the_number_of_examples(name: str, way: str) -> None:
    def launches(size: int) -> int:
        made = {
            "linear": lambda: linear(size, 7, 12, 6),
            "table": lambda: table(size, 7, 12, 6),
            "convolution": lambda: convolution(size, 2, 1, *PLAIN),
            "tied": lambda: uses_of(table(size, 7, 12, 6), linear(size, 7, 12, 6)),
            "vectors": lambda: ([PerExample((), draw(size, 5))], (5,)),
        }
        uses, shape = made[name]()
        sums = begun(StatisticsLayout.of(torch.Size(shape), Requested(True, True)), torch.float64)
        with formula(FORMULAS[way][0], 2**28), Launches() as mode:
            collect(uses, sums, draw(1))
        return mode.count

    launches(2)  # dtypes are promoted once
    assert launches(3) == launches(50) <= 40


def test_gradients_that_are_not_finite_stay_so() -> None:
    """A meter skips such steps: no reordering of additions may hide them."""
    for bad in (float("nan"), float("inf")):
        stack, sums = (
            torch.ones(2, 300, 9),
            Buffer.blank(StatisticsLayout.of(torch.Size((300, 9)), Requested(True, True)), torch.ones(())),
        )
        stack[1, 280, 4] = bad
        square_stack(stack, sums)
        rows, columns = sums.each.rows, sums.each.columns
        assert rows is not None
        assert columns is not None
        assert not sums.each.total.isfinite()
        assert not rows[280].isfinite()
        assert not columns[0, 4].isfinite()
        assert rows.isfinite().sum() == 299
        assert columns.isfinite().sum() == 8


def test_a_single_gradient() -> None:
    """To the row that is named, and to no other."""
    gradient, asked = draw(5, 4, 3), Requested(True, True, True, axes((5, 4, 3)), weighted=True)
    for row, other in ((EACH, OF_SUM), (OF_SUM, EACH)):
        sums = Buffer.blank(StatisticsLayout.of(gradient.shape, asked), gradient, weights_of(gradient.shape))
        square(gradient, sums, row)
        squares = sums.each if row == EACH else sums.of_sum
        for key, truth in statistics([gradient], asked, gradient.shape).items():
            require(squares.gram(key) if isinstance(key, nf.Axis) else getattr(squares, key), truth, 1e-10)
        assert not sums.numbers[other].any()


@pytest.mark.parametrize("name", CASES)
def test_stacked_gradients(name: str) -> None:
    uses, shape = CASES[name]()
    found = stacked(uses, torch.Size(shape), draw(1))
    truth = torch.stack([sum(gradient_of(use, b, shape) for use in uses) for b in range(uses[0].size)])
    require(found, truth, 1e-12)


def per_example(function: Callable[..., Tensor], d: Tensor, x: Tensor, *given: Tensor) -> list[Tensor]:
    """Gradients by autograd: of the input, and of all other tensors, a backward pass for each example."""
    inputs = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(function(inputs, *given), inputs, d)
    singles = []
    for b in range(len(x)):
        leaves = [one.clone().requires_grad_() for one in given]
        singles.append(torch.autograd.grad(function(x[b : b + 1], *leaves), leaves, d[b : b + 1]))
    return [back, *(torch.stack(parts) for parts in zip(*singles, strict=True))]


@pytest.mark.parametrize("contiguous", [True, False])
def test_gains_of_tokens(kernels: Kernels, contiguous: bool) -> None:
    x, d, gain, bias = draw(3, 4, 6), draw(3, 4, 6) + 1.0, draw(6), draw(6)
    if not contiguous:
        x, d = x.mT.contiguous().mT, d.mT.contiguous().mT
    mean, scale = x.mean(2, keepdim=True), (x.var(2, correction=0, keepdim=True) + 1e-5).rsqrt()
    _, gains, biases = per_example(lambda x, w, b: functional.layer_norm(x, (6,), w, b), d, x, gain, bias)
    for found, truth in zip(kernels.affine_sums(x, d, mean, scale), (gains, biases), strict=True):
        require(found, truth, 1e-10)


@pytest.mark.parametrize("weighted", [True, False])
def test_gains_of_groups(weighted: bool) -> None:
    x, d = draw(3, 6, 4, 5), draw(360).view(3, 6, 4, 5) + 1.0
    weight, bias = (draw(6), draw(6) + 2.0) if weighted else (torch.ones(6).double(), torch.zeros(6).double())
    _, mean, scale = torch.native_group_norm(x, weight, bias, 3, 6, 20, 2, 1e-5)
    truth = per_example(lambda x, w, b: functional.group_norm(x, 2, w, b), d, x, weight, bias)
    for found, one in zip(group_norm_back(x, d, weight if weighted else None, mean, scale), truth, strict=True):
        require(found, one, 1e-10)


def test_sums_of_channels(kernels: Kernels) -> None:
    x, d = draw(3, 4, 5, 6), draw(3, 6, 5, 4).transpose(1, 3)
    products, sums = kernels.channel_sums(x, d)
    require(products, torch.einsum("bcij,bcij->bc", x, d), 1e-12)
    require(sums, torch.einsum("bcij->bc", d), 1e-12)


def test_tensors_for_which_no_loop_is_compiled(kernels: Kernels) -> None:
    x, d = (draw(3, 4, 6).to(torch.bfloat16) for _ in range(2))
    for found, truth in zip(kernels.channel_sums(x, d), ((x * d).sum(2), d.sum(2)), strict=True):
        assert torch.equal(found, truth)


def test_a_set_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "abacus")
    with pytest.raises(nf.SettingsError, match="NOETHERFLOW_KERNELS=abacus names no set"):
        kernels_for(draw(1))


def test_without_numba_the_reference_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOETHERFLOW_KERNELS")
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    assert kernels_for(draw(1)).name == "reference"
    monkeypatch.setattr(choose, "has_numba", lambda: True)
    assert kernels_for(draw(1)).name == "cpu"
    assert kernels_for(torch.zeros(1, device="meta")).name == "reference"


def test_a_set_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "cpu")
    monkeypatch.setattr("noetherflow._extras._missing", lambda packages: list(packages))
    choose.kernels_of.cache_clear()
    try:
        with pytest.raises(nf.MissingExtraError, match=r"NOETHERFLOW_KERNELS=cpu needs numba.*noetherflow\[cpu\]"):
            kernels_for(draw(1))
    finally:
        choose.kernels_of.cache_clear()

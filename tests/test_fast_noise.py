"""Noise without per-example gradients, against the gradients of single examples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf
from noetherflow import _batch
from noetherflow.noise.buffers import OF_SUM, Buffer, Buffers
from noetherflow.noise.capture.layouts import Regular
from noetherflow.noise.collect import collect
from noetherflow.noise.kernels import square
from zoo import CLASSIC, Animal, Call, ids, regression, sequential, tokens_of

TIGHT = {"rtol": 1e-10, "atol": 1e-13}


def in_double(built: tuple[nn.Module, Any, Any]) -> tuple[nn.Module, Any, Any]:
    model, loss, batch = built
    return model.double(), loss, _batch.cast(batch, torch.float64, torch.device("cpu"))


def assert_same(fast: nf.NoiseMoments, exact: nf.NoiseMoments, **tolerance: float) -> None:
    """Every statistic but the standard errors, relative to the size of what it is a part of."""
    tolerance = tolerance or TIGHT
    assert fast.count == exact.count
    torch.testing.assert_close(fast.total_scatter, exact.total_scatter, **tolerance)
    whole = exact.total_scatter.item()
    absolute = {"rtol": tolerance["rtol"], "atol": tolerance["rtol"] * whole}
    torch.testing.assert_close(fast.scatter, exact.scatter, **absolute)
    torch.testing.assert_close(fast.square_scatter, exact.square_scatter, **absolute)
    torch.testing.assert_close(fast.mean, exact.mean, rtol=tolerance["rtol"], atol=tolerance["rtol"] * whole**0.5)


@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize("animal", CLASSIC, ids=lambda animal: animal.name)
def test_every_architecture(animal: Animal, variances: bool) -> None:
    built = in_double(animal.build())
    symmetries = nf.find_symmetries(*built)
    model, loss, batch = built
    fast, exact = (
        nf.estimate_noise(model, loss, [batch], symmetries, exact=one, variances=variances) for one in (False, True)
    )
    if not variances:
        exact = nf.estimate_noise(model, loss, [batch], symmetries, exact=True)
        fast.square_scatter.update(exact.square_scatter)
    assert_same(fast, exact)
    # Whatever is not seen is named, and done exactly.
    assert not fast.fallback


class Positions(nn.Module):
    """Token and position embeddings, with positions that know nothing of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.tokens, self.places = kind, nn.Embedding(7, 4), nn.Embedding(9, 4)
        self.free, self.head = nn.Parameter(torch.randn(1, 9, 4)), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        places = self.places(places[None] if self.kind == "with a dimension" else places)
        return self.head(torch.tanh(self.tokens(x) + places + self.free[:, : x.shape[1]]))


class Split(nn.Module):
    """One parameter that holds three maps, cut apart in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.bias = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        first, second, _ = self.packed.chunk(3)
        a = functional.linear(x, first, self.bias[:3])
        b = x @ second.t() + self.bias[3:6]
        return torch.tanh(a) * b + x @ self.packed[6:].T + self.bias.view(3, 3)[2]


class Reused(nn.Module):
    """A map used three times, and tied to another place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(torch.tanh(self.one(x)))))


class Recurrent(nn.Module):
    """Something that is done exactly, between things that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.cell, self.after = nn.Linear(3, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.cell(self.before(x))[0])


class Scaled(nn.Module):
    """Parameters that are added and multiplied, one of them after a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.rate = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.number = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x + self.shift) / self.rate.exp() * self.number - torch.where(x > 0, x, self.shift)


def conv(kind: type[nn.Module], *sizes: Any, **options: Any) -> nn.Module:
    return nn.Sequential(kind(*sizes, **options), nn.Tanh())


@dataclass
class Layers:
    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    fallback: tuple[str, ...] = ()


CASES = [
    Layers("linear", lambda: sequential((3,), (2,), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
    Layers("linear, tokens", lambda: sequential((5, 3), (5, 2), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
    Layers("linear, two dimensions of tokens", lambda: sequential((2, 5, 3), (2, 5, 2), nn.Linear(3, 2))),
    Layers("linear, no bias", lambda: sequential((5, 3), (5, 2), nn.Linear(3, 2, bias=False))),
    Layers("linear, large", lambda: sequential((6, 150), (6, 130), nn.Linear(150, 130))),
    Layers("linear, many tokens", lambda: sequential((40, 150), (40, 130), nn.Linear(150, 130))),
    Layers("in place", lambda: sequential((5, 3), (5, 2), nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))),
    Layers("stride, padding, dilation", lambda: sequential((3, 9, 8), (4, 5, 6), conv(
        nn.Conv2d, 3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)))),
    Layers("same padding", lambda: sequential((3, 6, 6), (4, 6, 6), conv(nn.Conv2d, 3, 4, 3, padding="same"))),
    Layers("groups", lambda: sequential((4, 5, 5), (6, 3, 3), conv(nn.Conv2d, 4, 6, 3, groups=2))),
    Layers("depthwise", lambda: sequential((4, 5, 5), (8, 5, 5), conv(nn.Conv2d, 4, 8, 3, padding=1, groups=4))),
    Layers("one dimension", lambda: sequential((3, 7), (4, 3), conv(nn.Conv1d, 3, 4, 3, stride=2))),
    Layers("three dimensions", lambda: sequential((2, 3, 4, 4), (3, 2, 3, 3), conv(nn.Conv3d, 2, 3, 2))),
    Layers("in place after a convolution", lambda: sequential(
        (3, 5, 5), (4, 5, 5), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))),
    Layers("transposed", lambda: sequential((3, 4, 4), (2, 6, 6), nn.ConvTranspose2d(3, 2, 3), nn.Tanh())),
    Layers("padding rows", lambda: (nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7)), tokens_of,
                                    ids(7, 4, 5))),
    Layers("positions", lambda: (Positions("plain"), tokens_of, ids(7, 4, 5))),
    Layers("positions, as many as examples", lambda: (Positions("plain"), tokens_of, ids(7, 5, 5))),
    Layers("positions, twice as many", lambda: (Positions("plain"), tokens_of, ids(7, 4, 8))),
    Layers("positions with a dimension", lambda: (Positions("with a dimension"), tokens_of, ids(7, 4, 5))),
    Layers("LayerNorm, many tokens", lambda: sequential((20, 3), (20, 3), nn.LayerNorm(3), nn.Tanh())),
    Layers("LayerNorm over two dimensions", lambda: sequential((4, 3), (4, 3), nn.LayerNorm((4, 3)), nn.Tanh())),
    Layers("LayerNorm without bias", lambda: sequential((4, 3), (4, 3), nn.LayerNorm(3, bias=False), nn.Tanh())),
    Layers("GroupNorm", lambda: sequential((4, 3, 3), (4, 3, 3), nn.GroupNorm(2, 4), nn.Tanh())),
    Layers("InstanceNorm", lambda: sequential((4, 3, 3), (4, 3, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh())),
    Layers("packed", lambda: regression(Split(), (5, 3), (5, 3))),
    Layers("reused and tied", lambda: regression(Reused(), (5, 3), (5, 3))),
    Layers("reused and tied, no tokens", lambda: regression(Reused(), (3,), (3,))),
    Layers("recurrent", lambda: regression(Recurrent(), (5, 3), (5, 2)),
           ("cell.weight_ih_l0", "cell.weight_hh_l0", "cell.bias_ih_l0", "cell.bias_hh_l0")),
    Layers("added and multiplied", lambda: regression(Scaled(), (5, 3), (5, 3))),
    Layers("tokens before examples", lambda: regression(
        nn.Sequential(Call(lambda x: x.transpose(0, 1)), nn.Linear(3, 4), Call(lambda x: x.transpose(0, 1))),
        (5, 3), (5, 4))),
]  # fmt: skip


def squared_axes(model: nn.Module) -> dict[str, nf.Symmetry]:
    """Something is asked of every axis; the loss is not symmetric, so the check of that is switched off."""
    asked: dict[str, nf.Symmetry] = {}
    for name, one in model.named_parameters():
        for dim in range(one.ndim):
            asked[f"{name} {dim} sums"] = nf.DiagonalSymmetry(plus=nf.Axis(name, dim))
            asked[f"{name} {dim} Gram"] = nf.MatrixSymmetry(plus=nf.Axis(name, dim, 0, max(1, one.shape[dim] // 2)))
        if one.ndim:
            asked[f"{name} whole"] = nf.ScalarSymmetry(plus=nf.Axis(name, 0))
        if one.ndim and len(one) > 1:
            asked[f"{name} part"] = nf.ScalarSymmetry(
                plus=nf.Axis(name, 0, 0, len(one) // 2), minus=nf.Axis(name, 0, 1)
            )
    return asked


@pytest.fixture
def any_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noetherflow.noise.exact.Subject.require_symmetric", lambda *_: None)
    monkeypatch.setattr("noetherflow.noise.layerwise.LayerwisePass._is_symmetric", lambda *_: True)


@pytest.mark.parametrize("variances", [True, False], ids=["variances", "sums"])
@pytest.mark.parametrize("layers", CASES, ids=lambda layers: layers.name)
@pytest.mark.usefixtures("any_direction")
def test_every_layer(layers: Layers, variances: bool) -> None:
    torch.manual_seed(0)
    model, loss, batch = in_double(layers.build())
    asked = squared_axes(model)
    fast, exact = (nf.estimate_noise(model, loss, [batch], asked, exact=one) for one in (False, True))
    if not variances:
        fast = nf.estimate_noise(model, loss, [batch], asked, exact=False, variances=False)
        fast.square_scatter.update(exact.square_scatter)
    assert_same(fast, exact)
    assert set(fast.fallback) == set(layers.fallback)


@pytest.mark.usefixtures("any_direction")
def test_gradients_of_a_tied_weight_are_summed_before_they_are_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that must fail: every use squared on its own."""
    model, loss, batch = in_double(regression(Reused(), (5, 3), (5, 3)))

    def apart(uses: Any, sums: Buffer, like: Tensor, **_: Any) -> Tensor:
        parts = [one for use in uses if (one := collect([use], sums, like)) is not None]
        sums.numbers[OF_SUM] = 0.0
        gradient = torch.stack(parts).sum(0)
        square(gradient, sums, OF_SUM)
        return gradient

    exact = nf.estimate_noise(model, loss, [batch], {}, exact=True)
    monkeypatch.setattr("noetherflow.noise.capture.finish.collect", apart)
    monkeypatch.setattr("noetherflow.noise.capture.finish.joined", lambda uses, _: uses)
    wrong = nf.estimate_noise(model, loss, [batch], {}, exact=False)
    # The check against single examples sees it, and does these parameters exactly.
    assert set(wrong.fallback) == {"one.weight"}
    assert_same(wrong, exact)
    monkeypatch.setattr("noetherflow.noise.layerwise.LayerwisePass.check", blind)
    with pytest.raises(AssertionError):
        assert_same(nf.estimate_noise(model, loss, [batch], {}, exact=False), exact)


class Attending(nn.Module):
    """A bias of keys that softmax does not see, and a small gain."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(48, 48) for _ in range(4))
        self.gain = nn.Parameter(torch.full((48,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        seen = functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(seen) * self.gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_that_vanishes_is_no_reason_to_fall_back(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = Attending().to(dtype), (torch.randn(8, 12, 48, dtype=dtype), torch.randn(8, 12, 48, dtype=dtype))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean((1, 2))

    def fallback() -> set[str]:
        return set(nf.estimate_noise(model, loss, [batch], {}, exact=False).fallback)

    assert not fallback()
    # The twin: a gradient that is small but not nothing, and wrong.
    whole = Buffers.row

    def wrong(self: Buffers, index: int) -> Buffers:
        found = whole(self, index)
        found.numbers[self.model_layout.parts["query.bias"].start] *= 2.0
        return found

    monkeypatch.setattr(Buffers, "row", wrong)
    assert fallback() == {"query.bias"}


def blind(self: Any, batch: Any, together: Tensor, **_: Any) -> None:
    self._batched = [0, 1]


@pytest.mark.usefixtures("any_direction")
def test_tokens_that_come_first_are_no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens, four examples: no check against single examples is needed; the twin takes them for these."""
    (case,) = (one for one in CASES if one.name == "tokens before examples")
    model, loss, batch = in_double(case.build())
    batch = tuple(one[:, :4] for one in batch)
    exact = nf.estimate_noise(model, loss, [batch], {}, exact=True)
    monkeypatch.setattr("noetherflow.noise.layerwise.LayerwisePass.check", blind)
    assert_same(nf.estimate_noise(model, loss, [batch], {}, exact=False), exact)
    monkeypatch.setattr("noetherflow.noise.capture.placing.Places.of", lambda *_: [Regular(0)])
    with pytest.raises(AssertionError):
        assert_same(nf.estimate_noise(model, loss, [batch], {}, exact=False), exact)


def large(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(40, 200), nn.ReLU(), nn.Dropout(dropout), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 5))
    return nn.Sequential(*layers).double()


def examples(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 40, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (count,), generator=generator)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_layerwise_way_is_taken_by_itself_and_over_batches_of_any_size() -> None:
    model = large()
    data = examples(50)
    batches = [tuple(part) for part in zip(*(one.split(16) for one in data), strict=True)]
    symmetries = nf.find_symmetries(model, classify, batches[0])
    fast = nf.estimate_noise(model, classify, batches, symmetries)
    exact = nf.estimate_noise(model, classify, batches, symmetries, exact=True)
    assert_same(fast, exact)
    for name in symmetries:
        # Between four batches: the same size, not the same number.
        ratio = fast.standard_errors[name].net.mean() / exact.standard_errors[name].net.mean()
        assert 0.5 < ratio < 2
    short = nf.estimate_noise(model, classify, batches, symmetries, variances=False)
    with pytest.raises(nf.SettingsError, match="variances"):
        nf.solve_equilibrium(short, nf.SGD(0.1, 8), model)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_narrow_numbers_stay_within_their_bounds(dtype: torch.dtype, bound: float) -> None:
    model = large().to(dtype)
    x, y = examples(64)
    batch = x.to(dtype), y
    symmetries = nf.find_symmetries(large(), classify, (x, y))
    exact = nf.estimate_noise(model, classify, [batch], symmetries, exact=True, dtype=torch.float64)
    fast = nf.estimate_noise(model, classify, [batch], symmetries, exact=False)
    torch.testing.assert_close(fast.trace, exact.trace, rtol=bound, atol=0)
    for name, grams in exact.grams.items():
        for mine, theirs in zip(fast.grams[name], grams, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * theirs.mean().item())


def test_autocast_is_within_the_bounds_of_its_type() -> None:
    model = large().float()
    x, y = examples(64)

    def narrow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="none").float()

    exact = nf.estimate_noise(model, classify, [(x.float(), y)], {}, exact=True)
    fast = nf.estimate_noise(model, narrow, [(x.float(), y)], {}, exact=False)
    assert not fast.fallback
    torch.testing.assert_close(fast.trace, exact.trace, rtol=0.03, atol=0)


def test_autocast_leaves_float64_as_it_is() -> None:
    model, batch = large().double(), examples(64)

    def narrow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return functional.cross_entropy(model(batch[0]), batch[1], reduction="none").float()

    symmetries = nf.find_symmetries(model, classify, batch)
    exact, fast = (
        nf.estimate_noise(model, loss, [batch], symmetries, exact=loss is classify) for loss in (classify, narrow)
    )
    assert not fast.fallback
    torch.testing.assert_close(fast.trace, exact.trace, rtol=1e-6, atol=0)


class TiedTokens(nn.Module):
    """A table too large to be stacked, read and multiplied by; slices of one weight; a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.packed = nn.Embedding(300, 64), nn.Parameter(torch.randn(512, 64) / 8)
        self.convolution, self.grouped = nn.Conv1d(64, 128, 3, padding=1), nn.Conv1d(128, 64, 3, padding=1, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        first, second = self.packed.chunk(2)
        x = functional.linear(x, first) * functional.linear(x, second)
        x = x.unflatten(-1, (4, -1)).sum(-2).mT
        x = self.grouped(self.convolution(x).relu()).mT
        return functional.linear(x, self.table.weight)


def test_autocast_of_layers_whose_gradients_are_formed() -> None:
    torch.manual_seed(0)
    model, ids = TiedTokens(), torch.randint(300, (6, 70))

    def whole(model: nn.Module, ids: Tensor) -> Tensor:
        return functional.cross_entropy(model(ids).float().transpose(1, 2), ids, reduction="none").mean(1)

    def narrow(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids)
        return functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none").mean(1)

    exact = nf.estimate_noise(model, whole, [ids], {}, exact=True)
    meter = nf.NoiseMeter(model, {})
    with meter.step(ids):
        narrow(model, ids).mean().backward()
    torch.testing.assert_close(meter.noise.trace, exact.trace * (6 / 5), rtol=0.03, atol=0)
    fast = nf.estimate_noise(model, narrow, [ids], {}, exact=False)
    assert not fast.fallback
    torch.testing.assert_close(fast.trace, exact.trace, rtol=0.03, atol=0)
    measured = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad()
    narrow(model, ids).mean().backward()
    for name, one in model.named_parameters():
        grown = measured[name]
        assert grown is not None
        assert one.grad is not None
        assert grown.dtype == one.grad.dtype
        assert (grown - one.grad).norm() < 0.02 * one.grad.norm(), name


def test_noise_below_rounding_is_measured_exactly() -> None:
    """Examples that are all the same: sums of squares, less the square of the sum, would leave only rounding."""
    x, y = examples(1)
    batch = x.expand(30, -1), y.expand(30)
    noise = nf.estimate_noise(large(), classify, [batch], {}, exact=False)
    assert noise.trace < 1e-20


def test_compiled_models_are_seen() -> None:
    model = large()
    batch = examples(8)
    compiled = torch.compile(model, backend="eager")
    compiled(batch[0])
    exact = nf.estimate_noise(model, classify, [batch], {}, exact=True)
    fast = nf.estimate_noise(compiled, classify, [batch], {}, exact=False)
    torch.testing.assert_close(fast.trace, exact.trace, **TIGHT)
    assert not fast.fallback


class Branching(nn.Module):
    """A second branch that only some batches take."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = (nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2))

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        return self.always(x) + self.sometimes(x) if bool(both) else self.always(x)


def test_a_parameter_that_a_batch_does_not_reach_has_no_gradient_there() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    batches = [(*examples(6, seed), torch.tensor(both)) for seed, both in enumerate((True, False, True))]
    into, out_of = (
        [nf.Axis("sometimes.0.weight", 0), nf.Axis("sometimes.0.bias", 0)],
        [nf.Axis("sometimes.2.weight", 1)],
    )
    symmetries = {"sometimes": nf.DiagonalSymmetry(into, out_of)}

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0], batch[2]), batch[1], reduction="none")

    fast, exact = (nf.estimate_noise(model, loss, batches, symmetries, exact=one) for one in (False, True))
    assert_same(fast, exact)
    assert not fast.fallback

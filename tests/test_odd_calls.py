"""Calls of a forward pass that hide where examples are: the meter is right or refuses, and `.grad` is right always."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checks
import noetherflow as nf
import oracles

Call = Callable[[Tensor], Tensor]
SIZE = 6


class Between(nn.Module):
    """Two layers, and a call between them."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.inner, self.call, self.outer = nn.Linear(5, 4), call, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.call(self.inner(x)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def batch_of(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5).double(), torch.randn(size, 2).double()


def written_in_parts(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[:, :2].copy_(h[:, :2])
    y.select(1, 2).add_(h[:, 3])
    return y


def mixed_through_a_view(h: Tensor) -> Tensor:
    y = h.clone()
    y[:, :2].add_(h.flip(0)[:, :2])
    return y


APART: dict[str, Call] = {
    "nan_to_num": lambda h: h.nan_to_num(),
    "fmax": lambda h: torch.fmax(h, torch.zeros((), dtype=h.dtype)),
    "nansum": lambda h: h.nansum(1, keepdim=True) * torch.ones(4).double(),
    "fake quantisation": lambda h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127),
    "written in parts": written_in_parts,
}
JOINED: dict[str, Call] = {
    "nanmean": lambda h: h - h.nanmean(0),
    "nansum over examples": lambda h: h - h.nansum(0) / len(h),
    "nanmedian": lambda h: h - h.nanmedian(0).values,
    "fmax of neighbours": lambda h: torch.fmax(h, h.roll(1, 0)),
    "mean without NaN": lambda h: h - h.nan_to_num().mean(0),
    "mixed through a view": mixed_through_a_view,
}


@pytest.mark.parametrize("name", [*APART, *JOINED])
def test_gradients_are_right_and_numbers_right_or_refused(name: str) -> None:
    model, batch = Between((APART | JOINED)[name]).double(), batch_of()
    plain = copy.deepcopy(model)
    loss(plain, batch).mean().backward()
    meter = nf.NoiseMeter(model, {})
    try:
        with meter.step(batch):
            loss(model, batch).mean().backward()
    except nf.CoupledExamplesError:
        assert name in JOINED or name == "written in parts"
    else:
        assert name in APART
        expected = oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], {})
        checks.noise_is(meter.noise, expected)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_views_of_other_numbers_have_their_gradient() -> None:
    """The sign of a lazy conjugate, and a complex view of real numbers."""

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            turned = x[:, :3] * torch.view_as_complex(self.w).conj().imag
            return turned[:, :2] + torch.fft.rfft(x[:, :4] * torch.view_as_complex(self.w)[0]
                                                   .real)[:, :2].real  # fmt: skip

    model, batch = Complex().double(), batch_of()
    loss(model, batch).mean().backward()
    plain = model.w.grad
    model.w.grad = None
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        loss(model, batch).mean().backward()
    torch.testing.assert_close(model.w.grad, plain)
    checks.noise_is(meter.noise, oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], {}))


def test_answers_that_depend_on_numbers_of_rows_are_not_kept() -> None:
    rows = torch.arange(SIZE)

    def scattered(h: Tensor) -> Tensor:
        return torch.scatter_reduce(torch.zeros_like(h), 0, rows[:, None].expand(-1, 4), h, "sum")

    model, batch = Between(scattered).double(), batch_of()
    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        loss(model, batch).mean().backward()
    rows //= 2
    with pytest.raises(nf.CoupledExamplesError), meter.step(batch):
        loss(model, batch).mean().backward()


def test_parameters_that_are_replaced_are_no_longer_known() -> None:
    model, batch = Between(torch.tanh).double(), batch_of()
    meter = nf.NoiseMeter(model, {})
    model.outer = nn.Linear(4, 2).double()
    with pytest.raises(nf.SettingsError, match=r"outer\.weight.*reset"), meter.step(batch):
        pass
    meter.reset()
    with meter.step(batch):
        loss(model, batch).mean().backward()
    checks.noise_is(meter.noise, oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], {}))


def test_random_numbers_of_training_stay_what_they_are() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.outer = nn.Parameter(torch.randn(1, 2, 5)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            keys = x[:, None].expand(-1, 3, -1)
            seen = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), keys, keys, dropout_p=0.3)
            return self.outer(seen.sum(1))

    model, batch = Queries().double(), batch_of()
    outcomes = []
    for measured in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        if measured:
            with nf.NoiseMeter(model, {}).step(batch):
                loss(model, batch).mean().backward()
        else:
            loss(model, batch).mean().backward()
        outcomes.append((torch.get_rng_state(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (state, plain), (after, mine) = outcomes
    assert torch.equal(state, after)
    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def test_nothing_stays_at_tensors_that_the_user_keeps() -> None:
    kept: list[Tensor] = []
    model, batch = Between(lambda h: kept.append(h.detach()) or h).double(), batch_of()
    with nf.NoiseMeter(model, {}).step(batch):
        loss(model, batch).mean().backward()
    assert not vars(kept[0])
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    assert torch.equal(torch.load(file)[0], kept[0])


def test_noise_that_drowns_in_rounding_is_no_number() -> None:
    """Its twin in float64 is measured."""
    x, y = 1 + 1e-4 * torch.randn(SIZE, 5), 100 + 1e-4 * torch.randn(SIZE, 2)
    for dtype in (torch.float32, torch.float64):
        model, batch = nn.Linear(5, 2).to(dtype), (x.to(dtype), y.to(dtype))
        meter = nf.NoiseMeter(model, {})
        with meter.step(batch):
            loss(model, batch).mean().backward()
        if dtype is torch.float32:
            assert meter.skipped == 1
            with pytest.raises(nf.EmptyDataError, match="rounding"):
                assert meter.noise
        else:
            expected = oracles.pooled(model, [oracles.examples_of_step(model, loss, batch)], {})
            torch.testing.assert_close(meter.noise.trace, expected.trace, rtol=1e-4, atol=0)


def test_inputs_that_nobody_needs_may_be_written_over() -> None:
    model = nn.Linear(5, 5).double()
    model.weight.requires_grad_(False)
    x = torch.randn(SIZE, 5).double()
    meter = nf.NoiseMeter(model, {})
    with meter.step(x):
        y = x.clone()
        z = model(y)
        y += z.detach()
        (z * y).square().mean(1).mean().backward()
    assert model.bias.grad is not None


def test_a_row_that_counts_from_the_end_is_refused_as_without_a_meter() -> None:
    model, ids = nn.Embedding(4, 2), torch.tensor([[0], [-1]])
    with pytest.raises(IndexError):
        model(ids)
    with pytest.raises(IndexError), nf.NoiseMeter(model, {}).step(ids):
        model(ids)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_of_probabilities_refuse_nan_and_are_measured(reduction: str) -> None:
    model, (x, y) = Between(torch.tanh).double(), batch_of()
    batch = x, (y > 0).double()

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor], reduction: str = "none") -> Tensor:
        values = F.binary_cross_entropy(model(batch[0]).sigmoid(), batch[1], reduction=reduction)
        return values.mean(1) if reduction == "none" else values

    meter = nf.NoiseMeter(model, {})
    with meter.step(batch):
        losses(model, batch, reduction).mean().backward()
    checks.noise_is(meter.noise, oracles.pooled(model, [oracles.examples_of_step(model, losses, batch)], {}))


def test_a_first_step_in_which_all_examples_are_alike_decides_nothing() -> None:
    """Equal numbers of rows: nothing changes with the examples, until the next step."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.outer = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.outer(torch.tanh(self.words(ids)))

    model, y = Words().double(), torch.randn(SIZE, 2).double()
    steps = [(torch.full((SIZE,), 2), y), (torch.arange(SIZE) % 5, y)]
    meter = nf.NoiseMeter(model, {})
    seen = []
    for batch in steps:
        seen.append(oracles.examples_of_step(model, loss, batch))
        with meter.step(batch):
            loss(model, batch).mean().backward()
    assert not meter.unmeasured
    checks.noise_is(meter.noise, oracles.pooled(model, seen, {}))

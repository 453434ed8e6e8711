"""A forecast of operations without a second derivative: computed in another way, or refused in a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf
from noetherflow.forecasting.differentiable import Differentiable, embedding_bag, reason_of
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.report import forecast as page
from noetherflow.report import forecast_words

SETTINGS = nf.SGD(lr=0.1, batch_size=8, weight_decay=1e-3)
IDS = torch.tensor([[3, 0, 2, 2], [0, 0, 0, 0], [1, 4, 0, 3]])
FLAT, OFFSETS = torch.tensor([3, 0, 2, 2, 1, 4]), torch.tensor([0, 2, 2, 5])
LAYOUTS: dict[str, dict[str, Any]] = {
    "mean": {"input": IDS},
    "sum": {"input": IDS, "mode": "sum"},
    "padding": {"input": IDS, "padding_idx": 0},
    "padding from the end": {"input": IDS, "padding_idx": -5, "mode": "sum"},
    "weights": {"input": IDS, "mode": "sum", "per_sample_weights": torch.rand(3, 4, dtype=torch.float64) + 0.5},
    "ragged": {"input": FLAT, "offsets": OFFSETS},
    "ragged sum with padding": {"input": FLAT, "offsets": OFFSETS, "mode": "sum", "padding_idx": 2},
    "last offset": {"input": FLAT, "offsets": torch.tensor([0, 2, 2, 6]), "include_last_offset": True},
    "int32": {"input": FLAT.int(), "offsets": OFFSETS.int(), "padding_idx": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_bags_are_those_of_torch_with_their_gradient(layout: str) -> None:
    given = LAYOUTS[layout]
    table = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    expected = functional.embedding_bag(weight=table, **given)
    with Differentiable():
        got = functional.embedding_bag(weight=table, **given)
    torch.testing.assert_close(got, expected)
    factors = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * factors).sum(), table)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients)
    # The twin: the other of sum and mean.
    other = embedding_bag((), {"weight": table, **given, "mode": "mean" if given.get("mode") == "sum" else "sum"})
    assert other is not None
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_is_not_a_sum_of_rows_stays_as_it_is(options: dict[str, Any]) -> None:
    assert embedding_bag((IDS, torch.randn(5, 2)), options) is None


class Bags(nn.Module):
    """Means of rows of a table, by nn.EmbeddingBag or by nn.Embedding, into a small network."""

    def __init__(self, mode: str = "mean", *, rows: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4) if rows else nn.EmbeddingBag(7, 4, mode=mode)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, ids: Tensor) -> Tensor:
        got: Tensor = self.table(ids)
        result: Tensor = self.net(got.mean(1) if got.ndim == 3 else got)
        return result


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    result: Tensor = (model(batch[0]) - batch[1]).square().mean(1)
    return result


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(7, (8, 3), generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(3)]


def bags(mode: str = "mean", *, rows: bool = False) -> Bags:
    torch.manual_seed(0)
    return Bags(mode, rows=rows).double()


def test_the_hessian_of_bags_is_the_slope_of_their_gradient() -> None:
    model = bags()
    given = MeanLoss(model, loss, data(), SETTINGS, torch.float64)
    generator = torch.Generator().manual_seed(1)
    vector = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in given.params.items()}
    (product,) = given.multiply(given.params, 0, [vector])
    sides = [
        given.gradients({n: t + sign * 1e-5 * vector[n] for n, t in given.params.items()}, [0])[0][1]
        for sign in (1, -1)
    ]
    for name, part in product.items():
        torch.testing.assert_close(part, (sides[0][name] - sides[1][name]) / 2e-5, rtol=1e-6, atol=1e-8)
    assert float(product["table.weight"].norm()) > 0.01


def test_a_forecast_of_bags_is_that_of_an_embedding_and_a_mean() -> None:
    first, second = (nf.forecast(bags(rows=rows), loss, data(), SETTINGS, progress=False) for rows in (False, True))
    assert first.trace.now.known
    for name in first.blocks:
        torch.testing.assert_close(first.blocks[name].now.value, second.blocks[name].now.value)
    torch.testing.assert_close(first.largest.now.value, second.largest.now.value)
    # The twin: sums of rows have another curvature.
    sums = nf.forecast(bags("sum"), loss, data(), SETTINGS, progress=False)
    assert abs(sums.trace.now.value / first.trace.now.value - 1) > 0.1


def test_a_missing_second_derivative_is_said_once_with_a_remedy(tmp_path: Path) -> None:
    forecast = nf.forecast(bags("max"), loss, data(), SETTINGS, progress=False)
    reason = forecast.trace.now.why
    assert "_embedding_bag_backward" in reason
    assert "write it by nn.Embedding and a maximum, in place of nn.EmbeddingBag" in reason
    text = " ".join(str(forecast).split())
    assert text.count(reason) == 1
    assert text.count("_embedding_bag_backward") == 1
    assert "sharpness What becomes of the sharpness cannot be told: see above." in text
    # Nothing contradicts that no trace is known, and what is known stays.
    assert "smaller traces" not in text
    assert "random vectors" not in text
    assert "Tr H by parameter" not in text
    assert forecast.critical.now.known
    assert str(forecast.critical.now) in text
    words = forecast_words.sentences(forecast)
    assert sum(text.count("_embedding_bag_backward") for text in words) == 1
    page.write(tmp_path / "page.html", forecast, "bags")
    shown = re.sub(r"<script.*?</script>", "", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    assert shown.count("_embedding_bag_backward") == 1
    assert "Tr H of the parameters cannot be told: see above." in shown
    assert "every drift is zero" not in shown
    # The twin: a forecast that is told has the traces of the parameters.
    told = str(nf.forecast(bags(), loss, data(), SETTINGS, progress=False))
    assert "Tr H by parameter, from random vectors" in told
    assert "see above" not in told


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented", "a softmax"),
        ("the derivative for '_cudnn_rnn_backward' is not implemented", "nn.LSTMCell"),
        ("a function is marked with @once_differentiable", "a backward pass that can be differentiated"),
        ("the derivative for 'ctc_loss_backward' is not implemented.", "operations of torch that have one"),
    ],
)
def test_every_reason_has_a_remedy(message: str, remedy: str) -> None:
    assert reason_of(message).startswith(f"an operation has no second derivative ({message.rstrip('.')}): write it by ")
    assert remedy in reason_of(message)

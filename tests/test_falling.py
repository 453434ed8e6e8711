"""Whether the loss still falls, against a linear regression whose loss is known in closed form."""

from collections.abc import Callable

import pytest
import torch

import noetherflow as nf
from noetherflow import _falling
from noetherflow.report.rows import rows_of
from noetherflow.report.words import sentences

TRUE = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
SETTINGS = nf.SGD(lr=0.2, momentum=0.5, batch_size=1, weight_decay=0.3)


def sample(w: torch.Tensor, count: int, seed: int) -> nf.NoiseMoments:
    """Moments of the gradients of (w x - y)^2 / 2 with y = TRUE x + noise; the mean gradient is w - TRUE."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(w), generator=generator, dtype=torch.float64)
    y = x @ TRUE + torch.randn(count, generator=generator, dtype=torch.float64)
    return nf.NoiseMoments.of({"w": x * (x @ w - y)[:, None]}, {})


def falls(w: torch.Tensor, count: int = 30, samples: int = 600) -> list[_falling.Fall]:
    made = [_falling.fall_of(sample(w, count, seed), SETTINGS, {"w": w}) for seed in range(samples)]
    return [fall for fall in made if fall is not None]


@pytest.mark.parametrize("w", [TRUE, TRUE / 1.3, 0.5 * TRUE, 0 * TRUE], ids=["minimum", "decayed", "away", "zero"])
def test_the_fall_is_that_of_the_loss_of_the_source_in_a_step_without_noise(w: torch.Tensor) -> None:
    # A step of lr / (1 - momentum) along the mean gradient and the weight decay, to first order.
    expected = float(0.4 * (w - TRUE) @ (w - TRUE + 0.3 * w))
    values = torch.tensor([fall.value for fall in falls(w)])
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < 4 * error
    # Twin: with the bias of the mean of 30 examples.
    biased = values + 0.4 * torch.tensor([float(sample(w, 30, s).trace) / 29 for s in range(len(values))])
    assert float(biased.mean()) - expected > 4 * error


def test_where_the_loss_does_not_fall_the_error_is_a_bound_and_a_fall_is_rare() -> None:
    # At w = TRUE / 1.3 the mean gradient is balanced by weight decay.
    for w in (TRUE, TRUE / 1.3):
        seen = falls(w)
        spread = float(torch.tensor([fall.value for fall in seen]).std())
        bound = float(torch.tensor([fall.error for fall in seen]).mean())
        assert spread < bound < 3 * spread
        assert sum(fall.certain for fall in seen) < 0.025 * len(seen)
    # Twins: away from the minimum the fall is certain, and so it would be if weight decay were forgotten.
    assert all(fall.certain for fall in falls(0.2 * TRUE, count=300, samples=50))
    forgotten = [
        _falling.fall_of(sample(TRUE / 1.3, 2000, s), nf.SGD(lr=0.2, batch_size=1), {"w": TRUE / 1.3})
        for s in range(50)
    ]
    assert sum(fall is not None and fall.certain for fall in forgotten) > 25


def test_what_is_not_known_is_not_said() -> None:
    noise = sample(0 * TRUE, 300, 0)
    assert _falling.fall_of(noise, nf.AdamW(lr=0.1, batch_size=1), {"w": TRUE}) is None
    assert _falling.fall_of(sample(TRUE, 1, 0), SETTINGS, {"w": TRUE}) is None
    assert len(_falling.remarks(noise, SETTINGS, {"w": 0 * TRUE})) == 2
    unknown = nf.NoiseMoments.of({"w": torch.full((3, 4), torch.nan)}, {})
    assert _falling.remarks(unknown, SETTINGS, {"w": TRUE}) == (_falling.WHILE_IT_STAYS,)


def regression(scale: float) -> tuple[torch.nn.Module, Callable[..., torch.Tensor], list[tuple[torch.Tensor, ...]]]:
    """A linear pair that is as far from the best fit as the scale says; 1 is the best fit."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).double()
    x = torch.randn(400, 4, dtype=torch.float64)
    with torch.no_grad():
        y = net(x) / scale + torch.randn(400, 1, dtype=torch.float64)
    data = [(a, b) for a, b in zip(x.split(50), y.split(50), strict=True)]
    return net, lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1) / 2, data


@pytest.mark.parametrize(("scale", "falling"), [(0.1, True), (1.0, False)])
def test_the_table_and_the_words_say_that_distances_change_while_the_loss_falls(scale: float, falling: bool) -> None:
    analysis = nf.analyze(*regression(scale), nf.SGD(lr=0.05, batch_size=10, weight_decay=1e-3), progress=False)
    words = " ".join(sentences(analysis, rows_of(analysis)))
    for text in (" ".join(str(analysis).split()), words):
        assert _falling.WHILE_IT_STAYS in text
        assert (_falling.STILL_FALLS in text) == falling
    assert "While the function of the network stays, training with these settings moves there by itself" in words


def test_the_table_says_what_the_equilibrium_is_worth_on_data_that_was_held_out() -> None:
    net, loss, data = regression(0.1)
    settings = nf.SGD(lr=0.05, batch_size=10, weight_decay=1e-3)
    analysis = nf.analyze(net, loss, data[:6], settings, holdout=data[6:], progress=False)
    (report,) = analysis.reports
    said = f"and from {report.holdout_before:.3g} to {report.holdout_after:.3g} on data that was held out"
    assert said in " ".join(str(analysis).split())
    # The twin: without such data nothing is said of it.
    assert "held out" not in str(nf.analyze(net, loss, data[:6], settings, progress=False))

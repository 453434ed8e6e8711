"""The noise scale where a model, an optimizer or a state is not what the first examples show."""

import math

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf


def words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rare tokens, 4 a text, and what is to be told of each text."""
    tokens = torch.multinomial(1 / torch.arange(1, 301.0), 4 * 16, replacement=True, generator=generator).view(16, 4)
    return tokens, torch.randn(16, 1, generator=generator, dtype=torch.float64)


def test_entries_without_an_earlier_gradient_have_no_part_in_the_metric() -> None:
    """Epsilon alone would multiply the squares of the first gradient of a token by 1e8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 3), nn.Flatten(), nn.Linear(12, 1)).double()
    model.register_module("unused", nn.Linear(2, 2).double())
    named = {name: p for name, p in model.named_parameters() if "unused" not in name}
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1, window=math.inf)
    generator, pairs, fresh = torch.Generator().manual_seed(0), [], 0
    for _ in range(5):
        x, y = words(generator)
        losses = (model(x) - y).square().sum(1)
        rows = [torch.autograd.grad(each, list(named.values()), retain_graph=True) for each in losses]
        trace = square = 0.0
        for index, parameter in enumerate(named.values()):
            each = torch.stack([row[index] for row in rows])
            state = optimizer.state.get(parameter)
            root = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() if state else torch.zeros_like(parameter)
            metric = torch.where(root > 0, 1 / (root + 1e-8), 0.0)
            fresh += int(((root == 0) & each.any(0)).sum()) if state else 0
            scatter = float((metric * (each - each.mean(0)).square()).sum()) / 15
            trace, square = trace + scatter, square + float((metric * each.mean(0).square()).sum()) - scatter / 16
        pairs.append((trace, square))
        optimizer.zero_grad()
        with watch.step(x):
            (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    estimate = watch.preconditioned
    assert estimate is not None
    assert fresh > 20
    assert estimate.trace == pytest.approx(sum(each for each, _ in pairs[1:]) / 4, rel=1e-9)
    assert estimate.norm_sq == pytest.approx(sum(each for _, each in pairs[1:]) / 4, rel=1e-9)

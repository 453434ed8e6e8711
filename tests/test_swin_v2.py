"""Swin v2: queries and keys of length one, norms after the blocks, and a network that makes the bias of positions."""

import logging
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

import noetherflow as nf

# Per head of 4: a scale of the queries, a scale of the keys, and matrices between values and outputs; the last norm.
WITHOUT_HIDDEN_NEURONS = 2 * (1 + 1 + 4) + 8


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def swin(hidden: int) -> nn.Module:
    """A block with two heads; `hidden` neurons make the bias of positions, 512 as transformers has it."""
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=8, patch_size=2, num_channels=2, embed_dim=8, depths=[1], num_heads=[2], window_size=2, num_labels=3
    )
    model = transformers.Swinv2ForImageClassification(config).eval()
    for module in model.modules():
        bias = getattr(module, "continuous_position_bias_mlp", None)
        if bias is not None and hidden != bias[0].out_features:
            bias[0], bias[2] = nn.Linear(2, hidden), nn.Linear(hidden, 2, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def squares(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images).logits.square().mean(1)


IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden", [6, 512])
def test_the_hidden_neurons_of_the_position_bias_are_rescaled(hidden: int) -> None:
    model = swin(hidden)
    params = dict(model.named_parameters())
    sizes = [symmetry.identity(params).shape for symmetry in nf.find_symmetries(model, squares, IMAGES).values()]
    # Matrices count by their diagonals.
    assert sum(shape[0] if shape else 1 for shape in sizes) == WITHOUT_HIDDEN_NEURONS + hidden


def test_null_spaces_see_as_many() -> None:
    model = swin(6)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1.0  # so large that a scale in front of a norm is no symmetry
    result = nf.check_completeness(model, squares, IMAGES)
    assert result.discovery.decided, result.discovery.note
    assert (result.found, result.discovered) == (WITHOUT_HIDDEN_NEURONS + 6, WITHOUT_HIDDEN_NEURONS + 6)

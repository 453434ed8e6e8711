"""How many operations a measured step takes on a device, where each is a launch: a few times those of a plain step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import noetherflow as nf

Built = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Callable[[int], Any]]
# Operations that move nothing: no kernel is launched for a view.
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "select", "slice", "unsqueeze", "squeeze", "detach",
    "alias", "as_strided", "split", "unbind", "unfold", "_reshape_alias", "squeeze_", "empty", "new_empty",
    "empty_like", "narrow",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def continue_text(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def mlp() -> Built:
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    return model, classify, lambda size: (torch.randn(size, 20), torch.randint(5, (size,)))


def cnn() -> Built:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return model, classify, lambda size: (torch.randn(size, 3, 8, 8), torch.randint(5, (size,)))


def gpt2() -> Built:
    import transformers

    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=16, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config), continue_text, lambda size: torch.randint(50, (size, 12))


def llama() -> Built:
    import transformers

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=50)  # fmt: skip
    return transformers.LlamaForCausalLM(config), continue_text, lambda size: torch.randint(50, (size, 12))


def launches(built: Built, size: int, *, grams: bool) -> tuple[int, int]:
    """Of a plain step, and of a measured step after the first."""
    model, loss, batch_of = built
    batch = batch_of(size)
    symmetries = nf.find_symmetries(model, loss, batch) if grams else {}
    meter = nf.NoiseMeter(model, symmetries)
    counts = []
    for measured in (False, True, True):
        model.zero_grad()
        launched = Launches()
        with launched:
            if measured:
                with meter.step(batch):
                    loss(model, batch).mean().backward()
            else:
                loss(model, batch).mean().backward()
        counts.append(launched.count)
    return counts[0], counts[2]


@pytest.mark.parametrize("build", [mlp, cnn, gpt2, llama], ids=lambda build: build.__name__)
def test_a_measured_step_launches_a_few_times_a_plain_one(
    build: Callable[[], Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "reference")
    built = build()
    plain, measured = launches(built, 4, grams=False)
    assert measured <= 4 * plain
    # Whatever the batch.
    assert launches(built, 16, grams=False)[1] == measured


def test_a_loop_over_examples_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: chunks of a single example."""
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "reference")
    monkeypatch.setattr("noetherflow.noise.kernels.reference._CACHE", 1)
    monkeypatch.setattr("noetherflow.noise.kernels.costs.Costs.prefer_tokens", lambda *_: False)
    built = gpt2()
    assert launches(built, 16, grams=True)[1] > launches(built, 4, grams=True)[1]

"""The models that are measured, and the truth about each: a backward pass in float64 for every single example."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional


class Built(NamedTuple):
    """A model, its loss of every example, and a batch."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Any

    @property
    def size(self) -> int:
        return len(self.batch[0]) if isinstance(self.batch, tuple) else len(self.batch)

    @property
    def unbiased(self) -> float:
        """From a mean over the batch to an estimate of the noise of the source it was drawn from."""
        return self.size / (self.size - 1)

    def example(self, index: int) -> Any:
        one = slice(index, index + 1)
        return tuple(part[one] for part in self.batch) if isinstance(self.batch, tuple) else self.batch[one]

    def trace(self, squares: float, total: list[Tensor]) -> float:
        """Tr Sigma, unbiased, from the squares of all gradients and their sum."""
        mean = sum(float(part.double().square().sum()) for part in total) / self.size
        return (squares - mean) / (self.size - 1)

    def in_double(self) -> "Built":
        batch = (self.batch[0].double(), self.batch[1]) if isinstance(self.batch, tuple) else self.batch
        return Built(copy.deepcopy(self.model).double(), self.loss, batch)


def one_by_one(built: Built) -> float:
    """Tr Sigma from a backward pass for every single example."""
    parameters = list(built.model.parameters())
    squares, total = 0.0, [torch.zeros_like(one) for one in parameters]
    for index in range(built.size):
        gradients = torch.autograd.grad(built.loss(built.model, built.example(index)).sum(), parameters)
        squares += sum(float(part.square().sum()) for part in gradients)
        for sums, part in zip(total, gradients, strict=True):
            sums += part
    return built.trace(squares, total)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def continue_text(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def match(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean((1, 2))


def mlp() -> Built:
    layers = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return Built(nn.Sequential(*layers), classify, (torch.randn(256, 784), torch.randint(10, (256,))))


def cnn() -> Built:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return Built(nn.Sequential(*layers), classify, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))))


def gpt2() -> Built:
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(n_layer=4, n_head=4, n_embd=256, vocab_size=2000, n_positions=128, **still)
    return Built(transformers.GPT2LMHeadModel(config), continue_text, torch.randint(2000, (16, 128)))


def llama() -> Built:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=2000, **sizes)
    return Built(transformers.LlamaForCausalLM(config), continue_text, torch.randint(2000, (16, 128)))


def tokens(count: int) -> Built:
    """Linear layers that see 2,048 tokens in all, so many of them in an example."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)]
    shape = (2048 // count, count, 256)
    return Built(nn.Sequential(*layers), match, (torch.randn(shape), torch.randn(shape)))


MODELS = {"MLP": mlp, "CNN": cnn, "GPT-2": gpt2, "Llama": llama}
SWEEP = [2**power for power in range(10)]


def build(name: str) -> Built:
    torch.manual_seed(0)
    return tokens(int(name)) if name.isdigit() else MODELS[name]()

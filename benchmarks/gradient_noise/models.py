"""The models that are measured, and the truth about each: a backward pass in float64 for every single example."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Losses = Callable[[nn.Module, Any], Tensor]


class Built(NamedTuple):
    """A model, its loss of every example, and a batch.

    Where a package wants position ids of its own for every example, `told` is the loss that gives it these.
    """

    model: nn.Module
    loss: Losses
    batch: Any
    told: Losses | None = None

    @property
    def size(self) -> int:
        return len(self.batch[0]) if isinstance(self.batch, tuple) else len(self.batch)

    @property
    def unbiased(self) -> float:
        """From a mean over the batch to an estimate of the noise of the source it was drawn from."""
        return self.size / (self.size - 1)

    @property
    def formed(self) -> int:
        """Numbers of weights' gradients that are formed: example by example, but once if there is but one token."""
        maps = (one for one in self.model.modules() if not isinstance(one, nn.Embedding))
        weights = [getattr(one, "weight", None) for one in maps]
        count = sum(one.numel() for one in weights if one is not None and one.ndim > 1)
        return count * (1 if isinstance(self.batch, tuple) and self.batch[0].ndim == 2 else self.size)

    def examples(self, part: slice) -> Any:
        return tuple(one[part] for one in self.batch) if isinstance(self.batch, tuple) else self.batch[part]

    def trace(self, squares: float, total: list[Tensor]) -> float:
        """Tr Sigma, unbiased, from the squares of all gradients and their sum."""
        mean = sum(float(part.double().square().sum()) for part in total) / self.size
        return (squares - mean) / (self.size - 1)

    def in_double(self) -> "Built":
        batch = self.batch
        if isinstance(batch, tuple):
            batch = tuple(one.double() if one.is_floating_point() else one for one in batch)
        return Built(copy.deepcopy(self.model).double(), self.loss, batch)


def one_by_one(built: Built) -> float:
    """Tr Sigma from a backward pass for every single example."""
    parameters = list(built.model.parameters())
    squares, total = 0.0, [torch.zeros_like(one) for one in parameters]
    for index in range(built.size):
        losses = built.loss(built.model, built.examples(slice(index, index + 1)))
        gradients = torch.autograd.grad(losses.sum(), parameters)
        squares += sum(float(torch.linalg.vector_norm(part)) ** 2 for part in gradients)
        for sums, part in zip(total, gradients, strict=True):
            sums += part
    return built.trace(squares, total)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def continue_text(model: nn.Module, tokens: Tensor, **told: Tensor) -> Tensor:
    logits = model(input_ids=tokens, **told).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def continue_text_by_position(model: nn.Module, tokens: Tensor) -> Tensor:
    return continue_text(model, tokens, position_ids=torch.arange(tokens.shape[1]).expand(tokens.shape))


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
    import transformers

    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(n_layer=4, n_head=4, n_embd=256, vocab_size=2000, n_positions=128, **still)
    model = transformers.GPT2LMHeadModel(config)
    return Built(model, continue_text, torch.randint(2000, (16, 128)), continue_text_by_position)


def llama() -> Built:
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=2000, **sizes)
    return Built(transformers.LlamaForCausalLM(config), continue_text, torch.randint(2000, (16, 128)))


def linear() -> Built:
    """Linear layers that see 2,048 tokens in all; in examples of the most tokens that are tried."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)]
    shape = (2048 // SWEEP[-1], SWEEP[-1])
    return Built(nn.Sequential(*layers, nn.Linear(256, 10)), match, (torch.randn(*shape, 256), torch.randn(*shape, 10)))


def in_examples_of(built: Built, tokens: int) -> Built:
    """The same model and the same tokens, with that many in an example."""
    return built._replace(batch=tuple(one.reshape(-1, tokens, one.shape[-1]) for one in built.batch))


MODELS = {"MLP": mlp, "CNN": cnn, "GPT-2": gpt2, "Llama": llama}
SWEEP = [2**power for power in range(10)]


def build(name: str) -> Built:
    torch.manual_seed(0)
    return linear() if name == "linear" else MODELS[name]()

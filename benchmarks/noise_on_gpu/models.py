"""The models that are measured, with symmetries that are declared by hand."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf


@dataclass
class Built:
    """A model, its batch, and what is declared about them.

    Args:
        model: The model.
        loss: One loss per example, shape (B,), of float32.
        batch: Tensors with an entry per example.
        precision: The type of most of the computation.
        symmetries: Declared by hand: to find them takes longer than the benchmark.
        autocast: Whether the forward pass runs under autocast.
    """

    model: nn.Module
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    batch: tuple[Tensor, ...]
    precision: torch.dtype
    symmetries: dict[str, nf.Symmetry]
    autocast: bool = False

    @property
    def size(self) -> int:
        """The number of examples B."""
        return len(self.batch[0])

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The losses, in the precision of the model."""
        with torch.autocast(batch[0].device.type, dtype=self.precision, enabled=self.autocast):
            return self.loss(model, batch)

    def example(self, index: int) -> tuple[Tensor, ...]:
        """A batch of size 1."""
        return tuple(tensor[index : index + 1] for tensor in self.batch)

    def in_float32(self) -> "Built":
        """A copy of the model in float32, without autocast."""
        batch = tuple(t.float() if t.is_floating_point() else t for t in self.batch)
        return Built(copy.deepcopy(self.model).float(), self.loss, batch, torch.float32, self.symmetries)


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    (tokens,) = batch
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def classified(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


def llama(device: torch.device, quick: bool) -> Built:
    import transformers

    heads, width, hidden, layers = (2, 32, 64, 2) if quick else (12, 768, 3072, 12)
    size, length, vocabulary = (4, 16, 97) if quick else (16, 2048, 32_000)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with device:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.randint(vocabulary, (size, length))
    symmetries: dict[str, nf.Symmetry] = {}
    for layer in range(layers):
        name, depth = f"model.layers.{layer}", width // heads
        for head in range(heads):
            rows = {"start": head * depth, "stop": (head + 1) * depth}
            value, out = nf.Axis(f"{name}.self_attn.v_proj.weight", 0, **rows), f"{name}.self_attn.o_proj.weight"
            symmetries[f"values {layer}.{head}"] = nf.MatrixSymmetry([value], [nf.Axis(out, 1, **rows)])
        symmetries[f"hidden {layer}"] = nf.DiagonalSymmetry(
            [nf.Axis(f"{name}.mlp.up_proj.weight", 0)], [nf.Axis(f"{name}.mlp.down_proj.weight", 1)]
        )
    return Built(model, next_token, (tokens,), torch.bfloat16, symmetries)


def gpt2(device: torch.device, quick: bool) -> Built:
    import transformers

    heads, width, layers = (2, 32, 2) if quick else (12, 768, 12)
    size, length, vocabulary = (4, 16, 97) if quick else (16, 1024, 50_257)
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        vocab_size=vocabulary,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        **still,
    )
    with device:
        model = transformers.GPT2LMHeadModel(config)
        tokens = torch.randint(vocabulary, (size, length))
    symmetries: dict[str, nf.Symmetry] = {}
    for layer in range(layers):
        name, depth = f"transformer.h.{layer}.attn", width // heads
        for head in range(heads):
            query, key, value = (
                [
                    nf.Axis(f"{name}.c_attn.{part}", dim, start, start + depth)
                    for part, dim in (("weight", 1), ("bias", 0))
                ]
                for start in (kind * width + head * depth for kind in range(3))
            )
            out = nf.Axis(f"{name}.c_proj.weight", 0, head * depth, (head + 1) * depth)
            symmetries[f"queries and keys {layer}.{head}"] = nf.MatrixSymmetry(query, key)
            symmetries[f"values {layer}.{head}"] = nf.MatrixSymmetry(value, [out])
    return Built(model, next_token, (tokens,), torch.bfloat16, symmetries, autocast=True)


class Bottleneck(nn.Module):
    """Three convolutions with GroupNorm, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False)
            for a, b, kernel, step in ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c.out_channels) for c in self.convolutions)
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False) if inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            h = norm(convolution(h))
            h = torch.relu(h) if index < 2 else h
        return torch.relu(h + self.shortcut(x))


def resnet(device: torch.device, quick: bool) -> Built:
    width, depths, groups = (8, (1, 1), 4) if quick else (64, (3, 4, 6, 3), 32)
    size, pixels, classes = (4, 32, 10) if quick else (64, 224, 1000)
    with device:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(groups, width), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, 2, 1))
        inputs = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(inputs, width * 2**stage, stride, groups))
                inputs = 4 * width * 2**stage
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
        batch = torch.randn(size, 3, pixels, pixels), torch.randint(classes, (size,))
    symmetries = {}
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            for index, convolution in enumerate(module.convolutions):
                rows = nf.Axis(f"{name}.convolutions.{index}.weight", 0, repeat=convolution.out_channels // groups)
                symmetries[f"groups {name}.{index}"] = nf.DiagonalSymmetry([rows])
    return Built(model, classified, batch, torch.float32, symmetries)


def mlp(device: torch.device, quick: bool) -> Built:
    widths, size = ((20, 32, 32, 10), 16) if quick else ((784, 4096, 4096, 4096, 10), 1024)
    with device:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        batch = torch.randn(size, widths[0]), torch.randint(widths[-1], (size,))
    symmetries: dict[str, nf.Symmetry] = {
        f"hidden {index}": nf.DiagonalSymmetry(
            [nf.Axis(f"{index}.weight", 0), nf.Axis(f"{index}.bias", 0)], [nf.Axis(f"{index + 2}.weight", 1)]
        )
        for index in range(0, 2 * len(widths) - 4, 2)
    }
    return Built(model, classified, batch, torch.float32, symmetries)


MODELS: dict[str, Callable[[torch.device, bool], Built]] = {"Llama": llama, "GPT-2": gpt2, "ResNet": resnet, "MLP": mlp}

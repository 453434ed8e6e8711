"""Architectures, each with the exact set of symmetries that it has: ZOO, and the textbook part of it, CLASSIC."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from animals import Animal, Call, ids, language, regression, sequential, tokens_of
from everyday import EVERYDAY
from language_models import TRANSFORMERS


class Gated(nn.Module):
    """down(f(gate x) * up x)."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.down, self.activation = nn.Linear(4, 3, bias=False), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """A block with a shortcut."""

    def __init__(self, *, project: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.short = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1) if project else nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.third(torch.relu(self.second(x))) + self.short(x))
        return self.head(x.mean((2, 3)))


class RMSNorm(nn.Module):
    """Written by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.rand(size) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Written by hand: heads of size 4, rotary embedding of some of it, fewer heads of keys, norms of q and k."""

    def __init__(self, heads: int = 2, groups: int = 2, rotary: str = "", part: int = 4, *, norm: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.rotary, self.part = heads, groups, rotary, part
        self.q, self.k, self.v = nn.Linear(6, 4 * heads), nn.Linear(6, 4 * groups), nn.Linear(6, 4 * groups)
        self.o = nn.Linear(4 * heads, 6)
        self.norms = nn.ModuleList([RMSNorm(4), RMSNorm(4)] if norm else [nn.Identity(), nn.Identity()])

    def rotate(self, x: Tensor) -> Tensor:
        if not self.rotary:
            return x
        turned, rest = x[..., : self.part], x[..., self.part :]
        here = {"device": x.device}
        angle = torch.arange(x.shape[-2], **here)[:, None] * 0.5 ** torch.arange(self.part // 2, **here)
        if self.rotary == "interleaved":
            angle = angle.repeat_interleave(2, -1)
            partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
        else:
            angle = torch.cat([angle, angle], -1)
            partner = torch.cat([-turned[..., self.part // 2 :], turned[..., : self.part // 2]], -1)
        angle = angle.to(x.dtype)
        return torch.cat([turned * angle.cos() + partner * angle.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q = self.q(x).view(count, length, self.heads, 4).transpose(1, 2)
        k, v = (one(x).view(count, length, self.groups, 4).transpose(1, 2) for one in (self.k, self.v))
        q, k = self.rotate(self.norms[0](q)), self.rotate(self.norms[1](k))
        k, v = (one.repeat_interleave(self.heads // self.groups, 1) for one in (k, v))
        future = torch.ones(length, length, device=x.device).triu(1).bool()
        weights = (q @ k.transpose(-1, -2) / 2).masked_fill(future, -torch.inf)
        return self.o((weights.softmax(-1) @ v).transpose(1, 2).reshape(count, length, -1))


class Stacked(nn.Module):
    """One parameter that holds the maps of all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hij,hjo->bho", x, self.a, self.b).square()


class Tied(nn.Module):
    """Token embeddings that are also the output layer, or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


class Factors(nn.Module):
    """Users and items, compared by the product of their vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(5, 3), nn.Embedding(6, 3)

    def forward(self, pairs: Tensor) -> Tensor:
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(-1)


class Twice(nn.Module):
    """A module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.shared(torch.relu(self.shared(x)))))


class Vision(nn.Module):
    """Patches, a class token, positions, and one block with the norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 8, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 6, 0.0, "relu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])


class Branches(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.left(x)), nn.functional.leaky_relu(self.right(x), 0.1)], -1))


class Adapted(nn.Module):
    """W x + B A x with W frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def hugging(kind: str) -> tuple[nn.Module, Any, Any]:
    logging.disable(logging.WARNING)
    small = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=9, **small)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=6, **sizes, **small)
        model = transformers.LlamaForCausalLM(config)
    elif kind == "lora":
        config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
            model = peft.get_peft_model(hugging("gpt2")[0], config)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(one)  # it starts at zero, where nothing can be measured
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 9}
        config = transformers.BertConfig(hidden_size=8, intermediate_size=6, **sizes, **small)
        model = transformers.BertForMaskedLM(config)
    logging.disable(logging.NOTSET)
    return model.eval(), language, ids(11, 3, 6)


def encoder(*, norm_first: bool, activation: str = "relu") -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 6, 0.0, activation, batch_first=True, norm_first=norm_first)
    return regression(layer.eval(), (5, 8), (5, 8))


def normed(size: int = 4) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(size)
    layer.running_mean.normal_()
    return layer


Linear, ReLU = nn.Linear, nn.ReLU
CLASSIC = [
    Animal("ReLU MLP", lambda: sequential((4,), (2,), Linear(4, 3), ReLU(), Linear(3, 5), ReLU(), Linear(5, 2)),
           {("diagonal", 3): 1, ("diagonal", 5): 1}),
    Animal("leaky ReLU in place", lambda: sequential(
        (4,), (2,), Linear(4, 3), nn.LeakyReLU(0.1, inplace=True), Linear(3, 2)), {("diagonal", 3): 1}),
    Animal("PReLU", lambda: sequential((4,), (2,), Linear(4, 3), nn.PReLU(3), Linear(3, 2)), {("diagonal", 3): 1}),
    Animal("linear chain", lambda: sequential((2,), (2,), Linear(2, 5, bias=False), Linear(5, 2, bias=False)),
           {("matrix", 15): 1}),
    Animal("linear chain with biases", lambda: sequential((3,), (2,), Linear(3, 3), Linear(3, 2)), {("matrix", 6): 1}),
    Animal("tanh", lambda: sequential((2,), (2,), Linear(2, 5), nn.Tanh(), Linear(5, 2))),
    Animal("GELU", lambda: sequential((2,), (2,), Linear(2, 5), nn.GELU(), Linear(5, 2))),
    Animal("SiLU", lambda: sequential((2,), (2,), Linear(2, 5), nn.SiLU(), Linear(5, 2))),
    Animal("ReLU squared", lambda: sequential(
        (2,), (2,), Linear(2, 4), Call(lambda x: torch.relu(x) ** 2), Linear(4, 2)), {("diagonal", 4): 1}),
    Animal("SwiGLU", lambda: regression(Gated(functional.silu), (3,), (3,)), {("diagonal", 4): 1}),
    Animal("GeGLU", lambda: regression(Gated(functional.gelu), (3,), (3,)), {("diagonal", 4): 1}),
    Animal("ReGLU", lambda: regression(Gated(torch.relu), (3,), (3,)), {("diagonal", 4): 2}),
    Animal("bilinear gate", lambda: regression(Gated(lambda x: x), (3,), (3,)), {("diagonal", 4): 2}),
    Animal("convolutions, pooling, flatten", lambda: sequential(
        (2, 8, 8), (2,), nn.Conv2d(2, 3, 3, padding=1), ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), Linear(4, 2)), {("diagonal", 3): 1, ("diagonal", 4): 1}),
    Animal("convolution, flatten", lambda: sequential(
        (2, 4, 4), (2,), nn.Conv2d(2, 3, 3), ReLU(), nn.Flatten(), Linear(12, 2)), {("diagonal", 3): 1}),
    Animal("convolution in one dimension", lambda: sequential(
        (2, 8), (2,), nn.Conv1d(2, 3, 3), nn.Conv1d(3, 4, 3), ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        Linear(4, 2)), {("matrix", 6): 1, ("diagonal", 4): 1}),
    Animal("depthwise", lambda: sequential(
        (3, 5, 5), (2,), nn.Conv2d(3, 4, 1), ReLU(), nn.Conv2d(4, 4, 3, groups=4), ReLU(), nn.Conv2d(4, 5, 1), ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(5, 2)), {("diagonal", 4): 2, ("diagonal", 5): 1}),
    Animal("groups", lambda: sequential(
        (3, 4, 4), (2,), nn.Conv2d(3, 4, 1), ReLU(), nn.Conv2d(4, 6, 3, groups=2), ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), Linear(6, 2)), {("diagonal", 2): 2, ("diagonal", 6): 1}),
    Animal("shortcut", lambda: regression(Residual(project=False), (3, 5, 5), (2,)),
           {("diagonal", 4): 2}),
    Animal("projected shortcut", lambda: regression(Residual(project=True), (3, 5, 5), (2,)),
           {("diagonal", 4): 3}),
    Animal("BatchNorm in eval mode", lambda: sequential(
        (3, 4, 4), (2,), nn.Conv2d(3, 4, 1), normed(), ReLU(), nn.Conv2d(4, 2, 4), nn.Flatten()), {("diagonal", 4): 1}),
    Animal("LayerNorm", lambda: sequential((4,), (2,), nn.LayerNorm(4), Linear(4, 2)), {("diagonal", 4): 1}),
    Animal("RMSNorm", lambda: sequential((4,), (2,), nn.RMSNorm(4), Linear(4, 2, bias=False)), {("diagonal", 4): 1}),
    Animal("RMSNorm by hand", lambda: sequential((4,), (2,), RMSNorm(4), Linear(4, 2, bias=False)),
           {("diagonal", 4): 1}),
    Animal("GroupNorm", lambda: sequential(
        (2, 4, 4), (2,), nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), ReLU(), nn.Conv2d(4, 2, 4), nn.Flatten()),
        {("diagonal", 4): 1}),
    Animal("norm without eps", lambda: sequential((3,), (4,), Linear(3, 4), nn.LayerNorm(4, eps=0.0), nn.Tanh()),
           {("scalar", 1): 1}),
    Animal("weight norm", lambda: sequential(
        (3,), (2,), nn.utils.parametrizations.weight_norm(Linear(3, 4)), ReLU(), Linear(4, 2)), {("diagonal", 4): 2}),
    Animal("attention", lambda: regression(Attention(), (5, 6), (5, 6)), {("matrix", 10): 4}),
    Animal("attention, shared keys", lambda: regression(Attention(4, 2), (5, 6), (5, 6)), {("matrix", 10): 4}),
    Animal("attention, one key", lambda: regression(Attention(4, 1), (5, 6), (5, 6)), {("matrix", 10): 2}),
    Animal("attention, rotary", lambda: regression(Attention(rotary="half"), (5, 6), (5, 6)),
           {("diagonal", 2): 2, ("matrix", 10): 2}),
    Animal("attention, interleaved rotary", lambda: regression(Attention(rotary="interleaved"), (5, 6), (5, 6)),
           {("diagonal", 2): 2, ("matrix", 10): 2}),
    Animal("attention, partly rotary", lambda: regression(Attention(rotary="half", part=2), (5, 6), (5, 6)),
           {("scalar", 1): 2, ("matrix", 3): 2, ("matrix", 10): 2}),
    Animal("attention, norms of q and k", lambda: regression(Attention(norm=True), (5, 6), (5, 6)),
           {("diagonal", 4): 1, ("matrix", 10): 2}),
    Animal("nn.MultiheadAttention, norm last", lambda: encoder(norm_first=False),
           {("matrix", 10): 4, ("diagonal", 6): 1}),
    Animal("nn.MultiheadAttention, norm first", lambda: encoder(norm_first=True),
           {("matrix", 10): 4, ("diagonal", 6): 1, ("diagonal", 8): 2}),
    Animal("nn.MultiheadAttention, GELU", lambda: encoder(norm_first=False, activation="gelu"), {("matrix", 10): 4}),
    Animal("stacked maps", lambda: regression(Stacked(), (3,), (2, 3)), {("matrix", 10): 2}),
    Animal("embedding", lambda: (Tied(tied=False), tokens_of, ids(7, 4, 5)), {("diagonal", 4): 1}),
    Animal("tied embedding", lambda: (Tied(tied=True), tokens_of, ids(7, 4, 5))),
    Animal("matrix factorisation", lambda: (
        Factors(), lambda model, batch: (model(batch[0]) - batch[1]).square(), (ids(5, 40, 2), torch.ones(40))),
        {("matrix", 6): 1}),
    # The shared map is conjugated: D S D^-1.
    Animal("module used twice", lambda: regression(Twice(), (3,), (2,)), {("diagonal", 4): 1}),
    Animal("branches", lambda: regression(Branches(), (3,), (2,)), {("diagonal", 2): 1, ("diagonal", 4): 1}),
    Animal("adapter", lambda: regression(Adapted(), (4,), (5,)), {("matrix", 3): 1}),
    Animal("dropout in eval mode", lambda: sequential((3,), (2,), Linear(3, 4), nn.Dropout(0.5), Linear(4, 2)),
           {("matrix", 10): 1}),
    Animal("ViT", lambda: regression(Vision().eval(), (2, 4, 4), (2,)),
           {("matrix", 10): 4, ("diagonal", 6): 1, ("diagonal", 8): 3}),
    Animal("GPT-2 with LoRA", lambda: hugging("lora"), {("matrix", 3): 4}),
    Animal("GPT-2", lambda: hugging("gpt2"), {("matrix", 10): 8, ("diagonal", 8): 4}),
    Animal("Llama", lambda: hugging("llama"),
           {("matrix", 10): 2, ("diagonal", 2): 2, ("diagonal", 16): 3, ("diagonal", 6): 1}, coarse=True),
    Animal("BERT", lambda: hugging("bert"), {("matrix", 10): 8, ("diagonal", 8): 1}),
]  # fmt: skip
ZOO = [*CLASSIC, *EVERYDAY, *TRANSFORMERS]

"""Small models with the constructions that users train: attention, experts, adapters, layouts, functions by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, WIDTH, CLASSES = 6, 8, 5
Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Three layers, of which a function of (model, hidden) applies the middle."""

    def __init__(self, middle: Forward | None = None, width: int = WIDTH, **parts: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.middle = middle or (lambda net, h: net.b(h))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.middle(self, torch.tanh(self.a(x)))))


class Words(nn.Module):
    """Tokens in, classes of tokens out; a function of (model, hidden (B, T, n)) applies the middle."""

    def __init__(self, middle: Forward | None = None, width: int = WIDTH, **parts: Any) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, width), nn.LayerNorm(width)
        self.b, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.middle = middle or (lambda net, h: net.b(h))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.middle(self, self.table(ids)))))


def numbers(*sizes: int, dtype: torch.dtype = torch.float64) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Batches of vectors and goals."""
    return lambda: [(torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)) for n in sizes or (6, 6)]


def words(*sizes: int, length: int = TOKENS) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Batches of token ids and classes; the default has as many tokens as examples."""
    return lambda: [(torch.randint(11, (n, length)), torch.randint(CLASSES, (n, length))) for n in sizes or (6, 6)]


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def classified(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def net(middle: Forward | None = None, **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(middle, **{name: make() for name, make in parts.items()}).double()


def text(middle: Forward | None = None, **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Words(middle, **{name: make() for name, make in parts.items()}).double()


class Attention(nn.Module):
    """Self-attention through the kernel of a backend, with a mask of examples or without."""

    def __init__(self, backend: SDPBackend, mask: str) -> None:
        super().__init__()
        self.backend, self.mask = backend, mask
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mask = None
        if self.mask == "of examples":  # the last tokens of every example are padding, as its first number says
            ends = 2 + (h[:, 0, 0].detach() > 0).long()
            mask = (torch.arange(h.shape[1]) < h.shape[1] - ends[:, None])[:, None, None]
        elif self.mask == "of tokens":
            mask = torch.zeros(h.shape[1], h.shape[1], dtype=h.dtype).fill_diagonal_(-1.0)
        with sdpa_kernel([self.backend, SDPBackend.MATH]):
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.mask == "causal")
        return self.out(mixed.transpose(1, 2).flatten(2))


# Parts of models


class Experts(nn.Module):
    """A mixture of experts: each token goes to its best expert, by index."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.reshape(-1, h.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            out = out.index_add(0, rows, weights[rows, None] * torch.relu(expert(tokens[rows])))
        return out.view_as(h)


class ByWord(Words):
    """Words with an odd id go to an expert, in whatever example they are."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids).flatten(0, 1)
        rows = (ids.flatten() % 2).nonzero().squeeze(1)
        h = h.index_add(0, rows, torch.relu(self.expert(h[rows]))) if len(rows) else h
        return self.head(self.norm(torch.tanh(self.b(h)))).unflatten(0, ids.shape)


def odd_words(*counts: int) -> Callable[[], list[tuple[Tensor, Tensor]]]:
    """Two batches with so many odd ids in each example."""

    def batch() -> tuple[Tensor, Tensor]:
        odd = torch.arange(TOKENS) < torch.tensor(counts)[:, None]
        ids = 2 * torch.randint(5, odd.shape) + odd.long()
        return ids, torch.randint(CLASSES, odd.shape)

    return lambda: [batch(), batch()]


class Stacked(nn.Module):
    """Experts whose weights are in a single tensor, applied to equal numbers of sorted tokens by a batched product."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, WIDTH, WIDTH) / 3)

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.reshape(-1, h.shape[-1])
        order = torch.arange(len(tokens)) % len(self.weight)
        return torch.einsum("tn,tnm->tm", tokens, self.weight[order]).view_as(h)


class LowRank(nn.Module):
    """W x + B A x with W frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h) + 0.5 * self.up(self.down(h))


def tied(model: Words) -> Words:
    model.head = nn.Linear(WIDTH, 11)
    model.head.weight = model.table.weight
    return model


def frozen(model: Net) -> Net:
    model.a.requires_grad_(False)
    model.c.bias.requires_grad_(False)
    return model


def taught(model: Net, batch: Any) -> Tensor:
    """The distance from a frozen teacher, which is a part of the model and evaluated without a graph."""
    with torch.no_grad():
        goal = model.teacher(batch[0])
    return (model(batch[0]) - goal).square().mean(1)


class OldProduct(torch.autograd.Function):
    """A product without setup_context, as of a fused kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d @ w, d.T @ x


class Rounded(torch.autograd.Function):
    """Rounding, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.round(4 * w) / 4

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d


# Layouts


def tokens_first(model: Words, h: Tensor) -> Tensor:
    """An encoder layer with its default layout, (T, B, n)."""
    return model.encoder(h.transpose(0, 1)).transpose(0, 1)


def flat_tokens_first(model: Words, h: Tensor) -> Tensor:
    turned = h.transpose(0, 1)
    return model.b(turned.reshape(-1, h.shape[-1])).view_as(turned).transpose(0, 1)


def by_example(model: Words, h: Tensor) -> Tensor:
    return torch.stack([model.b(row) for row in h])


def by_token(model: Words, h: Tensor) -> Tensor:
    return torch.stack([model.b(column) for column in h.unbind(1)], 1)


def masked_tokens(model: Words, h: Tensor) -> Tensor:
    mask = h.detach()[..., 0] > 0
    out = torch.zeros_like(h)
    out[mask] = model.b(h[mask])
    return out + h


def ids_first(model: Words, batch: Any) -> Tensor:
    """Token ids are laid out tokens first before the table."""
    ids, classes = batch
    hidden = model.norm(torch.tanh(model.b(model.table(ids.t().contiguous()))))
    scores = model.head(hidden).permute(1, 2, 0)
    return functional.cross_entropy(scores, classes, reduction="none").mean(1)


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0)

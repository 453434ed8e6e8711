"""Random small models that lay examples and tokens out in many ways, and sizes that equal or divide the batch size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

Op = Callable[[Tensor], Tensor]
WORDS = 7


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Args:
        examples: The batch size B.
        tokens: Tokens of an example, T.
        heads: Heads; the width is heads times `depth`.
        depth: Features of a head.
        classes: Classes of a token.
        experts: Experts.
        window: Tokens of a window; it divides T.
    """

    examples: int
    tokens: int
    heads: int
    depth: int
    classes: int
    experts: int
    window: int

    @property
    def width(self) -> int:
        """Features of a token, n."""
        return self.heads * self.depth


# Layouts: what an operation on the last dimension gets of hidden states (B, T, n), and how its result is put back.


def as_it_is(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h)


def tokens_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.transpose(0, 1)).transpose(0, 1)


def flat(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.reshape(-1, h.shape[-1])).unflatten(0, h.shape[:2])


def flat_tokens_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    turned = h.transpose(0, 1)
    return op(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


def copied_tokens_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    turned = h.permute(1, 0, 2).contiguous()
    return op(turned.view(-1, h.shape[-1])).view(turned.shape).permute(1, 0, 2)


def with_dimension(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h[None]).squeeze(0)


def features_between(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.permute(2, 0, 1).movedim(0, -1))


def windows(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    parts = h.unflatten(1, (-1, sizes.window))
    return op(parts.flatten(0, 1)).unflatten(0, parts.shape[:2]).flatten(1, 2)


def windows_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    parts = h.unflatten(1, (-1, sizes.window)).transpose(0, 1)
    return op(parts.reshape(-1, *h.shape[2:])).view(parts.shape).transpose(0, 1).flatten(1, 2)


def shifted_windows(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return windows(h.roll(1, 1), op, sizes).roll(-1, 1)


def by_example(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.stack([op(row) for row in h])


def by_example_and_token(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.stack([torch.stack([op(token) for token in row.unbind(0)]) for row in h.unbind(0)])


def by_token(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.stack([op(column) for column in h.unbind(1)], 1)


def by_token_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.cat([op(h[:, index])[None] for index in range(h.shape[1])]).transpose(0, 1)


def in_chunks(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.cat([op(part) for part in h.chunk(2, 1)], 1)


def batch_in_chunks(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return torch.cat([op(part) for part in h.chunk(2, 0)])


def permuted(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    order = (torch.arange(h.shape[1]) * 3 + 1) % h.shape[1]
    return op(h[:, order])


def flipped(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.flip(1)).flip(1)


def sorted_by_data(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    order = h.detach()[..., 0].argsort(1)
    return op(h.gather(1, order[..., None].expand_as(h)))


def masked(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    mask = h.detach()[..., 0] > 0
    out = torch.zeros_like(h)
    out[mask] = op(h[mask])
    return out


def gathered(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    tokens = h.flatten(0, 1)
    rows = (tokens.detach()[:, 0] > 0).nonzero().squeeze(1)
    return torch.zeros_like(tokens).index_add(0, rows, op(tokens[rows])).view_as(h)


def gathered_tokens_first(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return gathered(h.transpose(0, 1), op, sizes).transpose(0, 1)


def repeated(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).mean(1)


def tiled(h: Tensor, op: Op, sizes: Sizes) -> Tensor:
    return op(h.repeat(2, 1, 1)).unflatten(0, (2, -1)).mean(0)


LAYOUTS = (
    as_it_is,
    tokens_first,
    flat,
    flat_tokens_first,
    copied_tokens_first,
    with_dimension,
    features_between,
    windows,
    windows_first,
    shifted_windows,
    by_example,
    by_example_and_token,
    by_token,
    by_token_first,
    in_chunks,
    batch_in_chunks,
    permuted,
    flipped,
    sorted_by_data,
    masked,
    gathered,
    gathered_tokens_first,
    repeated,
    tiled,
)


# Operations on the last dimension, whatever is in front of it


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Product(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Contracted(Product):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ij->...j", x, self.weight)


class Divided(Scale):
    """A root mean square by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * self.weight + self.bias


OPERATIONS: tuple[Callable[[int], nn.Module], ...] = (nn.Linear, nn.LayerNorm, Scale, Product, Contracted, Divided)


class Laid(nn.Module):
    """An operation in a layout."""

    def __init__(self, layout: Callable[..., Tensor], operation: Callable[[int], nn.Module], sizes: Sizes) -> None:
        super().__init__()
        make = operation if operation is not nn.Linear else lambda width: nn.Linear(width, width)
        self.layout, self.operation, self.sizes = layout, make(sizes.width), sizes

    def forward(self, h: Tensor, ids: Tensor) -> Tensor:
        return h + torch.tanh(self.layout(h, self.operation, self.sizes))


# Further parts, which know what tokens, heads and experts are


class Part(nn.Module):
    """A part of a model with tensors of its sizes, (T, n), (H, d, d) or (E, n, n) among them."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        self.kind, self.sizes = kind, sizes
        tokens, width = sizes.tokens, sizes.width
        shapes = {
            "positions": (tokens, width),
            "positions tokens first": (tokens, 1, width),
            "position gates": (1, tokens, 1),
            "mixed tokens": (tokens, tokens),
            "maps of positions": (tokens, width, width),
            "heads": (sizes.heads, sizes.depth, sizes.depth),
            "heads in the batch": (sizes.depth, sizes.depth),
            "gates of heads": (sizes.heads, 1, 1),
            "first token": (1, 1, width),
            "stacked experts": (sizes.experts, width, width),
            "mean of tokens": (width, width),
            "convolution": (width, width, 3),
        }
        if kind in shapes:
            self.weight = nn.Parameter(torch.randn(shapes[kind]) / 2)
        if kind in ("table of positions", "table of ids", "table of ids tokens first"):
            self.table = nn.Embedding(max(WORDS, tokens), width)
        if kind == "experts":
            self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(sizes.experts))

    def forward(self, h: Tensor, ids: Tensor) -> Tensor:
        return h + torch.tanh(PARTS[self.kind](self, h, ids))


def routed(part: Any, h: Tensor, ids: Tensor) -> Tensor:
    tokens, chosen = h.flatten(0, 1), ids.flatten() % part.sizes.experts
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(part.experts):
        rows = (chosen == index).nonzero().squeeze(1)
        out = out.index_add(0, rows, expert(tokens[rows]))
    return out.view_as(h)


def split(part: Any, h: Tensor) -> Tensor:
    """(B, T, n) as (B, H, T, d)."""
    return h.unflatten(-1, (part.sizes.heads, part.sizes.depth)).transpose(1, 2)


def joined(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(2)


PARTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "positions": lambda part, h, ids: h + part.weight,
    "positions tokens first": lambda part, h, ids: (h.transpose(0, 1) * part.weight).transpose(0, 1),
    "position gates": lambda part, h, ids: h * part.weight,
    "table of positions": lambda part, h, ids: h + part.table(torch.arange(h.shape[1])),
    "table of ids": lambda part, h, ids: h * part.table(ids),
    "table of ids tokens first": lambda part, h, ids: h + part.table(ids.t().contiguous()).transpose(0, 1),
    "mixed tokens": lambda part, h, ids: (h.transpose(1, 2) @ part.weight).transpose(1, 2),
    "maps of positions": lambda part, h, ids: torch.einsum("bti,tij->btj", h, part.weight),
    "heads": lambda part, h, ids: joined(split(part, h) @ part.weight),
    "heads in the batch": lambda part, h, ids: joined(
        (split(part, h).reshape(-1, h.shape[1], part.sizes.depth) @ part.weight).view_as(split(part, h))
    ),
    "gates of heads": lambda part, h, ids: joined(split(part, h) * part.weight),
    "first token": lambda part, h, ids: torch.cat([part.weight.expand(len(h), -1, -1), h], 1).cumsum(1)[:, 1:],
    "stacked experts": lambda part, h, ids: torch.einsum("btn,btnm->btm", h, part.weight[ids % len(part.weight)]),
    "experts": routed,
    "mean of tokens": lambda part, h, ids: (h.mean(1) @ part.weight)[:, None].expand_as(h),
    "convolution": lambda part, h, ids: functional.conv1d(h.transpose(1, 2), part.weight, padding=1).transpose(1, 2),
}


class Model(nn.Module):
    """Tokens or vectors in, scores of classes out, with parts between."""

    def __init__(self, words: bool, parts: list[nn.Module], head: str, sizes: Sizes) -> None:
        super().__init__()
        self.inner = nn.Embedding(WORDS, sizes.width) if words else nn.Linear(2, sizes.width)
        self.parts, self.head, self.words = nn.ModuleList(parts), nn.Linear(sizes.width, sizes.classes), words
        self.order = head

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.inner(ids if self.words else x)
        for part in self.parts:
            h = part(h, ids)
        if self.order == "tokens first":
            return self.head(h.transpose(0, 1)).permute(1, 2, 0)
        if self.order == "flat":
            return self.head(h.flatten(0, 1)).view(*h.shape[:2], -1).transpose(1, 2)
        return self.head(h).transpose(1, 2)


def losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross entropies of tokens, averaged over the tokens of each example."""
    x, ids, classes = batch
    return functional.cross_entropy(model(x, ids), classes, reduction="none").mean(1)


@dataclass(frozen=True)
class Plan:
    """What hypothesis draws; `build` makes the model.

    Args:
        sizes: The sizes.
        words: Whether the model begins with a table of words.
        parts: A layout and an operation, or a kind of part.
        head: The layout of the last linear map.
        seed: Of parameters and data.
    """

    sizes: Sizes
    words: bool
    parts: tuple[tuple[Callable[..., Tensor], Callable[[int], nn.Module]] | str, ...]
    head: str
    seed: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        made = [Part(p, self.sizes) if isinstance(p, str) else Laid(*p, self.sizes) for p in self.parts]
        return Model(self.words, made, self.head, self.sizes).double()

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        torch.manual_seed(self.seed + 1)
        shape = self.sizes.examples, self.sizes.tokens
        data = torch.randn(*shape, 2, dtype=torch.float64)
        return [(data, torch.randint(WORDS, shape), torch.randint(self.sizes.classes, shape))]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Models in which tokens, heads, classes or experts equal, divide or are multiples of the batch size."""
    examples = draw(st.sampled_from([2, 3, 4, 6]))
    divisors = [size for size in (1, 2, 3) if examples % size == 0]
    related = st.sampled_from(sorted({*divisors, examples, 2 * examples, 5}))
    tokens = draw(related)
    sizes = Sizes(
        examples,
        tokens,
        heads=draw(st.sampled_from(sorted({*divisors, examples}))),
        depth=draw(st.sampled_from([1, 2, 3])),
        classes=max(2, draw(related)),
        experts=draw(related),
        window=draw(st.sampled_from([size for size in range(1, tokens + 1) if tokens % size == 0])),
    )
    laid = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(OPERATIONS))
    parts = draw(st.lists(st.one_of(laid, laid, st.sampled_from(sorted(PARTS))), min_size=1, max_size=3))
    head = draw(st.sampled_from(["examples first", "tokens first", "flat"]))
    return Plan(sizes, draw(st.booleans()), tuple(parts), head, draw(st.integers(0, 99)))

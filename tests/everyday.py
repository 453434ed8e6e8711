"""Architectures as people write them: recurrences, graphs, writes in place, regions, experts, with their symmetries."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from animals import Animal, ids, regression, sequential


class Recurrent(nn.Module):
    """A recurrent layer and a head that reads the last state."""

    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Bag(nn.Module):
    """Means or maxima of the vectors of words, and a head."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(7, 3, mode=mode), nn.Linear(3, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words))


def bag(mode: str) -> Any:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean(1)

    return Bag(mode), loss, (ids(7, 8, 4), torch.randn(8, 2, generator=torch.Generator().manual_seed(3)))


class LoRA(nn.Module):
    """W x + B A x with W frozen, and B zero as at the start of training."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        y[..., :5] += x @ self.a.T @ self.b.T
        return y


class UNet(nn.Module):
    """One step down, and up again by a transposed convolution in two groups, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.first(x))
        x = torch.relu(self.up(torch.relu(self.down(skip))))
        return self.head(torch.cat([skip, x], 1))


class Graph(nn.Module):
    """Messages along the edges of a graph, summed at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.message, self.own = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)
        self.register_buffer("source", torch.tensor([0, 1, 2, 2, 3]))
        self.register_buffer("target", torch.tensor([1, 2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x))
        sent = self.message(x)[:, self.source]
        x = torch.relu(self.own(x) + torch.zeros_like(self.own(x)).index_add(1, self.target, sent))
        return self.head(x.mean(1))


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights of low frequencies, beside a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.beside, self.head = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(3, 4, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.fft.rfft(x, dim=1)[:, :2]
        result = low.new_zeros(len(x), x.shape[1] // 2 + 1, 4)
        result[:, :2] = torch.einsum("bki,iok->bko", low, self.weight)
        x = torch.relu(torch.fft.irfft(result, n=x.shape[1], dim=1) + self.beside(x))
        return self.head(x)


class Cosine(nn.Module):
    """Cosines between features and a vector per class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.classes = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3))
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.normalize(functional.leaky_relu(self.inner(x)), dim=-1)
        return self.temperature * x @ functional.normalize(self.classes, dim=-1).T


class Parts(nn.Module):
    """Keys and values written part by part into memory that starts empty."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, (first, second) = self.q(x), self.kv(x).chunk(2, -1)
        keys = first.new_empty(first.shape)
        keys[..., :2], keys[..., 2:] = first[..., :2], first[..., 2:]
        values = second.new_empty(second.shape)
        values.narrow(-1, 0, 3).copy_(second[..., :3])
        values.select(-1, 3).copy_(second[..., 3])
        return self.o((q @ keys.mT / 2).softmax(-1) @ values).mean(1)


class InPlace(nn.Module):
    """A residual network whose activations and shortcuts are written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        inner = self.norm(self.first(x)).relu_()
        inner = self.second(inner)
        inner += x
        return self.head(inner.relu_().mean((2, 3)))


class Autocast(nn.Module):
    """A hidden layer in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.outer(torch.relu(self.inner(x)))
        return x.to(self.inner.weight.dtype)


class Given(nn.Module):
    """Activations divided by a scale that is taken as given: no gradient reaches it, but its value counts."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = functional.leaky_relu(self.left(x)), functional.leaky_relu(self.right(x))
        with torch.no_grad():
            keep = (left > 0.0).to(left.dtype)
            scale = 1 + right.abs().amax(1, keepdim=True)
        return self.head(torch.cat([left * keep, right / scale], 1))


class Checkpointed(nn.Module):
    """Layers that are computed again in the backward pass. A reentrant checkpoint needs an input with gradients."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)
        self.reentrant = reentrant

    def layer(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(torch.relu(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layer, self.stem(x), use_reentrant=self.reentrant))


class Experts(nn.Module):
    """A mixture of two experts behind a norm, with a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(3), nn.Linear(3, 2, bias=False)
        self.up = nn.ModuleList(nn.Linear(3, 4) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights, chosen = self.router(x).softmax(-1).topk(1, -1)
        result = x.new_zeros(*x.shape[:-1], 2)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            mine = torch.where(chosen == number, weights, 0.0)
            result += mine * down(functional.leaky_relu(up(x)))
        return result


def rnn(**settings: Any) -> nn.RNN:
    return nn.RNN(3, 4, nonlinearity="relu", batch_first=True, **settings)


EVERYDAY = [
    # A hidden unit reads itself, so that its row and its column are moved against each other.
    Animal("ReLU RNN", lambda: regression(Recurrent(rnn(), 4), (5, 3), (2,)), {("diagonal", 4): 1}),
    Animal("ReLU RNN of two layers, both ways", lambda: regression(
        Recurrent(rnn(num_layers=2, bidirectional=True), 8), (4, 3), (2,)), {("diagonal", 4): 4}),
    Animal("GRU", lambda: regression(Recurrent(nn.GRU(3, 2, batch_first=True), 2), (4, 3), (2,))),
    Animal("LSTM", lambda: regression(Recurrent(nn.LSTM(3, 2, batch_first=True), 2), (4, 3), (2,))),
    Animal("EmbeddingBag", lambda: bag("mean"), {("matrix", 6): 1}),
    Animal("EmbeddingBag, maxima", lambda: bag("max"), {("diagonal", 3): 1}),
    Animal("LoRA at its start", lambda: regression(LoRA(), (4,), (5,)), {("matrix", 3): 1}),
    # The four channels of the way up are two in each of two groups.
    Animal("UNet", lambda: regression(UNet(), (2, 4, 4), (2, 4, 4)),
           {("diagonal", 4): 1, ("diagonal", 6): 1, ("diagonal", 2): 2}),
    Animal("graph network", lambda: regression(Graph(), (4, 3), (2,)), {("diagonal", 4): 1, ("diagonal", 5): 1}),
    # The lifted channels may be mixed by any real matrix.
    Animal("Fourier neural operator", lambda: regression(Spectral(), (6, 2), (6, 2)),
           {("matrix", 6): 1, ("diagonal", 4): 1}),
    # Lengths of the classes, and the length of the features.
    Animal("cosine classifier", lambda: regression(Cosine(), (4,), (5,)), {("diagonal", 5): 1, ("scalar", 1): 1}),
    Animal("attention written in parts", lambda: regression(Parts(), (5, 6), (2,)), {("matrix", 10): 2}),
    # The running mean of the norm, though it is zero now, ties the first convolution.
    Animal("residual network in place", lambda: regression(InPlace().eval(), (3, 4, 4), (2,)),
           {("diagonal", 4): 1, ("diagonal", 5): 1}),
    Animal("autocast to bfloat16", lambda: regression(Autocast(), (4,), (2,)), {("diagonal", 3): 1}, coarse=True),
    Animal("a scale without gradients", lambda: regression(Given(), (4,), (2,)), {("diagonal", 3): 1}),
    Animal("checkpoints", lambda: regression(Checkpointed(reentrant=False), (4,), (2,)),
           {("diagonal", 3): 1, ("diagonal", 5): 1}),
    Animal("checkpoints, reentrant", lambda: regression(Checkpointed(reentrant=True), (4,), (2,)),
           {("diagonal", 3): 1, ("diagonal", 5): 1}),
    Animal("experts by hand", lambda: regression(Experts(), (3,), (2,)), {("diagonal", 3): 1, ("diagonal", 4): 2}),
    Animal("bilinear upsampling", lambda: sequential(
        (2, 3, 3), (2, 6, 6), nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 2, 1)), {("diagonal", 4): 1}),
    Animal("channel shuffle", lambda: sequential(
        (2, 3, 3), (2, 3, 3), nn.Conv2d(2, 4, 1), nn.ReLU(), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 1, groups=2)),
        {("diagonal", 1): 4}),
]  # fmt: skip

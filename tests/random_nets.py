"""Random small networks whose generators are known by mathematics: (symmetric, antisymmetric, others)."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Counts = tuple[int, int, int]


class Net(NamedTuple):
    """A model, its loss and a batch, with the numbers of its generators."""

    name: str
    model: nn.Module
    batch: Any
    counts: Counts

    @property
    def built(self) -> tuple[nn.Module, Any, Any]:
        return self.model, squared_sum, self.batch

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.model.parameters())


def squared_sum(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().flatten(1).sum(1)


def regression(name: str, model: nn.Module, inputs: int | tuple[int, ...], counts: Counts, examples: int = 6) -> Net:
    shape = (inputs,) if isinstance(inputs, int) else inputs
    x = torch.randn(examples, *shape)
    return Net(name, model, (x, torch.randn_like(model(x)).detach()), counts)


def chain(widths: list[int], activation: Callable[[], nn.Module] | None, *, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (rows, columns) in enumerate(zip(widths[1:], widths, strict=False)):
        layers.append(nn.Linear(columns, rows, bias=bias))
        if activation is not None and number < len(widths) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def pairs(sizes: list[int]) -> tuple[int, int]:
    """Dimensions of the symmetric and of the antisymmetric matrices in the sum of gl(h)."""
    return sum(h * (h + 1) // 2 for h in sizes), sum(h * (h - 1) // 2 for h in sizes)


class Hyperbolic(nn.Module):
    """f(x) = sum_k a_k x_k (u_k^2 - v_k^2), with a = 1 or trained."""

    def __init__(self, size: int, *, gain: bool) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))
        self.a = nn.Parameter(torch.randn(size)) if gain else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a * (self.u.square() - self.v.square()))[:, None]


class Tied(nn.Module):
    """x W W^T, which only rotations of the columns of W leave as it is."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w @ self.w.mT


class Gate(nn.Module):
    """down(f(gate x) * up x)."""

    def __init__(self, sizes: tuple[int, int, int], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        inputs, hidden, outputs = sizes
        self.gate, self.up = nn.Linear(inputs, hidden, bias=False), nn.Linear(inputs, hidden, bias=False)
        self.down, self.activation = nn.Linear(hidden, outputs, bias=False), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Direction(nn.Module):
    """x . w / |w|."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w / self.w.norm())[:, None]


class Scores(nn.Module):
    """Queries times keys; with `turns`, keys and queries are turned by constant matrices in an einsum, as in RoPE."""

    def __init__(self, inputs: int, size: int, turns: Tensor | None) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(inputs, size, bias=False), nn.Linear(inputs, size, bias=False)
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        if self.turns is not None:
            q, k = (torch.einsum("tij,btj->bti", self.turns.to(vectors), vectors) for vectors in (q, k))
        return q @ k.mT


def rotations(positions: int, size: int) -> Tensor:
    """Rotations of planes by angles that grow with the position, in a random orthonormal basis."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    angles = torch.arange(positions)[:, None] * torch.tensor([1.0, 0.3, 0.1])[: size // 2]
    blocks = [torch.block_diag(*(_rotation(float(angle)) for angle in row)) for row in angles]
    return basis @ torch.stack(blocks) @ basis.T


def _rotation(angle: float) -> Tensor:
    cosine, sine = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    return torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])


class Factors(nn.Module):
    """Users and items, compared by the product of their vectors."""

    def __init__(self, users: int, items: int, rank: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank), nn.Embedding(items, rank)

    def forward(self, index: Tensor) -> Tensor:
        return (self.users(index[:, 0]) * self.items(index[:, 1])).sum(1, keepdim=True)


class Experts(nn.Module):
    """A ReLU network per expert; an integer of each example chooses the expert."""

    def __init__(self, experts: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(experts, hidden, inputs))
        self.b = nn.Parameter(torch.randn(experts, 1, hidden))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, expert = inputs
        return torch.einsum("boh,bh->bo", self.b[expert], torch.einsum("bhi,bi->bh", self.a[expert], x).relu())


def factors(users: int, items: int, rank: int, often: int) -> Net:
    """All pairs occur `often` times, apart from those of the last user, each of which occurs only once."""
    grid = torch.cartesian_prod(torch.arange(users), torch.arange(items))
    index = torch.cat([grid[:-items].repeat(often, 1), grid[-items:]])
    symmetric, antisymmetric = pairs([rank])
    return Net(
        "factors", Factors(users, items, rank), (index, torch.randn(len(index), 1)), (symmetric, antisymmetric, 0)
    )


def experts(count: int, inputs: int, hidden: int, often: int) -> Net:
    """The last expert is chosen by a single example."""
    chosen = torch.cat([torch.arange(count - 1).repeat(often), torch.tensor([count - 1])])
    batch = (torch.randn(len(chosen), inputs), chosen), torch.randn(len(chosen), 1)
    return Net("experts", Experts(count, inputs, hidden), batch, (count * hidden, 0, 0))


def random_net(seed: int, most: int) -> Net:
    """A network of at most so many parameters; a seed gives a network of the same kind with the same sizes."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    while True:
        net = kind(choose)
        if net.size <= most:
            return net


def _relu(choose: random.Random, activation: Callable[[], nn.Module] = nn.ReLU) -> Net:
    widths = [choose.randint(1, 3) for _ in range(choose.randint(3, 4))]
    net = chain(widths, activation, bias=choose.random() < 0.5)
    return regression(f"{activation.__name__} {widths}", net, widths[0], (sum(widths[1:-1]), 0, 0))


def _leaky(choose: random.Random) -> Net:
    return _relu(choose, nn.LeakyReLU)


def _deep(choose: random.Random) -> Net:
    """Deep and narrow: dead at most points."""
    width, depth = choose.choice([(1, 5), (1, 8), (1, 10), (2, 4), (2, 5), (2, 6)])
    widths = [2, *[width] * (depth - 1), 2]
    net = chain(widths, nn.ReLU, bias=choose.random() < 0.4)
    return regression(f"deep ReLU {widths}", net, 2, (width * (depth - 1), 0, 0))


def _tanh(choose: random.Random) -> Net:
    widths = [choose.randint(1, 3) for _ in range(choose.randint(3, 4))]
    activation = choose.choice([nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid])
    net = chain(widths, activation, bias=choose.random() < 0.5)
    return regression(f"{activation.__name__} {widths}", net, widths[0], (0, 0, 0))


def _linear(choose: random.Random) -> Net:
    widths = [choose.randint(2, 3) for _ in range(choose.randint(3, 4))]
    net = chain(widths, None, bias=choose.random() < 0.4)
    return regression(f"linear {widths}", net, widths[0], (*pairs(widths[1:-1]), 0))


def _boosts(choose: random.Random) -> Net:
    """u . w is a quadratic form of signature (h, h)."""
    h = choose.randint(1, 6)
    return regression(f"linear 1-{h}-1", chain([1, h, 1], None, bias=False), 1, (h * h, h * (h - 1), 0))


def _hyperbolic(choose: random.Random) -> Net:
    size, gain = choose.randint(1, 6), choose.random() < 0.5
    return regression(f"hyperbolic {size} {gain}", Hyperbolic(size, gain=gain), size, (size * (2 if gain else 1), 0, 0))


def _tied(choose: random.Random) -> Net:
    size, rank = choose.randint(2, 5), choose.randint(1, 4)
    return regression(f"tied {size} {rank}", Tied(size, rank), size, (0, rank * (rank - 1) // 2, 0))


def _gate(choose: random.Random) -> Net:
    sizes = choose.randint(2, 3), choose.randint(1, 3), choose.randint(1, 3)
    activation, scalings = choose.choice([(torch.relu, 2), (lambda x: x, 2), (torch.tanh, 1), (nn.functional.silu, 1)])
    return regression(f"gate {sizes} {scalings}", Gate(sizes, activation), sizes[0], (sizes[1] * scalings, 0, 0))


def _direction(choose: random.Random) -> Net:
    size = choose.randint(2, 8)
    return regression(f"direction {size}", Direction(size), size, (1, 0, 0))


def _scores(choose: random.Random) -> Net:
    inputs, size, rotary = choose.randint(2, 4), choose.choice([2, 4]), choose.random() < 0.6
    counts = (size // 2, size // 2, 0) if rotary else (*pairs([size]), 0)
    net = Scores(inputs, size, rotations(4, size) if rotary else None)
    return regression(f"scores {inputs} {size} {rotary}", net, (4, inputs), counts)


def _norm(choose: random.Random) -> Net:
    size, outputs = choose.randint(3, 4), choose.randint(1, 3)
    kind = choose.choice([nn.LayerNorm, nn.RMSNorm])
    # A shift of the bias b of the norm by S w, with S antisymmetric, leaves the single output w . b as it is.
    shears = size * (size - 1) // 2 if outputs == 1 and kind is nn.LayerNorm else 0
    net = nn.Sequential(kind(size), nn.Linear(size, outputs))
    return regression(f"{kind.__name__} {size} {outputs}", net, size, (size, 0, shears))


def _factors(choose: random.Random) -> Net:
    return factors(choose.randint(3, 4), choose.randint(2, 3), choose.randint(1, 3), choose.choice([1, 5, 40]))


def _experts(choose: random.Random) -> Net:
    return experts(choose.randint(2, 3), choose.randint(1, 3), choose.randint(1, 2), choose.choice([1, 10, 100]))


KINDS: tuple[Callable[[random.Random], Net], ...] = (
    _relu, _deep, _leaky, _tanh, _linear, _deep, _boosts, _hyperbolic, _tied, _deep, _gate, _direction, _scores, _norm,
    _factors, _experts,
)  # fmt: skip

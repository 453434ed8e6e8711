"""Random trees of modules, each of which maps (B, T, SIZE) to (B, T, SIZE)."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from animals import Call, regression
from zoo import Attention, Gated, RMSNorm

SIZE, LENGTH = 6, 3


class Sum(nn.Module):
    """Two branches added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Side(nn.Module):
    """Two branches side by side, and a map back."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.back = first, second, nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.cat([self.first(x), self.second(x)], -1))


class Product(nn.Module):
    """A branch times another."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class Again(nn.Module):
    """A branch that is computed again in the backward pass, and another."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class Wide(nn.Module):
    """A gate that fits."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.before, self.gated, self.after = nn.Linear(SIZE, 3), Gated(activation), nn.Linear(3, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gated(self.before(x)))


class Turned(nn.Module):
    """A module for channels first, such as a convolution along the positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mT).mT


class Result(nn.Module):
    """A module that returns more than a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.inner(x, x, x, need_weights=False)[0]
        return self.inner(x)[0]


class With(nn.Module):
    """A function of x and of tensors that are parameters, frozen parameters or buffers."""

    def __init__(
        self, function: Callable[..., Tensor], *, buffers: Any = (), frozen: Any = (), trained: Any = ()
    ) -> None:
        super().__init__()
        self.function, self.names = function, []
        for kind, tensors in (("buffer", buffers), ("frozen", frozen), ("trained", trained)):
            for number, tensor in enumerate(tensors):
                self.names.append(f"{kind}_{number}")
                if kind == "buffer":
                    self.register_buffer(self.names[-1], tensor)
                else:
                    self.register_parameter(self.names[-1], nn.Parameter(tensor, requires_grad=kind == "trained"))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


class Mixture(nn.Module):
    """A stack of maps out of which the largest score of a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(SIZE, 2, bias=False), nn.Parameter(torch.randn(2, SIZE, 4))
        self.down = nn.Parameter(torch.randn(2, 4, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return (torch.relu(x.unsqueeze(-2) @ self.up[chosen]) @ self.down[chosen]).squeeze(-2)


class Looked(nn.Module):
    """The vector of the largest channel."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.back = nn.Embedding(SIZE, 4), nn.Linear(4, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.table(x.argmax(-1)))


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :2] = x[..., 2:4]
    return y


def narrowed(x: Tensor) -> Tensor:
    y = 2 * x
    y.narrow(-1, 0, 2).copy_(x[..., 4:])
    y.select(-1, 3).zero_()
    return y


def put(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., torch.tensor([0, 4])] = 2 * x[..., torch.tensor([1, 3])]
    return y


def put_and_added(x: Tensor) -> Tensor:
    rows = torch.tensor([0, 2])
    return x.clone().index_put_((torch.arange(len(x))[:, None], rows[None]), x[:, :2], accumulate=True)


def added(x: Tensor) -> Tensor:
    y = x.clone()
    y += x.flip(-1)
    return y


def halves(x: Tensor) -> Tensor:
    y = x.clone()
    first, second = y[..., :3], y.narrow(-1, 3, 3)
    first.add_(second)
    second.mul_(0.5)
    return y


def pieces(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    y[..., :2], y[..., 2:] = x[..., 4:], x[..., :4]
    return y


def every_second(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., ::2] = x[..., ::2]
    y[:, 1:] += x[:, :-1]
    return y


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        keep = (x > 0).to(x.dtype)
    return x * keep


def by_a_given_scale(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True)
    return x / (1e-3 + scale)


def in_autocast(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.relu(x @ weight)
    with torch.autocast("cpu", enabled=False):
        z = 2 * y
    return z.to(x.dtype)


def scattered(x: Tensor) -> Tensor:
    index = torch.tensor([5, 0, 1, 2, 3, 4]).expand(x.shape)
    return torch.zeros_like(x).scatter(-1, index, x) + x.scatter_add(-1, index.flip(-1), x)


def sent(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add_(1, torch.tensor([1, 1, 2]), x)


def ordered(x: Tensor) -> Tensor:
    # Plain sums of permuted features are equal, and rounding would decide on their order.
    weights = torch.arange(1, x.shape[-1] + 1).sqrt().to(x)
    return x.gather(1, (x * weights).sum(-1, keepdim=True).argsort(1).expand(x.shape))


def largest(x: Tensor) -> Tensor:
    values, index = x.topk(2, -1)
    return torch.zeros_like(x).scatter(-1, index, values)


def clipped(x: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, -x.flip(-1)), 2 * x)


def rotated(x: Tensor, weight: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * weight).flatten(-2)


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * weight, n=x.shape[1], dim=1)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    return (x @ x.mT + mask).softmax(-1) @ x


def near(x: Tensor, centres: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - centres).square().sum(-1)


def mask_of(length: int) -> Tensor:
    return torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)


def complex_ones(*shape: int) -> Tensor:
    return torch.complex(torch.ones(shape), torch.randn(shape))


def function(call: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Call(call)


PERMUTATION = torch.tensor([2, 0, 1, 5, 4, 3])
KEPT = torch.tensor([True, False, True, True, False, True])
LEAVES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(SIZE, SIZE),
    lambda: nn.Linear(SIZE, SIZE, bias=False),
    nn.ReLU,
    nn.Tanh,
    nn.Identity,
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.PReLU(1),
    lambda: nn.LayerNorm(SIZE),
    lambda: nn.RMSNorm(SIZE),
    lambda: RMSNorm(SIZE),
    lambda: nn.Dropout(0.3),
    function(lambda x: 2 * x),
    function(lambda x: x.abs() + x),
    function(lambda x: x + 1),
    function(lambda x: x.flip(-1)),
    function(lambda x: x.softmax(-1)),
    function(lambda x: x * x.mean(-1, keepdim=True)),
    function(lambda x: torch.cat([x[..., 2:], x[..., :2]], -1)),
    lambda: Attention(2, 1),
    lambda: Attention(2, 2, "half"),
    lambda: Attention(2, 2, "interleaved", 2, norm=True),
    lambda: Result(nn.MultiheadAttention(SIZE, 2, batch_first=True)),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE)),
    Wide,
    lambda: Turned(nn.Conv1d(SIZE, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, SIZE, 1)),
    lambda: Turned(nn.Conv1d(SIZE, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, SIZE, 1, groups=2)),
    # Writes in place, also through views.
    function(assigned),
    function(narrowed),
    function(put),
    function(put_and_added),
    function(added),
    function(halves),
    function(pieces),
    function(every_second),
    function(lambda x: x.clone().relu_()),
    function(lambda x: x.clone().masked_fill_(KEPT, 0.0)),
    function(lambda x: x.clone().clamp_(min=0).mul_(x)),
    # Views.
    function(lambda x: x.flatten(1).view_as(x)),
    function(lambda x: x.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2)),
    function(lambda x: torch.cat(x.chunk(3, -1)[::-1], -1)),
    function(lambda x: x.mT.reshape(x.shape)),
    function(lambda x: functional.pad(x, (1, 2))[..., 1:-2]),
    function(lambda x: functional.pad(x, (0, 0, 1, 0))[:, :-1]),
    function(lambda x: functional.pad(x[..., 1:], (1, 0))),
    function(lambda x: torch.cat([x[..., :3], torch.zeros_like(x[..., 3:])], -1)),
    # Regions.
    function(without_gradients),
    function(by_a_given_scale),
    function(lambda x: x + x.detach()),
    lambda: With(in_autocast, trained=[torch.randn(SIZE, SIZE)]),
    # Parameters and buffers that are special now.
    lambda: With(lambda x, a, b: x + x @ a @ b, trained=[torch.randn(SIZE, 2), torch.zeros(2, SIZE)]),
    lambda: With(lambda x, a, b: torch.relu(x @ a) @ b, trained=[torch.randn(SIZE, 3), torch.zeros(3, SIZE)]),
    lambda: With(lambda x, bias: x + bias, trained=[torch.zeros(SIZE)]),
    lambda: With(lambda x, mean, gain: (x - mean) * gain, buffers=[torch.zeros(SIZE)], trained=[torch.ones(SIZE)]),
    lambda: With(near, buffers=[torch.zeros(SIZE, SIZE)]),
    lambda: With(attended, buffers=[mask_of(LENGTH)]),
    lambda: With(lambda x, index: x[..., index], frozen=[PERMUTATION.clone()]),
    lambda: With(lambda x, kept: torch.where(kept, x, 0.0), frozen=[KEPT.clone()]),
    lambda: With(lambda x, kept: x * kept, frozen=[KEPT.float()]),
    lambda: With(lambda x, both: both[0] * x + both[1] * x.flip(-1), trained=[torch.randn(2, SIZE)]),
    lambda: With(rotated, trained=[complex_ones(SIZE // 2)]),
    lambda: With(filtered, trained=[complex_ones(LENGTH // 2 + 1, SIZE)]),
    lambda: With(lambda x, w: torch.relu(x @ w) @ w.T, trained=[torch.randn(SIZE, 4)]),
    lambda: With(lambda x, w: x @ functional.normalize(w, dim=-1), trained=[torch.randn(SIZE, SIZE)]),
    lambda: With(lambda x, w: torch.einsum("bti,hij->btj", x, w), trained=[torch.randn(2, SIZE, SIZE)]),
    lambda: With(
        lambda x, a, b: torch.einsum("bti,hio,hoj->btj", x, a, b),
        trained=[torch.randn(2, SIZE, 2), torch.randn(2, 2, SIZE)],
    ),
    # Positions that are given by tensors.
    function(scattered),
    function(sent),
    function(ordered),
    function(largest),
    function(lambda x: x.sort(-1).values),
    function(lambda x: x * (x >= x.topk(2, -1).values[..., -1:])),
    Looked,
    Mixture,
    # Other functions that scale, or not.
    function(lambda x: torch.where(x > 0, x, 0.2 * x)),
    function(clipped),
    function(lambda x: x.square()),
    function(lambda x: x.cumsum(1)),
    function(lambda x: functional.normalize(x, dim=-1)),
    function(lambda x: x - x.mean(-1, keepdim=True)),
    function(lambda x: torch.lerp(x, x.flip(1), 0.3)),
    function(lambda x: functional.glu(torch.cat([x, x.flip(-1)], -1), -1)),
    lambda: Wide(functional.silu),
    lambda: nn.Sequential(nn.Linear(SIZE, 4), nn.ReLU(), nn.Linear(4, SIZE)),
    lambda: Result(nn.RNN(SIZE, SIZE, nonlinearity="relu", batch_first=True)),
    lambda: Result(nn.GRU(SIZE, SIZE, batch_first=True)),
    lambda: Turned(nn.BatchNorm1d(SIZE)),
    lambda: Turned(nn.Conv1d(SIZE, 4, 1), nn.ConvTranspose1d(4, SIZE, 3, padding=1, groups=2)),
    lambda: Turned(nn.GroupNorm(2, SIZE)),
]
KINDS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "chain": nn.Sequential,
    "sum": Sum,
    "side": Side,
    "product": Product,
    "again": Again,
    "twice": lambda first, second: nn.Sequential(first, second, first),
}
TREES = st.recursive(
    st.sampled_from(range(len(LEAVES))),
    lambda parts: st.tuples(st.sampled_from(sorted(KINDS)), parts, parts),
    max_leaves=6,
)


def grown(tree: Any) -> nn.Module:
    """The module of a tree."""
    if isinstance(tree, int):
        return LEAVES[tree]()
    kind, first, second = tree
    return KINDS[kind](grown(first), grown(second))


def planted(tree: Any, seed: int, *, training: bool, small: bool = False) -> tuple[nn.Module, Any, Any]:
    """A tree between two linear maps in float64, its loss and its batch; between small maps if `small`."""
    torch.manual_seed(seed)
    inputs, outputs = (2, 1) if small else (SIZE, 2)
    model = nn.Sequential(nn.Linear(inputs, SIZE, bias=not small), grown(tree), nn.Linear(SIZE, outputs)).train(
        training
    )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
    _, loss, batch = regression(model, (LENGTH, inputs), (LENGTH, outputs))
    return model, loss, tuple(tensor.double() for tensor in batch)

"""Small real models, each with something that a gradient at other parameters can get wrong: a list for many tests."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import noetherflow as nf
from cases import cross_entropy, mlp, squared_error


@dataclass
class Row:
    """A model, its loss and its data.

    Args:
        model: The model.
        loss: Its loss.
        batch: Its data.
        precision: The type in which the loss is computed, which sets what rounding may leave.
        plain: For a model that cannot be copied to float64: the same parameters in a module that can.
        chosen: A word in the names of the symmetries that are moved, if all of them have no joint equilibrium.
    """

    model: nn.Module
    loss: nf.Loss
    batch: Any
    precision: torch.dtype = torch.float32
    plain: nn.Module | None = None
    chosen: str = ""

    def double(self) -> nn.Module:
        """An independent copy in float64."""
        return copy.deepcopy(self.model if self.plain is None else self.plain).double()


class Net(nn.Module):
    """Three layers, of which the middle is run by a method that the rows below replace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.outer = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.middle(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.hidden(self.inner(x).relu()))


class Checkpointed(Net):
    def __init__(self, reentrant: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant, self.dropout = reentrant, nn.Dropout(dropout)

    def hidden(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.dropout(self.middle(x).relu()), x, use_reentrant=self.reentrant)


class Nested(Net):
    def hidden(self, x: Tensor) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            return checkpoint(self.middle, x, use_reentrant=False).relu()

        return checkpoint(outer, x, use_reentrant=False)


class CheckpointedTied(Net):
    """The middle layer twice, once of them under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.again = nn.Linear(5, 5), nn.Linear(5, 5)
        self.again.weight = self.middle.weight
        self.outer = nn.Linear(5, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.again(checkpoint(self.middle, x, use_reentrant=False).tanh()).relu()


class Autocast(Net):
    def hidden(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.middle(x).relu()
        return h.to(x.dtype)


class Masked(Net):
    def hidden(self, x: Tensor) -> Tensor:
        h = self.middle(x)
        with torch.no_grad():
            mask = (h > 0).to(h.dtype)
        return h * mask


class Taught(Net):
    """The distance from a frozen copy, which is evaluated without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = mlp(4, 6, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.teacher(x)
        return super().forward(x) - goal


class TwoNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(5, 5, bias=False)
        self.other, self.outer = self.middle, nn.Linear(5, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.other(self.middle(x).tanh()).relu()


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.other, self.outer = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.other.weight = self.middle.weight

    def hidden(self, x: Tensor) -> Tensor:
        return self.other(self.middle(x).tanh()).relu()


class Listed(nn.Module):
    """A block that is applied twice because a list holds it twice."""

    def __init__(self) -> None:
        super().__init__()
        block = mlp(4, 5, 4)
        self.blocks = nn.ModuleList([block, block])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class FrozenIndex(Net):
    """An order of the units as a parameter of integers, and a switch as a parameter of a truth value."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.tensor([2, 0, 1, 4, 3]), requires_grad=False)
        self.switch = nn.Parameter(torch.tensor([True]), requires_grad=False)

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(torch.where(self.switch, x[:, self.order], x))


class Counting(Net):
    """Writes into a buffer, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def hidden(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = super().hidden(x)
        self.last = h.detach().mean(0)
        return h


class Doubled(torch.autograd.Function):
    """Written before torch.func: the backward pass by hand, no setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 2 * gradient.mT @ x


class HandWritten(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return (Doubled.apply(x, self.middle.weight) + self.middle.bias).relu()


class Reading(torch.autograd.Function):
    """Written for torch.func; the backward pass reads the weight of a layer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, layer: nn.Linear) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, _, ctx.layer = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient @ ctx.layer.weight, gradient.mT @ x, None


class ReadsItsLayer(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return (Reading.apply(x, self.middle.weight, self.middle) + self.middle.bias).relu()


class Narrow(Net):
    """Computes its middle layer in one type, whatever the type of its parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def hidden(self, x: Tensor) -> Tensor:
        weight, bias = self.middle.weight.to(self.dtype), self.middle.bias.to(self.dtype)
        return nn.functional.linear(x.to(self.dtype), weight, bias).relu().to(x.dtype)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), mlp(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class WeightedError(nn.Module):
    """A loss that is a module, with numbers of its own in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 0.5]))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return self.scale * ((model(x) - y).square() @ self.weights)


def autocast_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return squared_error(model, batch)


def error_in(dtype: torch.dtype) -> nf.Loss:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x).to(dtype) - y.to(dtype)).square().sum(1)

    return loss


def dict_error(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return squared_error(model, (batch["x"], batch["y"]))


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token in float32, as language models are trained."""
    scores = model(input_ids=batch, use_cache=False).logits[:, :-1]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return nn.functional.cross_entropy(scores.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 13, "n_positions": 8, "bos_token_id": 0}
    sizes["eos_token_id"] = 0
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    # Renamed in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model.train()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=13, max_position_embeddings=8)).to(torch.bfloat16)


def _pairs(*shape: int, outputs: int = 3, count: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *(shape or (4,))), torch.randn(count, outputs)


def _row(model: nn.Module, loss: nf.Loss = squared_error, **more: Any) -> Row:
    return Row(model, loss, **({"batch": _pairs()} | more))


def _sixteen(dtype: torch.dtype, loss: nf.Loss = squared_error) -> Row:
    return _row(mlp(4, 5, 3).to(dtype), loss, batch=tuple(one.to(dtype) for one in _pairs()), precision=dtype)


def _compiled() -> Row:
    plain = Checkpointed()
    return _row(torch.compile(plain, backend="eager"), plain=plain)


def _narrow(dtype: torch.dtype) -> Row:
    plain = Net().double()
    model = Narrow(dtype).double()
    model.load_state_dict(plain.state_dict())
    return _row(model, plain=plain, batch=tuple(x.double() for x in _pairs()), precision=dtype)


def _normalised() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    net(3 + torch.randn(50, 4))
    return net.eval()


def _frozen() -> nn.Module:
    net = Checkpointed()
    net.inner.requires_grad_(False)
    return net


def _weight_norm() -> nn.Module:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.middle)
    return net


def _tokens() -> Tensor:
    return torch.randint(13, (24, 6))


def _dict() -> dict[str, Tensor]:
    return dict(zip("xy", _pairs(), strict=True))


BFLOAT = torch.bfloat16
_MAKERS: dict[str, Callable[[], Row]] = {
    "checkpoint": lambda: _row(Checkpointed()),
    "reentrant checkpoint": lambda: _row(Checkpointed(reentrant=True)),
    "nested checkpoints": lambda: _row(Nested()),
    "checkpoint and tied weights": lambda: _row(CheckpointedTied()),
    "checkpoint and frozen layer": lambda: _row(_frozen()),
    "autocast in the model": lambda: _row(Autocast(), precision=BFLOAT),
    "autocast around the loss": lambda: _row(mlp(4, 5, 3), autocast_error, precision=BFLOAT),
    "mask without gradient": lambda: _row(Masked()),
    "teacher without gradient": lambda: _row(Taught()),
    "bfloat16": lambda: _sixteen(BFLOAT),
    "bfloat16, loss in float32": lambda: _sixteen(BFLOAT, error_in(torch.float32)),
    "float16": lambda: _sixteen(torch.float16),
    "loss in float64": lambda: _row(mlp(4, 5, 3), error_in(torch.float64)),
    "module under two names": lambda: _row(TwoNames()),
    "tied weights": lambda: _row(Tied()),
    "module twice in a list": lambda: _row(Listed()),
    "weight_norm": lambda: _row(_weight_norm()),
    "frozen integers": lambda: _row(FrozenIndex()),
    "BatchNorm in eval": lambda: _row(_normalised()),
    "buffers written": lambda: _row(Counting()),
    "ReLU in place": lambda: _row(nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))),
    "compiled": _compiled,
    "GPT-2, gradient checkpointing": lambda: _row(gpt2(), next_token, batch=_tokens(), chosen="head"),
    "Llama in bfloat16": lambda: _row(llama(), next_token, batch=_tokens(), precision=BFLOAT, chosen="head"),
    "batch is a dict": lambda: _row(Checkpointed(), dict_error, batch=_dict()),
    "loss is a module": lambda: _row(Checkpointed(), WeightedError()),
    "function by hand": lambda: _row(HandWritten()),
    "function that reads its layer": lambda: _row(ReadsItsLayer()),
    "always float32": lambda: _narrow(torch.float32),
    "always bfloat16": lambda: _narrow(BFLOAT),
    "LSTM": lambda: _row(Last(), batch=_pairs(5, 4)),
    "classes": lambda: _row(Checkpointed(), cross_entropy, batch=(_pairs()[0], torch.randint(3, (24,)))),
}
NAMES = list(_MAKERS)


def row(name: str) -> Row:
    """A row, made anew from one seed; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _MAKERS[name]()

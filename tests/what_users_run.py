"""What users train, as rows of a table: constructions that a measurement of noise can get wrong."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

import hugging_face
import noetherflow as nf
import oracles
from noise_ways import METERS, NAMED, REFUSED, RIGHT, TRAIN, WAYS, Meter, Row, precision_of
from users_models import (
    WIDTH,
    Attention,
    ByWord,
    Experts,
    Forward,
    LowRank,
    Net,
    OldProduct,
    Rounded,
    Stacked,
    Words,
    by_example,
    by_token,
    classified,
    convolutions,
    encoder,
    flat_tokens_first,
    frozen,
    ids_first,
    masked_tokens,
    net,
    numbers,
    odd_words,
    squared,
    taught,
    text,
    tied,
    tokens_first,
    words,
)


def outcomes(ways: Sequence[str], *allowed: str) -> dict[str, set[str]]:
    return {way: set(allowed) for way in ways}


# A meter measures what it can and names the rest, or refuses the step in a sentence.
ANY = outcomes(METERS, RIGHT, NAMED, REFUSED)
COUPLED = {"expected": outcomes(WAYS, REFUSED), "error": nf.CoupledExamplesError}


# Types and compilers


def autocast(dtype: torch.dtype, scale: float = 1.0) -> Row:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            out = model(batch[0])
        return (out.float() - batch[1]).square().mean(1)

    def step(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
        with meter.step(batch, train=train, weight=scale / len(batch[0])):
            (scale * loss(model, batch).mean()).backward()

    batches = numbers(dtype=torch.float32)
    rounding = 2 * torch.finfo(dtype).eps
    return Row(Net, loss, batches, step, rtol=precision_of(dtype), rounding=rounding, exact_loss=squared)


def compiled(backend: str, wrap: bool) -> Callable[[], nn.Module]:
    """A model whose layers are compiled, in place or as modules of their own."""

    def build() -> nn.Module:
        torch._dynamo.reset()
        model = Net().double()
        if wrap:
            return torch.compile(model, backend=backend)
        model.compile(backend=backend)
        return model

    return build


# Attention


def attention(backend: SDPBackend, mask: str, dtype: torch.dtype) -> Row:
    def build() -> nn.Module:
        return Words(lambda net, h: h + net.attention(h), attention=Attention(backend, mask)).to(dtype)

    # The kernel adds keys in blocks: twice the roundings of a layer.
    return Row(build, classified, words(length=9), rtol=2 * precision_of(dtype))


# Losses


def with_penalty(penalty: Callable[[nn.Module], Tensor], *, outside: bool = False) -> Row:
    """A penalty that the loss of every example contains, or that the step adds to the mean: it has no noise."""

    def step(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
        with meter.step(batch, train=train):
            (loss(model, batch).mean() + penalty(model)).backward()

    if outside:
        return Row(net(), squared, numbers(), step)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch) + penalty(model)

    return Row(net(), loss, numbers())


def lengths(model: nn.Module) -> Tensor:
    return 0.05 * sum(p.square().sum() for p in model.parameters())


def norms(model: nn.Module) -> Tensor:
    return 0.05 * sum(p.norm() + (p**2).mean() for p in model.parameters())


def absolute(model: nn.Module) -> Tensor:
    return 0.05 * sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)


def orthogonality(model: Any) -> Tensor:
    product = model.b.weight @ model.b.weight.T
    return 0.05 * (product - torch.eye(len(product), dtype=product.dtype)).square().sum()


PENALTIES = {"L2": lengths, "L1": absolute, "norm": norms, "orthogonality": orthogonality}


def early(penalty: bool) -> Row:
    """A term of the loss whose forward pass runs before the block."""

    def term(model: nn.Module, batch: Any) -> Tensor:
        return lengths(model) if penalty else model(2 * batch[0]).square().mean(1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch) + term(model, batch)

    def step(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
        before = term(model, batch).mean()
        with meter.step(batch, train=train):
            (squared(model, batch).mean() + before).backward()

    # A term of examples was not seen: no number of these parameters is right.
    allowed = (RIGHT, NAMED, REFUSED) if penalty else (NAMED, REFUSED)
    return Row(net(), loss, numbers(), step, expected=outcomes(METERS, *allowed))


def input_slope(model: nn.Module, batch: Any) -> Tensor:
    """A physics-informed loss: the derivative of the output by the input."""
    x = batch[0].detach().clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return (out - batch[1]).square().mean(1) + (slope.sum(1) - x.sin()[:, 0]).square()


def hidden_slope(model: Any, batch: Any) -> Tensor:
    """The derivative of the output by a hidden layer."""
    h = torch.tanh(model.a(batch[0]))
    out = model.c(torch.tanh(model.b(h)))
    (slope,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    return (out - batch[1]).square().mean(1) + slope.square().sum(1)


def slope_by_func(model: nn.Module, batch: Any) -> Tensor:
    """The derivative of the output by the input, by torch.func."""
    slope = torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(batch[0])
    return squared(model, batch) + slope.square().sum(1)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """Every example against all examples of the batch."""
    one, other = (functional.normalize(model(part[:, :4]), dim=1) for part in batch)
    return functional.cross_entropy(5 * one @ other.T, torch.arange(len(one)), reduction="none")


# Steps


def accumulated(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    """Each batch is one of two whose gradients are added up."""
    with meter.step(batch, train=train, weight=1 / (2 * len(batch[0]))):
        (loss(model, batch).mean() / 2).backward()


def summed(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    with meter.step(batch, train=train, weight=1.0):
        loss(model, batch).sum().backward()


def copied(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    """A copy of the batch is made inside the block, as if moved to a device."""
    with meter.step(batch, train=train):
        loss(model, tuple(t.to("cpu").clone() for t in batch)).mean().backward()


def with_times() -> list[tuple[Tensor, ...]]:
    """Batches of a diffusion model: each example has a time."""
    return [(x, y, torch.rand(len(x), 1, dtype=x.dtype)) for x, y in numbers()()]


def squared_with_times(model: Any, batch: Any) -> Tensor:
    x, y, times = batch
    return squared(model, (x * (1 - times) + torch.tanh(model.times(times)), y))


def drawn(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    """The meter is given data and goals, and the step draws the times."""
    x, y, times = batch
    with meter.step((x, y), train=train):
        loss(model, (x, y, times.clone())).mean().backward()


def prepared(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    """Another tensor than the model gets is given to the meter: the data before a normalisation."""
    given = tuple(3 * t + 1 for t in batch)
    with meter.step(given, train=train):
        loss(model, batch).mean().backward()


def hogwild(model: Any, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    """A second thread trains the model at the same time: between the passes, and in the middle of the backward pass."""

    def other() -> None:
        loss(model, tuple(2 * t for t in batch)).mean().backward()

    def run(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with meter.step(batch, train=train):
        hidden: list[Tensor] = []
        hook = model.b.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        losses = loss(model, batch).mean()
        hook.remove()
        if train:
            run()
            hidden[0].register_hook(run)
        losses.backward()


def as_dict(build: Callable[[], list[tuple[Tensor, Tensor]]]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"x": x, "y": y, "name": "a batch"} for x, y in build()]


def normalised(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return net(lambda model, h: function(model.b(h)))


def hugging(name: str, *allowed: str) -> Row:
    """A tiny model of Hugging Face Transformers, whose norms compute in float32 in any model."""
    subject = hugging_face.subject

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return LOSSES[name](model, batch)

    def build() -> nn.Module:
        model, LOSSES[name], _ = subject(name)
        return model.double()

    return Row(
        build,
        loss,
        lambda: [oracles.double(b) for b in subject(name)[2]],
        rtol=1e-5,
        rounding=torch.finfo(torch.float32).eps,
        expected=outcomes(METERS, RIGHT, NAMED) if allowed else {},
    )


def mixtral(eager: bool) -> Row:
    """Tokens routed by index, in a loop over experts or by a grouped product of float32."""

    def build() -> Any:
        model = hugging_face.subject("Mixtral")[0]
        return by_index(model).double() if eager else model

    def by_index(model: Any) -> Any:
        model.set_experts_implementation("eager")
        return model

    return Row(
        build,
        hugging_face.next_token,
        hugging_face_ids,
        rtol=1e-5 if eager else 10 * precision_of(torch.float32),
        expected=outcomes(METERS, RIGHT, NAMED),
        exact_model=by_index,
    )


def adapted() -> nn.Module:
    """Llama with the adapters of peft, whose second maps are not zero, as after a step."""
    import peft

    model = hugging_face.subject("Llama")[0]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.double()


def checkpointed_llama() -> nn.Module:
    model = hugging_face.subject("Llama")[0].train()
    model.gradient_checkpointing_enable()
    return model.double()


def hugging_face_ids() -> list[Tensor]:
    return hugging_face.subject("Llama")[2]


LOSSES: dict[str, nf.Loss] = {}
PRODUCT: Forward = lambda model, h: OldProduct.apply(h, model.b.weight) + model.b.bias  # noqa: E731
PRODUCTS: Forward = lambda model, h: OldProduct.apply(h, model.b.weight) + model.b(h)  # noqa: E731

ROWS: dict[str, Row] = {
    "plain": Row(net(), squared, numbers(), symmetries=True),
    "bfloat16 autocast": autocast(torch.bfloat16),
    "float16 autocast and a loss scale": autocast(torch.float16, 1024.0),
    "float32": Row(Net, squared, numbers(dtype=torch.float32), rtol=precision_of(torch.float32), symmetries=True),
    "compiled in place, eager": Row(compiled("eager", False), squared, numbers()),
    "compiled in place, aot_eager": Row(compiled("aot_eager", False), squared, numbers()),
    "compiled, aot_eager": Row(compiled("aot_eager", True), squared, numbers()),
    "checkpoint": Row(net(lambda m, h: checkpoint(m.b, h, use_reentrant=False)), squared, numbers(), symmetries=True),
    "reentrant checkpoint": Row(
        net(lambda m, h: checkpoint(m.b, h, use_reentrant=True)), squared, numbers(), symmetries=True, one_by_one=True
    ),
    **{
        f"{kind} attention, mask {mask}, {dtype}".replace("torch.", ""): attention(backend, mask, dtype)
        for kind, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH))
        for mask in ("none", "causal", "of tokens", "of examples")
        for dtype in (torch.float32, torch.float64)
    },
    "accumulation": Row(net(), squared, numbers(), accumulated),
    "sum": Row(net(), squared, numbers(), summed),
    "LoRA by hand": Row(net(lambda m, h: m.low(h), low=LowRank), squared, numbers(), symmetries=True),
    "routed experts": Row(text(lambda m, h: h + m.experts(h), experts=lambda: Experts(3)), classified, words()),
    "as many experts as examples": Row(
        text(lambda m, h: h + m.experts(h), experts=lambda: Experts(6)), classified, words(length=4)
    ),
    "expert with as many tokens as examples": Row(lambda: ByWord().double(), classified, odd_words(1, 0, 2, 0, 2, 1)),
    "expert with twice as many tokens as examples": Row(
        lambda: ByWord().double(), classified, odd_words(3, 1, 4, 0, 4, 0)
    ),
    # The first examples, which are measured singly, have no token of the expert.
    "expert of the last examples": Row(lambda: ByWord().double(), classified, odd_words(0, 0, 0, 0, 3, 4, 1, 0)),
    "stacked experts": Row(text(lambda m, h: h + m.experts(h), experts=lambda: Stacked(6)), classified, words()),
    "tied": Row(lambda: tied(Words()).double(), classified, words(), symmetries=True),
    "shared module": Row(net(lambda m, h: m.b(torch.tanh(m.b(h)))), squared, numbers(), symmetries=True),
    "frozen parts": Row(lambda: frozen(Net()).double(), squared, numbers(), symmetries=True),
    "teacher": Row(net(teacher=lambda: Net().requires_grad_(False)), taught, numbers()),
    "copied inside the block": Row(net(), squared, numbers(), copied),
    "converted inside the block": Row(
        net(), lambda m, b: squared(m, tuple(t.double() for t in b)), numbers(dtype=torch.float32)
    ),
    "prepared before the block": Row(net(), squared, numbers(), prepared, expected=ANY, says="batch"),
    "dict": Row(net(), lambda m, b: squared(m, (b["x"], b["y"])), as_dict(numbers())),
    "smaller last batch": Row(net(), squared, numbers(6, 3), symmetries=True),
    "last batch of a single example": Row(net(), squared, numbers(6, 1)),
    **{f"{name} penalty": with_penalty(penalty) for name, penalty in PENALTIES.items()},
    **{f"{name} penalty on the mean": with_penalty(penalty, outside=True) for name, penalty in PENALTIES.items()},
    "penalty before the block": early(True),
    "term before the block": early(False),
    "autograd function on a weight": Row(net(PRODUCT), squared, numbers(), expected=ANY),
    "autograd function on a weight that is also used natively": Row(net(PRODUCTS), squared, numbers(), expected=ANY),
    "weight rounded straight through": Row(
        net(lambda m, h: functional.linear(h, Rounded.apply(m.b.weight), m.b.bias)), squared, numbers(), expected=ANY
    ),
    "vmap inside": Row(
        net(lambda m, h: torch.vmap(lambda row: h @ row, out_dims=1)(m.b.weight)), squared, numbers(), expected=ANY
    ),
    "second thread": Row(net(), squared, numbers(), hogwild, expected=outcomes([TRAIN], RIGHT, NAMED, REFUSED)),
    "slope by the input": Row(
        net(lambda m, h: torch.tanh(m.b(h))), input_slope, numbers(), expected=ANY, says="derivatives"
    ),
    "slope by a hidden layer": Row(net(), hidden_slope, numbers(), expected=ANY, says="derivatives"),
    "slope by torch.func": Row(
        net(lambda m, h: torch.tanh(m.b(h))), slope_by_func, numbers(), expected=ANY, says="derivatives"
    ),
    **{
        f"encoder with tokens first, {length} tokens": Row(
            text(tokens_first, encoder=encoder), classified, words(length=length)
        )
        for length in (6, 12, 3, 5)
    },
    **{
        f"flattened with tokens first, {length} tokens": Row(text(flat_tokens_first), classified, words(length=length))
        for length in (6, 12, 3, 5)
    },
    **{
        f"ids with tokens first, {length} tokens": Row(text(), ids_first, words(length=length)) for length in (6, 12, 5)
    },
    "loop over examples": Row(text(by_example), classified, words()),
    "loop over tokens": Row(text(by_token), classified, words()),
    "masked tokens": Row(text(masked_tokens), classified, words()),
    "GroupNorm of features": Row(
        net(lambda m, h: m.norm(m.b(h)), norm=lambda: nn.GroupNorm(2, WIDTH)), squared, numbers()
    ),
    "images": Row(convolutions, squared, lambda: [(torch.randn(6, 2, 6, 6).double(), y) for _, y in numbers()()]),
    "bfloat16 parameters": Row(
        lambda: Net().bfloat16(), squared, numbers(dtype=torch.bfloat16), rtol=2 * precision_of(torch.bfloat16)
    ),
    "times that are drawn in the step": Row(
        net(times=lambda: nn.Linear(1, 4)), squared_with_times, with_times, drawn, expected=ANY, says="batch"
    ),
    "sparse table": Row(
        lambda: Words(table=nn.Embedding(11, WIDTH, sparse=True)).double(), classified, words(), expected=ANY
    ),
    "BatchNorm": Row(
        net(lambda m, h: m.norm(m.b(h)), norm=lambda: nn.BatchNorm1d(WIDTH)), squared, numbers(), **COUPLED
    ),
    "batch_norm": Row(
        normalised(lambda h: functional.batch_norm(h, None, None, training=True)), squared, numbers(), **COUPLED
    ),
    "batch statistics by hand": Row(
        normalised(lambda h: (h - h.mean(0)) / (h.var(0, unbiased=False) + 0.1).sqrt()), squared, numbers(), **COUPLED
    ),
    "variance over the batch by hand": Row(
        normalised(lambda h: h / (h.var(0) + 0.1).sqrt()), squared, numbers(), **COUPLED
    ),
    "pairs": Row(normalised(lambda h: h - 0.5 * h.roll(1, 0)), squared, numbers(), **COUPLED),
    **{name: hugging(name, NAMED) for name in ("T5", "Whisper", "Swin", "Mamba", "CLIP")},
    "Mixtral": mixtral(True),
    "Mixtral, grouped product": mixtral(False),
    **{name: hugging(name) for name in ("GPT-2", "Llama", "BERT", "ViT")},
    "Llama with gradient checkpointing": Row(checkpointed_llama, hugging_face.next_token, hugging_face_ids, rtol=1e-5),
    "LoRA by peft": Row(adapted, hugging_face.next_token, hugging_face_ids, rtol=1e-5),
    "contrastive": Row(
        net(), contrastive, lambda: [(torch.randn(6, 4).double(), torch.randn(6, 4).double())], **COUPLED
    ),
}

"""Cost of measuring gradient noise on a GPU: time, memory and error of several methods, in at most six minutes.

    python benchmarks/noise_gpu.py                         on a GPU, writes benchmarks/results/noise_gpu.json
    python benchmarks/noise_gpu.py --quick --device cpu    small sizes on the CPU: whether the script runs

Models: Llama of 160 million parameters in bfloat16 (16 sequences of 2,048 tokens); GPT-2 small in float32 under
bfloat16 autocast (16 sequences of 1,024 tokens); a ResNet-50 in float32 (64 images) with GroupNorm in place of
BatchNorm, which couples examples; an MLP in float32 (1,024 vectors). Weights are random; nothing is downloaded.

Methods: a plain step; `NoiseMeter` while training, in a step that only measures, and with the Grams of the symmetries
that are declared here; `torch.func` over single examples, in parts that fit into memory; a loop over single examples;
Opacus, if installed. Each is compared with a float32 loop over single examples (TF32 off): the error of Tr Sigma, and
for Grams the largest error of a charge relative to both of its sides. A method with a larger error than the precision
allows is reported as wrong and not timed.

Times are medians of CUDA events, each beside a plain step right before it. The file is written after every method, so a
run that is cut off leaves what it measured. No model begins after `--seconds`, and no method after its share.
"""

import argparse
import copy
import gc
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import noetherflow as nf
from noetherflow import _files

OUT = Path(__file__).parent / "results" / "noise_gpu.json"
ROUNDS, WARM = 12, 2
# Bytes that stacked gradients of single examples may take.
STACKED = 8 * 2**30
# Largest relative error of Tr Sigma that rounding explains, by the type of the computation.
BOUNDS = {torch.float32: 5e-3, torch.bfloat16: 0.1}


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


# Models


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


# The truth


@dataclass
class Sums:
    """Sums over examples: of gradients, of their squares, and of the charges of each gradient."""

    symmetries: Mapping[str, nf.Symmetry]
    count: int = 0
    squares: float = 0.0
    total: dict[str, Tensor] = field(default_factory=dict)
    charges: dict[str, Tensor] = field(default_factory=dict)

    def add(self, gradient: dict[str, Tensor]) -> None:
        """Add the gradient of an example."""
        self.count += 1
        self.squares += sum(float(torch.linalg.vector_norm(g.float()).double().square()) for g in gradient.values())
        for name, part in gradient.items():
            self.total[name] = part.float() if name not in self.total else self.total[name].add_(part)
        for name, symmetry in self.symmetries.items():
            charge = symmetry.charge({key: gradient[key] for key in symmetry.names})
            self.charges[name] = charge.double() + self.charges.get(name, 0)

    def trace(self) -> float:
        """Tr Sigma, unbiased."""
        mean = sum(float(part.double().square().sum()) for part in self.total.values()) / self.count
        return (self.squares - mean) / (self.count - 1)

    def nets(self) -> dict[str, Tensor]:
        """N_+ - N_- for each symmetry, unbiased."""
        return {
            name: (
                self.charges[name] - symmetry.charge({n: self.total[n] for n in symmetry.names}).double() / self.count
            )
            / (self.count - 1)
            for name, symmetry in self.symmetries.items()
        }


def singles(built: Built) -> Iterator[dict[str, Tensor]]:
    """The gradient of every example, by a backward pass for each."""
    named = dict(built.model.named_parameters())
    for index in range(built.size):
        losses = built.losses(built.model, built.example(index))
        yield dict(zip(named, torch.autograd.grad(losses.sum(), list(named.values())), strict=True))


@contextmanager
def without_tf32() -> Iterator[None]:
    """A block in which float32 products have all their digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Truth:
    """What a float32 loop says: Tr Sigma, and N_+ - N_- for each symmetry, on the CPU."""

    trace: float
    nets: dict[str, Tensor]

    @classmethod
    def of(cls, built: Built) -> "Truth":
        """Measure; no memory of the GPU stays in use."""
        sums = Sums(built.symmetries)
        with without_tf32():
            for gradient in singles(built.in_float32()):
                sums.add(gradient)
            return cls(sums.trace(), {name: net.cpu() for name, net in sums.nets().items()})


# Methods


@dataclass
class Method:
    """What is timed, and what the last step says.

    Args:
        step: One step.
        trace: Tr Sigma, unbiased within the batch.
        noise: The moments, if the method measures Grams.
    """

    step: Callable[[], object]
    trace: Callable[[], float]
    noise: Callable[[], nf.NoiseMoments] | None = None


def plain(built: Built) -> Method:
    def step() -> None:
        built.losses(built.model, built.batch).mean().backward()

    return Method(step, lambda: float("nan"))


def metered(built: Built, *, grams: bool = False, train: bool = True) -> Method:
    meter = nf.NoiseMeter(built.model, built.symmetries if grams else {})

    def step() -> None:
        with meter.step(built.batch, train=train):
            built.losses(built.model, built.batch).mean().backward()

    return Method(step, lambda: float(meter.noise.trace), (lambda: meter.noise) if grams else None)


def looped(built: Built) -> Method:
    sums: list[Sums] = []

    def step() -> None:
        sums[:] = [Sums({})]
        for gradient in singles(built):
            sums[0].add(gradient)

    return Method(step, lambda: sums[0].trace())


def vectorised(built: Built) -> Method:
    """torch.func, in parts whose stacked gradients fit into memory."""
    params = {name: parameter.detach() for name, parameter in built.model.named_parameters()}
    buffers = dict(built.model.named_buffers())
    per_example = sum(p.numel() * p.element_size() for p in params.values())
    part = max(1, min(built.size, STACKED // per_example))
    found = [0.0]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = built.model

        def forward(self, *example: Tensor) -> Tensor:
            return built.losses(self.model, tuple(tensor[None] for tensor in example)).sum()

    called = Called()

    def value(params: dict[str, Tensor], *example: Tensor) -> Tensor:
        state = {f"model.{name}": tensor for name, tensor in (params | buffers).items()}
        return functional_call(called, state, example)

    gradients = vmap(grad(value), in_dims=(None, *(0 for _ in built.batch)), randomness="different")

    def step() -> None:
        squares, total = 0.0, dict.fromkeys(params, 0.0)
        for start in range(0, built.size, part):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                stacks = gradients(params, *(t[start : start + part] for t in built.batch))
            for name, stack in stacks.items():
                norms = torch.linalg.vector_norm(stack.flatten(1).float(), dim=1).double()
                squares = squares + norms.square().sum()
                total[name] = total[name] + stack.float().sum(0)
        mean = sum(t.double().square().sum() for t in total.values()) / built.size
        found[0] = float((squares - mean) / (built.size - 1))

    return Method(step, lambda: found[0])


def opacus(built: Built) -> Method:
    from opacus import GradSampleModule

    inner = copy.deepcopy(built.model)
    model = GradSampleModule(inner, loss_reduction="mean")
    parameters: dict[str, Any] = dict(inner.named_parameters())

    def step() -> None:
        model.zero_grad()
        built.losses(model, built.batch).mean().backward()

    def trace() -> float:
        squares = sum(
            torch.linalg.vector_norm(p.grad_sample.flatten(1).float(), dim=1).double().square().sum()
            for p in parameters.values()
        )
        total = sum((p.grad.double() * built.size).square().sum() for p in parameters.values())
        return float((squares - total / built.size) / (built.size - 1))

    return Method(step, trace)


METHODS: dict[str, Callable[[Built], Method]] = {
    "while training": metered,
    "with Grams": partial(metered, grams=True),
    "measure only": partial(metered, train=False),
    "torch.func": vectorised,
    "loop": looped,
    "Opacus": opacus,
}


# Measuring


@dataclass
class Clock:
    """Times and memory of steps on a device."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, step: Callable[[], object]) -> float:
        """The duration of a step, by CUDA events on a GPU."""
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak(self, step: Callable[[], object]) -> int | None:
        """The largest memory of PyTorch's allocator in a step, in bytes; None on the CPU."""
        if not self.cuda:
            step()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def cleared(built: Built, method: Method) -> Callable[[], object]:
    """A step without gradients of the step before; to clear them takes no time of the step."""
    built.model.zero_grad(set_to_none=True)
    return method.step


def compared(built: Built, method: Method, truth: Truth) -> dict[str, Any]:
    """The errors of a method."""
    row: dict[str, Any] = {"error": abs(method.trace() / truth.trace - 1)}
    if method.noise is not None:
        noise, worst = method.noise(), 0.0
        for name, net in truth.nets.items():
            grams = noise.grams[name]
            size = float(grams.plus.norm() + grams.minus.norm())
            off = float((noise.symmetries[name].charge_of(grams).cpu() - net).norm())
            worst = max(worst, off / size if size else 0.0)
        row["error of Grams"] = worst
    if not row["error"] < BOUNDS[built.precision]:
        row["wrong"] = f"Tr Sigma is off by {row['error']:.2g}"
    elif not row.get("error of Grams", 0.0) < BOUNDS[built.precision]:
        row["wrong"] = f"a charge is off by {row['error of Grams']:.2g}"
    return row


def measured(
    built: Built, make: Callable[[Built], Method], truth: Truth, clock: Clock, rounds: int, until: float
) -> dict[str, Any]:
    """The row of a method: errors, memory, and times beside plain steps; or what went wrong."""
    base = plain(built)
    try:
        method = make(built)
        # The first step compiles kernels and fills caches.
        first = clock.seconds(method.step)
        row = compared(built, method, truth) | {"first milliseconds": 1e3 * first}
        if "wrong" in row:
            return row
        row["peak bytes"] = clock.peak(cleared(built, method))
        row["plain peak bytes"] = clock.peak(cleared(built, base))
        times: list[tuple[float, float]] = []
        for number in range(WARM + rounds):
            pair = clock.seconds(cleared(built, base)), clock.seconds(cleared(built, method))
            if number >= WARM or time.monotonic() > until:
                times.append(pair)
            if time.monotonic() > until:
                break
    except ImportError as problem:
        return {"absent": str(problem)}
    except Exception as problem:  # whatever is raised is what is to be reported
        first = next(iter(str(problem).splitlines()), "")
        return {"wrong": f"raises {type(problem).__name__}: {first[:300]}"}
    finally:
        built.model.zero_grad(set_to_none=True)
        gc.collect()
    ratios = [ours / theirs for theirs, ours in times]
    return row | {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2] if len(ratios) > 1 else ratios * 2,
        "milliseconds": 1e3 * statistics.median(ours for _, ours in times),
        "plain milliseconds": 1e3 * statistics.median(theirs for theirs, _ in times),
        "rounds": len(times),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The name of the GPU, its memory, and versions."""
    found = machine.environment(("transformers", "opacus", "triton", "numba"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"GPU": properties.name, "GPU bytes": properties.total_memory, "CUDA": torch.version.cuda}
    found["TF32"] = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and two rounds")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=330.0, help="after which no method begins")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    device, start = torch.device(given.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: try --quick --device cpu")
    clock, rounds = Clock(device), 2 if given.quick else ROUNDS
    result: dict[str, Any] = {"environment": environment(device), "quick": given.quick, "rounds": rounds, "models": {}}
    for number, name in enumerate(given.models):
        # What is left is shared between the models that are left.
        left = given.seconds - (time.monotonic() - start)
        end = time.monotonic() + left / (len(given.models) - number)
        rows: dict[str, Any] = {}
        result["models"][name] = entry = {"rows": rows}
        try:
            torch.manual_seed(0)
            built = MODELS[name](device, given.quick)
            entry |= {
                "parameters": sum(p.numel() for p in built.model.parameters()),
                "batch": [list(tensor.shape) for tensor in built.batch],
                "precision": str(built.precision).removeprefix("torch.") + (" autocast" if built.autocast else ""),
                "symmetries": len(built.symmetries),
            }
            begin = time.monotonic()
            truth = Truth.of(built)
            entry |= {"trace": truth.trace, "seconds of the truth": time.monotonic() - begin}
        except Exception as problem:
            entry["wrong"] = f"raises {type(problem).__name__}: {problem}"[:400]
            _files.write_json(given.out, result)
            continue
        for index, method in enumerate(given.methods):
            now = time.monotonic()
            if now > end:
                rows[method] = {"absent": "no time was left"}
            else:
                until = now + (end - now) / (len(given.methods) - index)
                rows[method] = measured(built, METHODS[method], truth, clock, rounds, until)
            print(name, method, json.dumps(rows[method]), flush=True)
            _files.write_json(given.out, result)
        del built, truth
        gc.collect()
        if clock.cuda:
            torch.cuda.empty_cache()
    result["seconds"] = time.monotonic() - start
    _files.write_json(given.out, result)
    for name, entry in result["models"].items():
        for method, row in entry["rows"].items():
            said = (
                f"{row['ratio']:6.2f}  {row['milliseconds']:9.2f} ms" if "ratio" in row else row.get("wrong", "absent")
            )
            print(f"{name:8} {method:16} {said}")
    print(f"{given.out}: {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()

"""What gradient noise costs beside a plain training step, and beside other ways of measuring it.

    python benchmarks/noise.py [--threads 1] [--rounds 15]

Four models; every round runs each way once, in turn, and its time is divided by that of the plain step of the same
round. Medians of these ratios, their quartiles, how far each trace is from that of a float64 loop over single examples,
and the environment are written to benchmarks/results/noise.json.
"""

import argparse
import copy
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf
from noetherflow import _versions
from noetherflow.noise.exact import Subject
from noetherflow.noise.fast import FastPass

OUT = Path(__file__).parent / "results" / "noise.json"
Built = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]


def mlp() -> Built:
    layers = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(*layers), classify, (torch.randn(256, 784), torch.randint(10, (256,)))


def cnn() -> Built:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), classify, (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


def gpt2() -> Built:
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(n_layer=4, n_head=4, n_embd=256, vocab_size=2000, n_positions=128, **still)
    return transformers.GPT2LMHeadModel(config), continue_text, torch.randint(2000, (16, 128))


def llama() -> Built:
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=2000, **sizes)
    return transformers.LlamaForCausalLM(config), continue_text, torch.randint(2000, (16, 128))


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def continue_text(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def without_matrices(symmetries: dict[str, nf.Symmetry]) -> dict[str, nf.Symmetry]:
    return {name: one for name, one in symmetries.items() if not isinstance(one, nf.MatrixSymmetry)}


def ways(built: Built, symmetries: dict[str, nf.Symmetry]) -> dict[str, Callable[[], Tensor | None]]:
    """Each runs one step; those that measure return Tr Sigma, unbiased within the batch."""
    model, loss, batch = built
    plain_symmetries = without_matrices(symmetries)
    unbiased = size_of(batch) / (size_of(batch) - 1)

    def plain() -> None:
        model.zero_grad()
        loss(model, batch).mean().backward()

    def training(asked: dict[str, nf.Symmetry], *, variances: bool = False) -> Callable[[], Tensor]:
        meter = nf.NoiseMeter(model, asked, variances=variances)

        def run() -> Tensor:
            meter.reset()
            model.zero_grad()
            with meter.step(batch):
                loss(model, batch).mean().backward()
            return meter.noise.trace

        return run

    def measuring() -> Callable[[], Tensor]:
        subject = Subject.of(model, loss, plain_symmetries, None)

        def run() -> Tensor:
            quick.add(batch, "the batch")  # once more the same: it changes no average
            return quick.moments().trace * unbiased if quick.count == size_of(batch) else torch.tensor(torch.nan)

        quick = FastPass(subject, variances=False, max_bytes=2**28)
        quick.check(batch, subject.losses_of(batch), random=False, where="the batch")
        return run

    def vectorised() -> Tensor:
        return nf.estimate_noise(model, loss, [batch], {}, exact=True, max_bytes=2**31).trace * unbiased

    return {
        "plain": plain,
        "while training": training(plain_symmetries),
        "while training, with Grams": training(symmetries),
        "while training, with variances": training(plain_symmetries, variances=True),
        "measure only": measuring(),
        "torch.func": vectorised,
    }


def size_of(batch: Any) -> int:
    return len(batch[0]) if isinstance(batch, tuple) else len(batch)


def reference(built: Built) -> float:
    """Tr Sigma from a backward pass for every single example, in float64."""
    model, loss, batch = copy.deepcopy(built[0]).double(), built[1], built[2]
    wide = (batch[0].double(), batch[1]) if isinstance(batch, tuple) else batch
    parameters = list(model.parameters())
    squares, total = 0.0, [torch.zeros_like(one) for one in parameters]
    for index in range(size_of(batch)):
        one = slice(index, index + 1)
        example = tuple(part[one] for part in wide) if isinstance(wide, tuple) else wide[one]
        gradients = torch.autograd.grad(loss(model, example).sum(), parameters)
        squares += sum(float(part.square().sum()) for part in gradients)
        for sums, part in zip(total, gradients, strict=True):
            sums += part
    size = size_of(batch)
    return (squares - sum(float(part.square().sum()) for part in total) / size) / (size - 1)


def measure(name: str, build: Callable[[], Built], rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    built = build()
    model, loss, batch = built
    symmetries = nf.find_symmetries(model, loss, batch)
    truth = reference(built)
    runs = ways(built, symmetries)
    errors: dict[str, float] = {}
    for way, run in runs.items():
        found = run()
        if found is not None:
            errors[way] = abs(float(found) / truth - 1.0)
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds):
        for way, run in runs.items():
            if way in SLOW and number >= 3:
                continue
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    rows = []
    for way, times in seconds.items():
        ratios = [one / base for one, base in zip(times, seconds["plain"], strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"model": name, "way": way, "milliseconds": 1e3 * statistics.median(times), "ratio": middle}
        rows.append(row | {"quartiles": [low, high], "error": errors.get(way), "seconds": times})
        print(
            f"{name:8s} {way:32s} {row['milliseconds']:8.1f} ms   {middle:6.3f} ({low:.3f} to {high:.3f})"
            + (f"   off by {errors[way]:.1e}" if way in errors else ""),
            flush=True,
        )
    return rows


SLOW = ("torch.func",)
MODELS = {"MLP": mlp, "CNN": cnn, "GPT-2": gpt2, "Llama": llama}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time gradient noise beside a plain training step.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(given.threads)
    rows = [row for name, build in MODELS.items() for row in measure(name, build, given.rounds)]
    environment = {"versions": _versions.versions(), "threads": torch.get_num_threads(), "rounds": given.rounds}
    OUT.write_text(json.dumps(environment | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

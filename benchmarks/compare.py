"""What noetherflow, BackPACK and Opacus measure of the same models: who covers what, and whether the numbers agree.

    python benchmarks/compare.py

Everything is in float64, and compared with a backward pass for every single example. Packages that are not installed
(`make bench` installs them) are left out. docs/how-it-compares.md shows the output.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from gradient_noise.models import Built, one_by_one
from gradient_noise.ways import RIVALS, Way, keeping, metered
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf


def estimated(subject: Built) -> Way:
    """`estimate_noise` on the batch."""
    return keeping(
        lambda: float(nf.estimate_noise(subject.model, subject.loss, [subject.batch], {}).trace) * subject.unbiased
    )


OURS = ("NoiseMeter", "estimate_noise")
METHODS: dict[str, Callable[[Built], Way]] = {
    "NoiseMeter": lambda subject: metered(subject, symmetries="none"),
    "estimate_noise": estimated,
    "BackPACK": RIVALS["BackPACK BatchL2Grad"],
    "Opacus": RIVALS["Opacus hooks"],
    "Opacus, ghost": RIVALS["Opacus ghost"],
}
# Two ways of adding the same float64 numbers differ by less.
EXACT = 1e-10


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Expression(nn.Module):
    """Parameters in expressions, without a module around each."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix) * self.scale


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))


class Recurrent(nn.Module):
    """The last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def built(model: nn.Module, *shape: int) -> Built:
    return Built(model.double(), classify, (torch.randn(16, *shape).double(), torch.randint(3, (16,))))


def models() -> dict[str, Built]:
    """Small models, each with a difficulty."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    image = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    groups = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    batches = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    return {
        "linear layers": built(dense, 6),
        "convolution": built(image, 2, 6, 6),
        "GroupNorm": built(groups, 2, 6, 6),
        "LayerNorm": built(layers, 6),
        "a layer used twice": built(Twice(), 6),
        "a weight shared by two layers": built(Tied(), 6),
        "parameters in expressions": built(Expression(), 6),
        "LSTM": built(Recurrent(), 4, 6),
        "BatchNorm, eval": built(batches[0].eval(), 6),
        "BatchNorm, train": built(batches[1], 6),
    }


def installed(method: str) -> bool:
    return method in {*OURS, "noetherflow"} or importlib.util.find_spec(method.split(",")[0].lower()) is not None


def answer(method: str, subject: Built, expected: float) -> str:
    """How a method does on a model: exact, what it leaves out, by how much it is off, or its exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way = METHODS[method](subject)
            way.step()
            missing, trace = way.missing(), way.trace()
    except Exception as error:  # a method refuses a model with any kind of exception
        return type(error).__name__
    if missing:
        return "lacks " + missing.split(",", maxsplit=1)[0]
    off = abs(trace - expected) / expected
    return "exact" if off < EXACT else f"off by {off:.0%}"


def coverage(methods: list[str]) -> dict[str, dict[str, str]]:
    """By model and method, how the total noise Tr Sigma compares with single examples."""
    answers = {}
    for name, subject in models().items():
        train = name == "BatchNorm, train"  # there is no gradient of a single example
        expected = float("nan") if train else one_by_one(subject)
        answers[name] = {method: answer(method, subject, expected) for method in methods}
    return answers


def stacked(subject: Built) -> dict[str, Tensor]:
    """The gradient of every example by parameter, from a backward pass each."""
    names, parameters = zip(*subject.model.named_parameters(), strict=True)
    rows = [
        torch.autograd.grad(subject.loss(subject.model, subject.examples(slice(k, k + 1))).sum(), parameters)
        for k in range(subject.size)
    ]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def backward(model: nn.Module, subject: Built) -> None:
    """The backward pass of the mean loss; hooks of other packages warn of inputs without gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")
        subject.loss(model, subject.batch).mean().backward()


def of_backpack(subject: Built, extension: str, field: str) -> dict[str, Tensor]:
    """A field that BackPACK leaves on each parameter, for a mean over the batch."""
    from backpack import backpack, extend, extensions

    model = extend(nn.Sequential(*subject.model))
    with backpack(getattr(extensions, extension)()):
        backward(model, subject)
    return {name: getattr(parameter, field).detach() for name, parameter in model.named_parameters()}


def of_opacus(subject: Built) -> dict[str, Tensor]:
    """The gradient of every example, from Opacus."""
    from opacus import GradSampleModule

    model = GradSampleModule(subject.model, loss_reduction="mean")
    backward(model, subject)
    stacks = {name: parameter.grad_sample.detach().clone() for name, parameter in subject.model.named_parameters()}
    model.to_standard_module()
    return stacks


def row_gram(stack: Tensor) -> Tensor:
    """The Gram matrix of the rows of centred gradients (B, n, m), averaged: N+ of a matrix symmetry."""
    centred = stack - stack.mean(0)
    return (centred @ centred.mT).mean(0)


def quantities() -> dict[str, dict[str, float]]:
    """By quantity and package, the largest difference from single examples over the largest entry."""
    torch.manual_seed(0)
    subject = built(nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)), 6)
    truth = stacked(subject)
    pair = {"pair": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    rows = {"rows": nf.DiagonalSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    grams = nf.estimate_noise(subject.model, subject.loss, [subject.batch], pair).grams["pair"].plus
    sums = nf.estimate_noise(subject.model, subject.loss, [subject.batch], rows)
    truths: dict[str, Any] = {
        "squared norm of each gradient": truth["0.weight"].square().flatten(1).sum(1),
        "variance of each entry": truth["0.weight"].var(0, correction=0),
        "noise by row, of a rescaling": row_gram(truth["0.weight"]).diagonal(),
        "Gram matrix, of a matrix symmetry": row_gram(truth["0.weight"]),
    }
    norm, variance, row, gram = truths
    answers: dict[str, dict[str, Tensor]] = {name: {} for name in truths}
    answers[variance]["noetherflow"] = sums.variance["0.weight"]
    answers[row]["noetherflow"] = sums.grams["rows"].plus
    answers[gram]["noetherflow"] = grams
    if installed("BackPACK"):
        answers[norm]["BackPACK"] = of_backpack(subject, "BatchL2Grad", "batch_l2")["0.weight"] * subject.size**2
        answers[variance]["BackPACK"] = of_backpack(subject, "Variance", "variance")["0.weight"] * subject.size**2
        answers[row]["BackPACK"] = answers[variance]["BackPACK"].sum(1)
        gradients = of_backpack(subject, "BatchGrad", "grad_batch")["0.weight"] * subject.size
        answers[gram]["BackPACK"] = row_gram(gradients)
    if installed("Opacus"):
        gradients = of_opacus(subject)["0.weight"]
        answers[norm]["Opacus"] = gradients.square().flatten(1).sum(1)
        answers[variance]["Opacus"] = gradients.var(0, correction=0)
        answers[row]["Opacus"] = row_gram(gradients).diagonal()
        answers[gram]["Opacus"] = row_gram(gradients)
    return {
        name: {
            package: float((value - truths[name]).abs().max() / truths[name].abs().max())
            for package, value in of.items()
        }
        for name, of in answers.items()
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows])
    lines = ["  ".join(cells).rstrip() for cells in padded]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    methods = [method for method in METHODS if installed(method)]
    answers = coverage(methods)
    warnings.filterwarnings(
        "ignore", message="Full backward hook"
    )  # of BackPACK and Opacus, on inputs without gradient
    print("Tr Sigma of a batch, compared with single examples")
    print(table(["model", *methods], [[name, *(row[method] for method in methods)] for name, row in answers.items()]))
    packages = [name for name in ("noetherflow", "BackPACK", "Opacus") if installed(name)]
    print("\nLargest difference from single examples, relative to the largest entry")
    rows = [[name, *(f"{row[p]:.0e}" if p in row else "-" for p in packages)] for name, row in quantities().items()]
    print(table(["quantity", *packages], rows))


if __name__ == "__main__":
    main()

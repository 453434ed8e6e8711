"""The picture of README: one function, four points on its orbit, and where SGD takes them.

    python benchmarks/picture.py                 # writes docs/balance.svg, and prints the numbers

A ReLU network learns a function with noisy labels. Then its layers are rescaled: more weight in the first layer, or
more in the second, and no output changes. From each of these points SGD goes on, and the charge, squared weights of the
first layer minus squared weights of the second, moves to the value that was computed before, from the noise at the
first point. A model that `rebalance_` moves there stays.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import noetherflow as nf

TARGET = Path(__file__).parents[1] / "docs" / "balance.svg"
NAME = "0 -> 2"
COURSES = {
    "more weight in the first layer": "#d95f02",
    "as trained": "#7570b3",
    "more weight in the second layer": "#1b9e77",
    "moved by rebalance_": "black",
}
# Coordinates of the first and the third point, seen from the equilibrium.
SHIFT = 0.8


@dataclass(frozen=True)
class Curves:
    """Charges along four trainings.

    Args:
        steps: The steps at which the charges were recorded, shape (K,).
        charges: The charge of every training, in the order of `COURSES`, shape (K, 4).
        predicted: The charge at the noise equilibrium, computed before the first of these steps.
        relaxation: The median relaxation time in steps.
    """

    steps: Tensor
    charges: Tensor
    predicted: float
    relaxation: float


def trained(steps: int) -> tuple[nn.Module, nf.Loss, nf.SGD]:
    """A ReLU network that has learned the function of a teacher from noisy labels, its loss, and its settings."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)).double().requires_grad_(False)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).double()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, noise = batch
        return (model(x) - teacher(x) - 0.5 * noise).square().sum(1)

    sgd = nf.SGD(lr=0.02, batch_size=8, weight_decay=1e-3)
    start = nf.simulate(model, loss, sample, sgd, steps=steps, record=[steps], progress=False).params
    model.load_state_dict({name: stack[0] for name, stack in start.items()})
    return model, loss, sgd


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New examples: an input and the noise of its label."""
    inputs = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def measured(before: int, after: int) -> Curves:
    """Train, compute the equilibrium, rescale, and train on."""
    model, loss, sgd = trained(before)
    batches = [sample(512, torch.Generator().manual_seed(seed)) for seed in range(16)]
    symmetries = nf.find_symmetries(model, loss, batches[0])
    noise = nf.estimate_noise(model, loss, batches, symmetries, progress=False)
    equilibrium = nf.solve_equilibrium(noise, sgd, model)
    balanced = copy.deepcopy(model)
    nf.rebalance_(balanced, equilibrium, loss, batches[0])
    theta, there = ({name: p.detach() for name, p in net.named_parameters()} for net in (model, balanced))
    first, second = (symmetries[NAME].act(torch.full((16,), x).double(), there) for x in (SHIFT, -SHIFT))
    start = {name: torch.stack([point[name] for point in (first, theta, second, there)]) for name in theta}
    course = nf.simulate(
        model, loss, sample, sgd, steps=after, start=start, symmetries=symmetries, record=after // 60, progress=False
    )
    return Curves(
        course.steps,
        course.charges[NAME].sum(-1),
        float(symmetries[NAME].charge(there).sum()),
        float(equilibrium.relaxation_steps[NAME].median()),
    )


def draw(curves: Curves, target: Path) -> None:
    """The picture as an SVG of a few kilobytes, with text as text; equal numbers give an equal file."""
    settings = {"svg.hashsalt": "balance", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(7.6, 3.2), layout="constrained")
        for (label, colour), charge in zip(COURSES.items(), curves.charges.T, strict=True):
            axes.plot(curves.steps / 1000, charge, color=colour, label=label)
        axes.axhline(curves.predicted, color="black", linestyle="--", label="equilibrium, computed beforehand")
        axes.set_xlabel("thousand steps of SGD")
        axes.set_ylabel("squared weights,\nfirst layer minus second layer")
        axes.legend(title="four models with equal outputs", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(target, format="svg", metadata={"Date": None})
        plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=int, default=10_000, help="steps before the equilibrium is computed")
    parser.add_argument("--after", type=int, default=40_000, help="steps after that")
    parser.add_argument("--out", type=Path, default=TARGET)
    chosen = parser.parse_args(arguments)
    curves = measured(chosen.before, chosen.after)
    draw(curves, chosen.out)
    print(f"computed beforehand: {curves.predicted:.2f}; median relaxation time {curves.relaxation:,.0f} steps")
    tail = math.ceil(len(curves.steps) / 4)
    for label, start, end in zip(COURSES, curves.charges[0], curves.charges[-tail:].mean(0), strict=True):
        print(f"{label}: {start:.2f} at the start, {end:.2f} in the last quarter")


if __name__ == "__main__":
    main()

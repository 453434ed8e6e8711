"""F10: the pictures of the regression, of weight decay, of the networks, and of changed settings."""

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from noetherflow.paper import style
from noetherflow.paper.f10_limits import Limit
from noetherflow.paper.f10_networks import Left
from noetherflow.paper.f10_problem import Rest

FORMULA_OF_SGD = style.CONTRAST | {"linestyle": ":"}


def plot_rest(axes: Axes, rest: Rest, predicted: float, sgd: float) -> None:
    """Draw the mean coordinate of each start, and both predictions."""
    plot_starts(axes, rest, style.MEASURED, "AdamW")
    axes.axhline(predicted, **style.PREDICTED, label="predicted")
    axes.axhline(sgd, **FORMULA_OF_SGD, label="formula of SGD")
    axes.set_xlabel("steps")


def plot_starts(axes: Axes, rest: Rest, look: dict[str, Any], label: str) -> None:
    """Draw the mean coordinate of each start, with one entry in the legend."""
    for start, mean in enumerate(rest.x.mean(2).mT):
        axes.plot(rest.steps, mean, **look, label=label if start == 0 else None)


def plot_decay(
    axes: Axes, decays: list[float], predicted: list[float], sgd: list[float], rests: dict[float, Rest]
) -> None:
    """Draw the coordinate at rest over weight decay by both formulas, and the measured coordinates."""
    axes.plot(decays, predicted, **style.PREDICTED, label="predicted")
    axes.plot(decays, sgd, **FORMULA_OF_SGD, label="formula of SGD")
    for start, late in enumerate(torch.stack([rest.late.mean(1) for rest in rests.values()]).mT):
        label = "AdamW" if start == 0 else None
        axes.plot(list(rests), late, "o", color=style.MEASURED["color"], markersize=4, label=label)
    axes.set(xlabel="weight decay", xscale="log", title="(b) weight decay, 2 starts")


def plot_left(axes: Axes, networks: dict[float, Left]) -> None:
    """Draw what is left per neuron at the end, by the formulas of AdamW and SGD."""
    for (decay, part), line in zip(networks.items(), ("-", "--"), strict=False):
        for values, look, name in ((part.adamw, style.MEASURED, "AdamW"), (part.sgd, style.CONTRAST, "SGD")):
            share = torch.linspace(0, 1, len(values))
            label = f"formula of {name}, decay {decay:g}"
            axes.plot(values.abs().sort().values, share, **(look | {"linestyle": line}), label=label)
    axes.set(xlabel="distance to the equilibrium", ylabel="share of neurons", xscale="log", title="(b) ReLU networks")
    axes.legend(fontsize=6)


def plot_ahead(axes: Axes, networks: dict[float, Left]) -> None:
    """Draw the error of predictions of the end that are made on the way."""
    looks = {
        "joint": ("black", "joint"),
        "layers": (style.MEASURED["color"], "layer by layer"),
        "expected": (style.CONTRAST["color"], "formula of SGD"),
        "still": ("0.6", "no prediction"),
    }
    for (decay, part), mark in zip(networks.items(), "os", strict=False):
        for kind, (color, words) in looks.items():
            errors = [rms(values) for values in getattr(part, kind)]
            axes.plot(part.steps, errors, mark, color=color, markersize=4, label=f"{words}, decay {decay:g}")
    axes.set(xlabel="step of the prediction", ylabel="rms error per neuron", title="(b) predictions of the end")
    axes.legend(fontsize=6)


def plot_limits(axes: Axes, limits: dict[str, Limit]) -> None:
    """Draw measured minus predicted coordinates with changed settings, for both starts."""
    for position, limit in enumerate(limits.values()):
        off = limit.rest.late.mean(1) - limit.predicted
        named = position == 0
        look = {"color": style.MEASURED["color"], "markersize": 4}
        axes.plot([position] * len(off), off, "o", **look, label="measured, 2 starts" if named else None)
        look = {"color": style.CONTRAST["color"], "markersize": 4}
        axes.plot([position] * len(off), -limit.rest.left, "x", **look, label="from measured v" if named else None)
    axes.axhline(0.0, **style.PREDICTED, label="predicted")
    axes.set_xticks(range(len(limits)), list(limits), fontsize=6, rotation=90)
    axes.set(ylabel="measured - predicted", title="(d) changed settings")
    axes.legend(fontsize=6)


def decays_around(decays: tuple[float, ...]) -> list[float]:
    """Decays for a curve through the measured decays."""
    ends = math.log10(min(decays) / 2), math.log10(max(decays) * 2)
    return torch.logspace(*ends, 40, dtype=torch.float64).tolist()


def rms(values: Tensor) -> float:
    """Root of the mean of squares."""
    return values.square().mean().sqrt().item()

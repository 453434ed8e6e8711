r"""F12: a forecast of the sharpness, tested by training.

Question: `forecast` says by which factor Tr H changes on the way to the noise equilibrium, and after how many steps
half of the change is made. What does training do?

Setting: F3, and F4's problem: two linear layers under SGD. An MLP and a CNN on digits under SGD, and a character-level
GPT-2 under AdamW, each trained on from a point where it still learns, and from rest. Every problem has several seeds.
Tr H along training is measured by formulas that share no code with the forecast.

Formula: along an orbit the Hessian follows, $H(e^{Q}\theta) = e^{-Q} H(\theta)\,e^{-Q}$; the forecast takes it to the
noise equilibrium.

Falsified by: F3 or F4 from a minimum with a sharpness at the end that is more than 10 % off, or a time to half of the
change that is more than 25 % off; for any problem, a seed whose Tr H changes in the direction opposite to a forecast
that is told and more than two of its errors from 1. A forecast that says "cannot be told" is no prediction. The time of
F3 at phi = .2 is off by more, from the size of the learning rate: there, the time at a quarter of the learning rate has
to be right within 25 %, and its error smaller.

Source: this project.
"""

import importlib
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from noetherflow._errors import SettingsError
from noetherflow.paper import f12_linear, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f12_measured import Measured, mean_of
from noetherflow.paper.f12_settings import PROBLEMS, Config

__all__ = ["TITLE", "Config", "claims", "plot", "run"]

TITLE = "A forecast of the sharpness, tested by training"
# Largest relative error of the sharpness at the end and of the time to half, where the forecast starts at a minimum.
_END, _HALF = 0.10, 0.25
_LINES = ("-", ":", "-.", (0, (1, 3)), (0, (5, 3)), (0, (8, 2, 1, 2)))


def run(config: Config) -> list[Measured]:
    """Forecast, train, and measure Tr H, for each problem of the settings."""
    unknown = set(config.problems) - set(PROBLEMS)
    if unknown:
        raise SettingsError(f"there is no problem {sorted(unknown)}; the problems are {', '.join(PROBLEMS)}")
    results: list[Measured] = []
    for problem in config.problems:
        if problem == "f3":
            results += f12_linear.of_f3(config)
        elif problem == "f4":
            results += f12_linear.of_f4(config)
        else:
            results += _networks(config, problem)
    return results


def _networks(config: Config, problem: str) -> list[Measured]:
    """Digits need scikit-learn, and GPT-2 needs transformers: imported only where they are in the settings."""
    if problem == "gpt2":
        return importlib.import_module("noetherflow.paper.f12_gpt2").of_gpt2(config)
    return importlib.import_module("noetherflow.paper.f12_digits").of_digits(config, problem)


def claims(config: Config, outcome: list[Measured]) -> list[Claim]:
    """Compare predictions with measurements, the end and the time for F3 and for F4 from the minimum."""
    verdicts = []
    for measured in outcome:
        if measured.name.startswith(("F3,", "F4,")):
            verdicts.append(_end_claim(measured))
            slow = [other for other in outcome if other.name == f"{measured.name}, lr x {f12_linear.SLOW:g}"]
            verdicts.append(_closer_claim(measured, slow[0]) if slow else _half_claim(measured))
        if bool(measured.told.any()):
            verdicts += _change_claims(measured)
        verdicts.append(_sign_claim(measured))
    return verdicts


def _end_claim(measured: Measured) -> Claim:
    """The sharpness at the end, within 10 %."""
    predicted, got = mean_of(measured.then), mean_of(measured.ends[measured.compared])
    start = mean_of(measured.curves[0, measured.compared]).value
    still = {"no change": start} if abs(start / predicted.value - 1) > _END else {}
    return Claim(
        f"{measured.name}: Tr H at the end",
        predicted=predicted.value,
        measured=got.value,
        low=(1 - _END) * predicted.value,
        high=(1 + _END) * predicted.value,
        error=got.error,
        wrong=still,
    )


def _half_claim(measured: Measured) -> Claim:
    """The number of steps to half of the change, within 25 %."""
    predicted, got = mean_of(measured.half), measured.half_measured
    return Claim(
        f"{measured.name}: steps to half of the change",
        predicted=predicted.value,
        measured=got.value,
        low=(1 - _HALF) * predicted.value,
        high=(1 + _HALF) * predicted.value,
        error=got.error,
        wrong={"half of the noise": 2 * predicted.value, "twice the noise": predicted.value / 2},
    )


def _closer_claim(measured: Measured, slow: Measured) -> Claim:
    """The error of the time to half is that of a learning rate that is not small: it shrinks with the learning rate."""
    errors = [mean_of(each.half).value / each.half_measured.value - 1 for each in (slow, measured)]
    return Claim(
        f"{measured.name}: error of the steps to half at lr x {f12_linear.SLOW:g}, over that at lr",
        predicted=f12_linear.SLOW,
        measured=abs(errors[0] / errors[1]),
        high=0.6,
        wrong={"an error of the equilibrium": 1.0},
    )


def _change_claims(measured: Measured) -> list[Claim]:
    """The mean change of Tr H: on the side of 1 where the prediction is, if that is more than two errors from 1."""
    predicted, got = mean_of(measured.ratio), mean_of(measured.change[measured.compared])
    stated = mean_of(measured.ratio_error).value
    if not abs(predicted.value - 1) > 2 * stated:
        return []
    sharpens = predicted.value > 1
    return [
        Claim(
            f"{measured.name}: change of Tr H, {int(measured.told.sum())} of {len(measured.ends)} seeds told",
            predicted=predicted.value,
            measured=got.value,
            low=1.0 if sharpens else None,
            high=None if sharpens else 1.0,
            error=got.error,
            wrong={"the inverse": 1 / predicted.value},
        )
    ]


def _sign_claim(measured: Measured) -> Claim:
    """The number of seeds with the wrong sign among those that are told and more than two errors from 1."""
    told, sure, count = int(measured.told.sum()), int(measured.sure.sum()), len(measured.ends)
    return Claim(
        f"{measured.name}: wrong signs of {sure} sure, {told} told, {count} seeds",
        predicted=0.0,
        measured=float(measured.wrong),
        high=0.0,
        wrong={"the opposite sign": float(sure - measured.wrong)} if sure > measured.wrong else {},
    )


def plot(config: Config, outcome: list[Measured]) -> Figure:
    """Draw the predicted and the measured change, the times to half, and the curves."""
    figure = style.panels(3, height=4.8)
    change, half, curves = figure.subplots(1, 3)
    _beside(change, outcome, "change")
    change.axhline(1, color="0.6", linewidth=0.8)
    change.set(yscale="log", ylabel="Tr H at the end over Tr H at the start", title="how much")
    _beside(half, outcome, "half")
    half.set(yscale="log", ylabel="steps to half of the change", title="when")
    for number, measured in enumerate(outcome):
        look = (style.MEASURED if number % 2 == 0 else style.CONTRAST) | {
            "linestyle": _LINES[number // 2 % len(_LINES)]
        }
        mean = (measured.curves / measured.curves[0]).mean(1)
        curves.plot(measured.steps / measured.steps[-1], mean, **look, label=measured.name)
        if bool(measured.told.any()):
            curves.plot([0.97, 1.0], [mean_of(measured.ratio).value] * 2, **style.PREDICTED)
    curves.set(yscale="log", xlabel="share of the training", ylabel="Tr H over Tr H at the start", title="on the way")
    curves.legend(fontsize=6)
    return figure


def _beside(axes: Axes, outcome: list[Measured], what: str) -> None:
    """For every problem the measured number, and the predicted number where it is told."""
    if what == "change":
        pairs = [(mean_of(measured.ratio), mean_of(measured.change[measured.compared])) for measured in outcome]
    else:
        pairs = [(mean_of(measured.half), measured.half_measured) for measured in outcome]
    looks = (
        {"color": "black", "marker": "x", "label": "predicted"},
        {**style.MEASURED, "marker": "o", "label": "measured"},
    )
    numbers = range(len(outcome))
    for look, means in zip(looks, zip(*pairs, strict=True), strict=True):
        known = [(number, *mean) for number, mean in enumerate(means) if not math.isnan(mean.value)]
        x, y, errors = zip(*known, strict=True) if known else ((), (), ())
        # A single seed has no error.
        bars = [0.0 if math.isnan(error) else error for error in errors]
        settings: dict[str, Any] = {**look, "linestyle": "none", "markersize": 5}
        axes.errorbar(x, y, bars, **settings)
    axes.set_xticks([*numbers], [measured.name for measured in outcome], fontsize=7, rotation=90)
    axes.legend(fontsize=7)

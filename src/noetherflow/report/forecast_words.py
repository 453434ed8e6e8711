"""A forecast in plain words, for a reader who does not know the theory."""

import math
from collections.abc import Iterator
from dataclasses import fields

from noetherflow._table import steps
from noetherflow.forecasting import Forecast
from noetherflow.forecasting.estimate import Change, Estimate
from noetherflow.forecasting.result import reasons_of
from noetherflow.forecasting.said import ending, once
from noetherflow.forecasting.schedule import Need, Warmup

INTRODUCTION = (
    "The sharpness is the curvature of the loss: Tr H adds the curvatures along all parameters, and the largest "
    "eigenvalue of H is the curvature along the sharpest direction, which limits the learning rate. Gradient noise and "
    "weight decay drive the weights along the symmetries of the model to an equilibrium. The function of the model "
    "stays on the way; its sharpness changes. A number without an error is exact, or its error is not known."
)
# Parts of a forecast that the tables of the page show.
_PLACED = (Change, Estimate, Warmup)


def sentences(forecast: Forecast) -> list[str]:
    """What the forecast says, most important first; plain text, a paragraph each."""
    ended = ending(forecast.status)
    texts = (
        forecast.sentence,
        *_further(forecast),
        _warmup(forecast.warmup),
        f"{ended[0].upper()}{ended[1:]}.",
    )
    return [text.replace("+-", "±") for text in once(texts, reasons_of(forecast))]


def _further(forecast: Forecast) -> Iterator[str]:
    """The fields that say a sentence about themselves and have no other place on the page."""
    for field in fields(forecast):
        value = getattr(forecast, field.name)
        if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, _PLACED):
            yield f"{field.name.replace('_', ' ').capitalize()}: {value}."


def estimate(value: Estimate) -> str:
    """A number with its error, or that it cannot be told."""
    return f"{value.value:.4g}{_error(value)}" if value.known else "cannot be told"


def time(value: Estimate) -> str:
    """A number of steps with its error, or why it cannot be told."""
    return f"{steps(value.value)}{_error(value)}" if value.known else f"cannot be told: {value.why}"


def _error(value: Estimate) -> str:
    return "" if math.isnan(value.total) or not value.total else f" ± {value.total:.2g}"


def _warmup(warmup: Warmup) -> str:
    """The verdict on the learning rate, and the length of the warmup or its only learning rate."""
    if warmup.need is Need.UNKNOWN:
        return f"Whether a warmup is needed cannot be told: {warmup.why}."
    verdict = f"{warmup.need.value[0].upper()}{warmup.need.value[1:]} ({warmup.why})."
    if len(warmup.schedule) == 1:
        return f"{verdict} The learning rate of the warmup is {warmup.schedule[0][1]:.3g}."
    return f"{verdict} The warmup takes {warmup.steps:,} steps." if warmup.schedule else verdict

"""An analysis in plain words, for a reader who does not know the theory."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from noetherflow._analysis import Analysis, held_out
from noetherflow._falling import remarks
from noetherflow._table import steps
from noetherflow.equilibrium.result import Status
from noetherflow.report.rows import Row, Standing

INTRODUCTION = (
    "A symmetry is a way to change weights without a change of the function, such as the weights into a neuron times 2 "
    "and the weights out of the neuron divided by 2. Gradient noise and weight decay drive the weights along each "
    "symmetry until both sides balance: the symmetry is then at rest."
)


def sentences(analysis: Analysis, rows: Sequence[Row]) -> list[str]:
    """What the analysis says, most important first; plain text.

    Args:
        analysis: The analysis.
        rows: Its rows.

    Returns:
        Paragraphs.
    """
    if not rows:
        return ["The model has no symmetry: there is nothing to balance."]
    paragraphs = (
        " ".join([*_standings(rows), *_largest(rows), *_time(analysis, rows)]),
        " ".join(_rebalance(analysis)),
        *(f"{text}." for text in [held_out(analysis)] if text),
        " ".join(_statuses(rows)),
    )
    return [paragraph for paragraph in paragraphs if paragraph]


def meaning(status: str) -> str:
    """The sentence of a status such as `at_infinity`; the word itself if no such status is known."""
    name = status.upper().replace(" ", "_")
    return Status[name].value if name in Status.__members__ else status


def number(value: float) -> str:
    """A number with three significant digits; a dash for NaN, and a word for infinity."""
    return "–" if math.isnan(value) else "infinity" if math.isinf(value) else f"{value:.3g}"


def _standings(rows: Sequence[Row]) -> Iterator[str]:
    """How many symmetries are away from rest."""
    count, total = Counter(row.standing for row in rows), len(rows)
    if count[Standing.FAR] or count[Standing.REST]:
        yield (
            f"{count[Standing.FAR]:,} of {_symmetries(total)} {_are(count[Standing.FAR])} further from rest than the "
            f"error (twice the standard error of the distance)."
        )
        if count[Standing.REST]:
            yield f"{count[Standing.REST]:,} {_are(count[Standing.REST])} at rest within the error."
    else:
        yield f"{_symmetries(total).capitalize()} {'was' if total == 1 else 'were'} measured."
    if count[Standing.UNKNOWN]:
        which = "any" if count[Standing.UNKNOWN] == total else f"{count[Standing.UNKNOWN]:,}"
        yield f"The error of the distance is not known for {which} of them."
    if count[Standing.HELD]:
        yield f"{count[Standing.HELD]:,} {_are(count[Standing.HELD])} left in place: no equilibrium was reached."


def _largest(rows: Sequence[Row]) -> Iterator[str]:
    """The symmetry that is furthest from rest, among those for which this is certain if there are any."""
    far = [row for row in rows if row.standing is Standing.FAR]
    candidates = far or [row for row in rows if row.standing is Standing.UNKNOWN and row.report.distance > 0]
    if candidates:
        row = max(candidates, key=lambda row: row.report.distance)
        error = "" if math.isnan(row.report.error) else f" ± {row.report.error:.1g}"
        yield (
            f'The largest distance is that of "{row.report.name}", whose weights are typically a factor '
            f"{number(row.factor)} from rest (distance {number(row.report.distance)}{error})."
        )


def _time(analysis: Analysis, rows: Sequence[Row]) -> Iterator[str]:
    """How long training needs by itself, and what that stands on."""
    times = [row.report.relaxation_steps for row in rows if math.isfinite(row.report.relaxation_steps)]
    if times:
        slowest = max(row.report.slowest_steps for row in rows if math.isfinite(row.report.slowest_steps))
        yield (
            "While the function of the network stays, training with these settings moves there by itself: a distance "
            f"shrinks to about a third (1/e) in {_about(median(times))} steps, the median over symmetries; the slowest "
            f"direction needs {_about(slowest)}."
        )
        yield from (f"{text}." for text in remarks(analysis.noise, analysis.settings, analysis.initial))
    else:
        yield "Training with these settings does not move any symmetry to rest by itself."


def _rebalance(analysis: Analysis) -> Iterator[str]:
    """What changes if the model is moved: numbers, and which of them is the one that an equilibrium minimises."""
    equilibrium = analysis.equilibrium
    yield (
        f"Rebalancing moves the weights there at once and leaves the function of the model as it is. It changes the "
        f"gradient noise (Tr Sigma per example) from {number(equilibrium.trace_before)} to "
        f"{number(equilibrium.trace_after)}, and the potential, which counts weight decay and noise together, from "
        f"{number(equilibrium.potential_before)} to {number(equilibrium.potential_after)}."
    )
    if equilibrium.trace_after > equilibrium.trace_before:
        yield (
            "The noise rises: the equilibrium has the least potential, and here weight decay outweighs the noise. "
            "It is where the optimizer takes the weights, and not where the noise is least."
        )


def _statuses(rows: Sequence[Row]) -> Iterator[str]:
    """The outcomes other than a drift of zero, with the number of symmetries."""
    for status, count in Counter(row.report.status for row in rows).items():
        if status != "converged":
            yield f"For {count:,} of {_symmetries(len(rows))}: {meaning(status)}."


def _about(count: float) -> str:
    """A number of steps with two significant digits."""
    return f"about {steps(float(f'{count:.2g}'))}"


def _symmetries(count: int) -> str:
    return "1 symmetry" if count == 1 else f"{count:,} symmetries"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"

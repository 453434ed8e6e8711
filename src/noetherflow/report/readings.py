"""What a recorded run says last: the noise scale with its interval, the charges, and the distances."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from noetherflow.record import Run, names

Column = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Band:
    """A noise scale over the steps that have one.

    Args:
        steps: Steps (M,).
        values: The scale (M,); NaN where it is not known.
        low, high: The interval (M,): NaN for both where there is none, infinity for an upper end that is unbounded.
    """

    steps: NDArray[np.int64]
    values: Column
    low: Column
    high: Column

    @property
    def unbounded(self) -> int:
        """The number of steps at which the interval has no upper end."""
        return int(np.isinf(self.high).sum())


@final
@dataclass(frozen=True)
class Moved:
    """A symmetry and what became of its charge.

    Args:
        name: The name of the symmetry.
        first: The first recorded step of the charge.
        last: The last charge.
        change: The last charge less the first.
        spread: The largest charge less the smallest.
        parts: By what changed the charge, the change by it since the first step.
    """

    name: str
    first: int
    last: float
    change: float
    spread: float
    parts: dict[str, float]


def column(run: Run, kind: str, name: str = "") -> Column:
    """A column of a run; NaN throughout if the run has no such metric."""
    return run.columns.get(names.joined(kind, name), np.full(len(run.steps), np.nan))


def band(run: Run, kind: str, name: str = "") -> Band | None:
    """The noise scale of a kind, of all parameters or of a layer; None if it was never recorded."""
    values, low, high = (column(run, kind + end, name) for end in ("", "_low", "_high"))
    known = ~(np.isnan(values) & np.isnan(low) & np.isnan(high))
    if not known.any():
        return None
    # A recorder writes NaN or infinity for an upper end that is unbounded: NaN beside a lower end means infinity.
    low, high = (
        np.where(np.isnan(end) & ~np.isnan(other), limit, end)
        for end, other, limit in ((low, high, 0.0), (high, low, np.inf))
    )
    values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    return Band(run.steps[known], values[known], low[known], high[known])


def layers(run: Run) -> list[str]:
    """Names of layers or groups of which the noise was recorded, in the order of the record."""
    kinds = (names.SCALE, names.PRECONDITIONED, names.TRACE, names.SQUARE)
    return _names(run, (kind + end for kind in kinds for end in ("", "_low", "_high")))


def symmetries(run: Run, kind: str) -> list[str]:
    """Names of symmetries that have a metric of a kind, in the order of the record."""
    return _names(run, (kind,))


def others(run: Run) -> list[str]:
    """Metrics without a meaning for this package, which are drawn as plain curves."""
    return [key for key in run.columns if names.split(key) is None]


def moved(run: Run) -> list[Moved]:
    """Every symmetry with a charge; those whose charge moved most come first."""
    return sorted(filter(None, (_moved(run, name) for name in symmetries(run, names.CHARGE))), key=lambda s: -s.spread)


def furthest(run: Run) -> list[tuple[str, int, float]]:
    """Symmetry, step and last finite distance; those furthest from equilibrium come first."""
    rows = [(name, *last(run, column(run, names.DISTANCE, name))) for name in symmetries(run, names.DISTANCE)]
    return sorted((row for row in rows if math.isfinite(row[2])), key=lambda row: -row[2])


def parts_of(run: Run, name: str) -> dict[str, str]:
    """Kinds of the parts of a charge and what they are; of the rare parts, those that are not zero throughout."""
    rare = {kind: what for kind, what in names.RARE_PARTS.items() if np.nan_to_num(column(run, kind, name)).any()}
    return names.PARTS | rare


def last(run: Run, values: Column) -> tuple[int, float]:
    """The last finite value of a column and its step; NaN if there is none."""
    places = np.flatnonzero(np.isfinite(values))
    return (int(run.steps[places[-1]]), float(values[places[-1]])) if len(places) else (0, math.nan)


def since_first(run: Run, kind: str, name: str) -> Column:
    """A column less its value at the first step that has a charge; the sums of the parts may have begun earlier."""
    finite = np.isfinite(column(run, names.CHARGE, name))
    values = column(run, kind, name)
    with np.errstate(invalid="ignore"):
        return values - values[np.argmax(finite)] if finite.any() else values


def _names(run: Run, kinds: Iterable[str]) -> list[str]:
    chosen = set(kinds)
    pairs = filter(None, map(names.split, run.columns))
    return list(dict.fromkeys(name for kind, name in pairs if name and kind in chosen))


def _moved(run: Run, name: str) -> Moved | None:
    charges = column(run, names.CHARGE, name)
    finite = np.isfinite(charges)
    if not finite.any():
        return None
    known = charges[finite]
    parts = {what: last(run, since_first(run, kind, name))[1] for kind, what in parts_of(run, name).items()}
    return Moved(
        name,
        int(run.steps[np.argmax(finite)]),
        float(known[-1]),
        float(known[-1] - known[0]),
        float(known.max() - known.min()),
        {what: value for what, value in parts.items() if math.isfinite(value)},
    )

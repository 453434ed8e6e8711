"""The rows of the page of an analysis: each symmetry with its block of the network and how far from rest it is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, final

from noetherflow._analysis import Analysis, SymmetryReport

ACROSS = "across blocks"


@final
class Standing(Enum):
    """How far a symmetry is from rest, compared with the error; the value is the text to read."""

    FAR = "further from rest than the error"
    REST = "at rest within the error"
    UNKNOWN = "error unknown"
    HELD = "left where it is"


@final
@dataclass(frozen=True)
class Row:
    """A symmetry on the page.

    Args:
        report: The report of the symmetry.
        block: The block of the network in which all its parameters lie.
        standing: How far it is from rest.
    """

    report: SymmetryReport
    block: str
    standing: Standing

    @property
    def factor(self) -> float:
        """The factor e^{distance} by which weights differ from those at rest."""
        return math.exp(min(self.report.distance, 700.0))

    def to_json(self) -> list[Any]:
        """The values for page.js, in the order of its constant FIELDS; infinities become the text "inf"."""
        report = self.report
        values = (
            report.name,
            self.block,
            report.kind,
            report.dimension,
            report.distance,
            report.error,
            report.imbalance_before,
            report.imbalance_after,
            report.holdout_before,
            report.holdout_after,
            report.relaxation_steps,
            report.slowest_steps,
            report.status.replace("_", " "),
            self.standing.value,
            report.message,
        )
        return ["inf" if value == math.inf else value for value in values]


def rows_of(analysis: Analysis) -> list[Row]:
    """The rows of an analysis, in its order."""
    symmetries = analysis.equilibrium.symmetries
    return [Row(report, block_of(symmetries[report.name].names), _standing(report)) for report in analysis.reports]


def by_block(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each block, blocks in the order in which they first occur."""
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    return blocks


def block_of(names: Sequence[str]) -> str:
    """The block of parameters: the common prefix of their modules, up to the first number.

    Args:
        names: Names of parameters, such as `transformer.h.0.ln_1.weight`.

    Returns:
        The block, such as `transformer.h.0`; `ACROSS` if the modules have no common prefix.
    """
    modules = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
        if parts[0].isdigit():
            break
    return ".".join(common) or ACROSS


def _standing(report: SymmetryReport) -> Standing:
    """The distance of a symmetry compared with its error; a symmetry without any equilibrium has no distance."""
    if report.distance == 0 and report.status != "converged":
        return Standing.HELD
    if math.isnan(report.error) or math.isnan(report.distance):
        return Standing.UNKNOWN
    return Standing.REST if report.at_rest else Standing.FAR

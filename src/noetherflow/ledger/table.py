"""The account of the charges as a table and as flat numbers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from noetherflow._table import Column, Table
from noetherflow.ledger.parts import ChargeParts
from noetherflow.symmetry import Action, Symmetry


def total(symmetry: Symmetry, charge: Tensor) -> float:
    """The sum of a charge over its coordinates; of a matrix, the trace."""
    return float(charge.trace() if symmetry.action is Action.MIXES_ROWS else charge.sum())


def flat_metrics(
    symmetries: Mapping[str, Symmetry], charges: Mapping[str, Tensor], totals: Mapping[str, ChargeParts]
) -> dict[str, float]:
    """Numbers by names such as `charge_noise/0 -> 2`: sums over coordinates, or traces.

    Args:
        symmetries: By name.
        charges: The present charges.
        totals: The parts of their changes.

    Returns:
        The numbers; `charge/NAME` is the charge and `charge_PART/NAME` a part of its change.
    """
    numbers = {}
    for name, symmetry in symmetries.items():
        numbers[f"charge/{name}"] = total(symmetry, charges[name])
        numbers |= {f"charge_{part}/{name}": total(symmetry, value) for part, value in totals[name].items()}
    return numbers


def charge_table(
    title: str,
    symmetries: Mapping[str, Symmetry],
    charges: Mapping[str, Tensor],
    totals: Mapping[str, ChargeParts],
    notes: Sequence[str],
) -> Table:
    """A row for each symmetry; parts that are zero for all symmetries have no column."""
    values = {name: dict(parts.items()) for name, parts in totals.items()}
    shown = [
        part
        for part in (field for field, _ in next(iter(totals.values())).items())
        if part == "change" or any(parts[part].any() for parts in values.values())
    ]
    columns = (Column("symmetry", folds=True), Column("charge", right=True), *(Column(p, right=True) for p in shown))
    rows = []
    for name, symmetry in symmetries.items():
        cells = [charges[name], *(values[name][part] for part in shown)]
        rows.append((name, *(f"{total(symmetry, cell):+.3g}" for cell in cells)))
    return Table(title, columns, tuple(rows), tuple(notes))

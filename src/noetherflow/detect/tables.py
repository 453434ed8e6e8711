"""The tables of an explanation: symmetries, axes without a symmetry, and symmetries that do not act along axes."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from noetherflow._patterns import Cell, cell_of_name, cell_of_sentence, merge
from noetherflow._table import Column, Table, starred
from noetherflow.detect.causes import cause_of
from noetherflow.symmetry import Axis, DenseSymmetry

if TYPE_CHECKING:
    from noetherflow.detect.explanation import AxisNote, Explanation, Finding

_REJECTED = "REJECTED"
_MEANING = (
    f"{_REJECTED}: the operations of the model allow the symmetry, but the numbers do not, so it is left out; resid "
    "says by how much."
)
_REMEDY = (
    "A little more than rounding: repeat in float64. Otherwise: the rule of an operation is wrong; please report the "
    "model."
)
# What stands in a table, and what it means.
_LEGEND = (
    ("resid", "change of a loss or cosine with a gradient, the largest over examples"),
    ("note", "the operation (module) that prevents a matrix from mixing rows"),
    ("because of", "the operation (module) that fixes the scale of the axes"),
    (".name", "continues the name before the colon"),
    ("{i=0..3}", "stands for 0, 1, 2 and 3; {i+1} for 1, 2, 3 and 4; i and j: all pairs"),
)
# The bounds of a slice as expressions.
_SLICE = re.compile(r"\[\{([^{}=]*)\}:\{([^{}=]*)\}\]")


def tables_of(explanation: "Explanation") -> tuple[Table, ...]:
    """The symmetries, the axes without a symmetry, the symmetries that do not act along axes, and the legend."""
    tables = [_symmetries(explanation.found, explanation.rejected), _axes_without(explanation.axes)]
    if explanation.off_axis_note:
        tables.append(_off_axis(explanation.off_axis, explanation.off_axis_note))
    cells = [cell for table in tables for row in table.rows for cell in row]
    used = {
        "resid": bool(explanation.found or explanation.rejected),
        "note": any(finding.diagonal and not finding.small for finding in explanation.found),
        "because of": bool(tables[1].rows),
        ".name": any(": ." in cell or cell.startswith(".") for cell in cells),
        "{i=0..3}": any("{i=" in cell for cell in cells),
    }
    legend = tuple((what, meaning) for what, meaning in _LEGEND if used[what])
    return (*tables, *(Table("", (Column("", right=True), Column("", folds=True)), legend),) * bool(legend))


def _symmetries(findings: Sequence["Finding"], rejected: Sequence["Finding"]) -> Table:
    """The symmetries and the rejected candidates; rows that differ only in integers of names are merged."""
    listed = [*((finding, finding.small or finding.diagonal) for finding in findings)]
    listed += ((finding, _REJECTED) for finding in rejected)
    rows = [_cells_of_finding(finding, note) for finding, note in listed]
    keys = [(finding.symmetry.label, *map(_layout, _axes(finding))) for finding, _ in listed]
    merged = merge(rows, keys)
    counted = len(merged) < len(rows)
    columns = (
        Column("symmetry", folds=True),
        Column("kind"),
        *(Column("count", right=True),) * counted,
        Column("plus", folds=True),
        Column("minus", folds=True),
        Column("resid", right=True),
        Column("note", folds=True),
    )
    cells = []
    for pattern in merged:
        name, kind, plus, minus, note = (
            map(_with_plain_slices, pattern.cells) if len(pattern.rows) > 1 else pattern.cells
        )
        residual = max(listed[number][0].residual for number in pattern.rows)
        counts = (str(len(pattern.rows)),) * counted
        cells.append((name, kind, *counts, plus, minus, f"{residual:.0e}", note))
    return Table("Symmetries", columns, tuple(cells), _notes(rejected))


def _notes(rejected: Sequence["Finding"]) -> tuple[str, ...]:
    """What a rejection means, and its cause or what to do; the rule of an operation is blamed if no cause is known."""
    causes = [(finding.name, cause_of(finding.residual)) for finding in rejected]
    if not causes:
        return ()
    unknown = [name for name, cause in causes if not cause]
    if len(unknown) == len(causes):
        return (f"{_MEANING} {_REMEDY}",)
    return (_MEANING, *starred((name, cause or _REMEDY.removesuffix(".")) for name, cause in causes))


def _axes_without(axes: Iterable["AxisNote"]) -> Table:
    """The axes on which no symmetry acts, by reason; axes of a parameter with equal reasons share a line."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for note in axes:
        if not note.symmetries:
            grouped.setdefault((note.parameter, note.reason), []).append(note.axis)
    rows = [
        ((*cell_of_name(parameter), f" {', '.join(map(str, dims))}"), cell_of_sentence(reason))
        for (parameter, reason), dims in grouped.items()
    ]
    lines: dict[str, list[str]] = {}
    for pattern in merge(rows, [None] * len(rows)):
        parameter, reason = pattern.cells
        lines.setdefault(reason, []).append(parameter)
    columns = Column("parameter, axes", folds=True), Column("because of", folds=True)
    listed = {reason: _without_common_names(parameters) for reason, parameters in lines.items()}
    cells = tuple(("\n".join(parameters), reason) for reason, parameters in listed.items())
    return Table("Axes on which no symmetry acts", columns, cells)


def _without_common_names(lines: Sequence[str]) -> list[str]:
    """Lines with parameters of a block in a line: `h.{i=0..3}: .fc.weight 0; .fc.bias 0`."""
    blocks: dict[str, list[str]] = {}
    for line in lines:
        head, brace, rest = line.rpartition("}.")
        blocks.setdefault(head + brace[:-1] if brace else line, []).append(f".{rest}")
    return [
        head if head in lines else head + ": " * (len(rests) > 1) + "; ".join(rests) for head, rests in blocks.items()
    ]


def _off_axis(symmetries: Iterable[DenseSymmetry], note: str) -> Table:
    """How many generators of which kind act on which parameters, and what the search yielded."""
    kinds = ((symmetry.names, _kind(symmetry.generator)) for symmetry in symmetries)
    counts = Counter(kinds)
    headed = bool(counts)
    columns = (Column("count" * headed, right=True), Column("kind" * headed), Column("acts on" * headed, folds=True))
    rows = tuple((str(count), kind, ", ".join(names)) for (names, kind), count in counts.items())
    return Table("Symmetries that do not act along axes", columns, rows, (note,))


def _kind(generator: Tensor) -> str:
    """Whether a generator has entries off its diagonal that are more than rounding."""
    mixed = (generator - generator.diag().diag()).abs().max() > 1e-9 * generator.abs().max()
    return "mixes entries" if mixed else "scales entries"


def _cells_of_finding(finding: "Finding", note: str) -> tuple[Cell, ...]:
    """Name, kind, plus, minus and note of a finding; names without the prefix of the finding."""
    prefix, symmetry = _prefix(finding), finding.symmetry
    plus, minus = (_joined([_cell_of_axis(axis, prefix) for axis in axes]) for axes in (symmetry.plus, symmetry.minus))
    if prefix:
        note = note.replace(f"({prefix}.", "(.")
    return cell_of_name(finding.name), (symmetry.label,), plus, minus, cell_of_sentence(note)


def _prefix(finding: "Finding") -> str:
    """The name of the module in which a symmetry acts; empty if its name does not begin with a module."""
    module, colon, _ = finding.name.partition(": ")
    return module if colon else ""


def _with_plain_slices(cell: str) -> str:
    """A cell with `[2i:2i+2]` in place of `[{2i}:{2i+2}]`."""
    return _SLICE.sub(r"[\1:\2]", cell)


def _joined(cells: Sequence[Cell]) -> Cell:
    """Cells as the lines of a cell."""
    return tuple(part for k, cell in enumerate(cells) for part in (("\n",) if k else ()) + cell)


def _axes(finding: "Finding") -> tuple[Axis, ...]:
    return finding.symmetry.plus + finding.symmetry.minus


def _layout(axis: Axis) -> tuple[object, ...]:
    """What merged axes have in common besides their text: the sizes of their ranges."""
    inner = axis.within and (axis.within[0], axis.within[2] - axis.within[1])
    return None if axis.stop is None else axis.stop - (axis.start or 0), inner


def _cell_of_axis(axis: Axis, prefix: str) -> Cell:
    """An axis in a cell: name, dimension, range of rows, repetition, and the range in a second axis."""
    name = axis.name.removeprefix(prefix) if axis.name.startswith(f"{prefix}.") else axis.name
    cell = (*cell_of_name(name), f" {axis.dim}")
    if axis.stop is not None:
        cell += ("[", axis.start or 0, ":", axis.stop, "]")
    if axis.repeat > 1:
        cell += (f" x{axis.repeat}",)
    if axis.within:
        cell += (f" in {axis.within[0]}[", axis.within[1], ":", axis.within[2], "]")
    return cell

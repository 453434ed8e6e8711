"""The result of `explain`: symmetries, rejected candidates and axes, as values, as a table, as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from noetherflow import _store
from noetherflow._table import Column, Table, html_of, text_of
from noetherflow._verify import Residual
from noetherflow.symmetry import Axis, Symmetry
from noetherflow.symmetry.axes import AxisSymmetry


@final
@dataclass(frozen=True, eq=False)
class Finding:
    """A symmetry with its numerical certificate.

    Args:
        name: The layers between which the symmetry acts.
        symmetry: The symmetry.
        residual: The larger of the relative change of a loss and the cosine between a gradient and the direction of
            motion; rounding for an exact symmetry.
        diagonal: The operation that forbids a mixing of rows, so that the symmetry is a rescaling of each row and not a
            matrix; empty for other symmetries.
        small: The small number that an approximate symmetry ignores, such as the eps of a normalisation; empty for
            exact symmetries.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batch = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> finding = nf.explain(net, loss, batch).found[0]
        >>> finding.name, finding.diagonal, finding.residual < 1e-12
        ('0 -> 2', 'relu (1)', True)
    """

    name: str
    symmetry: AxisSymmetry
    residual: Residual
    diagonal: str = ""
    small: str = ""


@final
@dataclass(frozen=True)
class AxisNote:
    """An axis of a parameter, with the symmetries that act on the axis or the reason why no symmetry acts.

    Args:
        parameter: The name of the parameter.
        axis: The index of the axis.
        symmetries: The names of the symmetries.
        reason: The operation that forbids a symmetry; empty if there are symmetries.

    Examples:
        >>> import noetherflow as nf
        >>> nf.AxisNote("0.weight", axis=0, symmetries=(), reason="tanh (1)").reason
        'tanh (1)'
    """

    parameter: str
    axis: int
    symmetries: tuple[str, ...]
    reason: str


@final
@dataclass(frozen=True, eq=False)
class Explanation:
    """The result of `explain`.

    Args:
        found: The symmetries, each with its certificate.
        rejected: Candidates from the graph whose residual is more than rounding.
        axes: All axes of all parameters.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batch = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> list(nf.explain(net, loss, batch).symmetries)
        ['0 -> 2']
    """

    found: tuple[Finding, ...]
    rejected: tuple[Finding, ...]
    axes: tuple[AxisNote, ...]

    @property
    def symmetries(self) -> dict[str, Symmetry]:
        """The symmetries by name."""
        return {finding.name: finding.symmetry for finding in self.found}

    def to_json(self) -> dict[str, Any]:
        """All findings and axes as JSON types."""
        return {
            "symmetries": [_finding_to_json(finding) for finding in self.found],
            "rejected": [_finding_to_json(finding) for finding in self.rejected],
            "axes": [
                {"parameter": note.parameter, "axis": note.axis, "symmetries": note.symmetries, "reason": note.reason}
                for note in self.axes
            ],
        }

    def save(self, path: str | Path) -> None:
        """Write the explanation to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by convention `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Explanation":
        """Read an explanation that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The explanation.

        Raises:
            FileError: If the file is missing, damaged, or holds a result of a different class.
        """
        return _store.load(cls, path)

    def __str__(self) -> str:
        return text_of(_tables(self))

    def _repr_html_(self) -> str:
        return html_of(_tables(self))


def _tables(explanation: Explanation) -> tuple[Table, ...]:
    """The symmetries; and the axes on which no symmetry acts, with the reason."""
    rows = [
        *(_row(finding, finding.small or finding.diagonal) for finding in explanation.found),
        *(_row(finding, "REJECTED") for finding in explanation.rejected),
    ]
    columns = (
        Column("symmetry", folds=True),
        Column("kind"),
        Column("plus", folds=True),
        Column("minus", folds=True),
        Column("resid", right=True),
        Column("note", folds=True),
    )
    free = [note for note in explanation.axes if not note.symmetries]
    return (
        Table("Symmetries", columns, tuple(rows)),
        Table(
            "Axes on which no symmetry acts",
            (Column("parameter", folds=True), Column("axis"), Column("because of", folds=True)),
            tuple((note.parameter, str(note.axis), note.reason) for note in free),
        ),
    )


def _row(finding: Finding, note: str) -> tuple[str, ...]:
    """The cells of a finding."""
    plus, minus = ("\n".join(map(_shown, axes)) for axes in (finding.symmetry.plus, finding.symmetry.minus))
    return finding.name, finding.symmetry.label, plus, minus, f"{finding.residual:.0e}", note


def _shown(axis: Axis) -> str:
    """An axis in a cell: name, dimension, range of rows, repetition, and the range in a second axis."""
    part = f"[{axis.start or 0}:{axis.stop}]" if axis.stop is not None else ""
    repeat = f" x{axis.repeat}" if axis.repeat > 1 else ""
    within = f" in {axis.within[0]}[{axis.within[1]}:{axis.within[2]}]" if axis.within else ""
    return f"{axis.name} {axis.dim}{part}{repeat}{within}"


def _finding_to_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "kind": type(finding.symmetry).__name__,
        "plus": [_axis_to_json(axis) for axis in finding.symmetry.plus],
        "minus": [_axis_to_json(axis) for axis in finding.symmetry.minus],
        "residual": float(finding.residual),
        "diagonal_because_of": finding.diagonal,
        "approximate_because_of": finding.small,
    }


def _axis_to_json(axis: Axis) -> dict[str, Any]:
    return {
        "parameter": axis.name,
        "dim": axis.dim,
        "start": axis.start,
        "stop": axis.stop,
        "repeat": axis.repeat,
        "within": axis.within,
    }

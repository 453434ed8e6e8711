"""The result of `explain`: symmetries, rejected candidates and axes, as values, as a table, as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from noetherflow import _store
from noetherflow._table import html_of, text_of
from noetherflow._verify import Residual
from noetherflow.detect.tables import tables_of
from noetherflow.symmetry import Axis, DenseSymmetry, Symmetry
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

    Printed, rows that differ only in the indices of blocks, heads or experts are merged: `h.{i=0..11}.mlp` stands for
    `h.0.mlp` to `h.11.mlp`. The fields, `to_json` and `save` hold every symmetry and every axis by itself.

    Args:
        found: The symmetries, each with its certificate.
        rejected: Candidates from the graph whose residual is more than rounding.
        axes: All axes of all parameters.
        off_axis: Symmetric generators that are not in the span of the symmetries, each a matrix on the parameters on
            which it acts. They form a basis; every linear combination is a generator, too.
        off_axis_note: What a search for such generators yielded, or why there was none; empty if nobody searched.

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
    off_axis: tuple[DenseSymmetry, ...] = ()
    off_axis_note: str = ""

    @property
    def symmetries(self) -> dict[str, Symmetry]:
        """The symmetries by name."""
        return {finding.name: finding.symmetry for finding in self.found}

    def to_json(self) -> dict[str, Any]:
        """All findings, axes and generators off axes as JSON types."""
        return {
            "symmetries": [_finding_to_json(finding) for finding in self.found],
            "rejected": [_finding_to_json(finding) for finding in self.rejected],
            "axes": [
                {"parameter": note.parameter, "axis": note.axis, "symmetries": note.symmetries, "reason": note.reason}
                for note in self.axes
            ],
            "off_axis": [
                {"parameters": symmetry.names, "generator": symmetry.generator.tolist()} for symmetry in self.off_axis
            ],
            "off_axis_note": self.off_axis_note,
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
        return text_of(tables_of(self))

    def _repr_html_(self) -> str:
        return html_of(tables_of(self))


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

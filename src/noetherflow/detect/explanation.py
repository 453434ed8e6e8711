"""What was found, as values and as a table."""

from dataclasses import dataclass
from typing import Any, final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from noetherflow._verify import Residual
from noetherflow.symmetry import Axis, Symmetry
from noetherflow.symmetry.axes import AxisSymmetry


@final
@dataclass(frozen=True, eq=False)
class Finding:
    """One symmetry with its certificate.

    Args:
        name: Where it stands.
        symmetry: What acts.
        residual: Worst relative change of a loss, and worst cosine with a gradient; rounding if it is exact.
        diagonal: Which operation treats rows one by one, if it is a number per row and not a matrix.
        small: Which small number it takes for nothing, if it is approximate.

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
    """One axis of one parameter: the names of the symmetries that act on it, or the reason why none does.

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
    """What `explain` returns.

    Args:
        found: The symmetries, each with its certificate.
        rejected: Candidates that the graph allows and the numbers do not.
        axes: Every axis of every parameter.

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
        return {one.name: one.symmetry for one in self.found}

    def tables(self) -> list[Table]:
        """The symmetries; and the axes on which none acts, with the reason."""
        return [_symmetries(self.found, self.rejected), _axes(self.axes)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "symmetries": [_finding_to_json(one) for one in self.found],
            "rejected": [_finding_to_json(one) for one in self.rejected],
            "axes": [
                {"parameter": one.parameter, "axis": one.axis, "symmetries": one.symmetries, "reason": one.reason}
                for one in self.axes
            ],
        }

    def __str__(self) -> str:
        """The tables as text."""
        console = Console(width=120)
        with console.capture() as capture:
            for table in self.tables():
                console.print(table)
        return capture.get()


def _symmetries(found: tuple[Finding, ...], rejected: tuple[Finding, ...]) -> Table:
    table = Table(title="Symmetries", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("symmetry", "kind", "plus", "minus", "resid", "note"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "resid" else "left")
    for one in (*found, *rejected):
        kind = one.symmetry.label
        note = "REJECTED" if one in rejected else one.small or one.diagonal
        plus, minus = ("\n".join(map(_shown, axes)) for axes in (one.symmetry.plus, one.symmetry.minus))
        table.add_row(one.name, kind, plus, minus, f"{one.residual:.0e}", note)
    return table


def _axes(axes: tuple[AxisNote, ...]) -> Table:
    table = Table(
        title="Axes on which none acts", title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("parameter", "axis", "because of"):
        table.add_column(heading, overflow="fold")
    for one in axes:
        if not one.symmetries:
            table.add_row(one.parameter, str(one.axis), one.reason)
    return table


def _shown(axis: Axis) -> str:
    part = f"[{axis.start or 0}:{axis.stop}]" if axis.stop is not None else ""
    repeat = f" x{axis.repeat}" if axis.repeat > 1 else ""
    within = f" in {axis.within[0]}[{axis.within[1]}:{axis.within[2]}]" if axis.within else ""
    return f"{axis.name} {axis.dim}{part}{repeat}{within}"


def _finding_to_json(one: Finding) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": type(one.symmetry).__name__,
        "plus": [_axis_to_json(axis) for axis in one.symmetry.plus],
        "minus": [_axis_to_json(axis) for axis in one.symmetry.minus],
        "residual": float(one.residual),
        "diagonal_because_of": one.diagonal,
        "approximate_because_of": one.small,
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

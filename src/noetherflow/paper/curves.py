"""Curves to explore: what the report page draws in place of the picture, where an experiment says what they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from noetherflow import _files
from noetherflow._errors import ParameterShapeError


@final
@dataclass(frozen=True, eq=False)
class Curve:
    """Numbers over numbers, with a name for the legend.

    Args:
        name: What the legend says; for a curve of a group, what tells it from the others when the pointer is on it.
        x: Shape (n,).
        y: Shape (n,); infinities and NaN are gaps.
        kind: Measured lines, measured points, or what the theory says.
        group: Curves of one group are one entry of the legend, which shows or hides them together: replicas.
    """

    name: str
    x: Tensor | Sequence[float]
    y: Tensor | Sequence[float]
    kind: Literal["line", "points", "prediction"] = "line"
    group: str | None = None

    def __post_init__(self) -> None:
        """Refuse lengths that differ, which a plot would cut in silence."""
        if len(self.x) != len(self.y):
            raise ParameterShapeError(f"curve {self.name!r}: {len(self.x)} values of x, {len(self.y)} of y")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, to the six digits that can be told apart in a plot."""
        values = {"x": _rounded(self.x), "y": _rounded(self.y)}
        return {"name": self.name, "kind": self.kind, "group": self.group} | values


@final
@dataclass(frozen=True, eq=False)
class Panel:
    """Curves on one pair of axes.

    Args:
        title: What is to be seen.
        x_label: In words, Unicode, `<sub>` and `<sup>`: nothing on the page reads LaTeX.
        y_label: Likewise.
        curves: In the order of the legend.
        log_x: Whether the axis is logarithmic.
        log_y: Likewise.
        equal: Whether a unit is as long upwards as it is sideways.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    equal: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        names = ("title", "x_label", "y_label", "log_x", "log_y", "equal")
        return {name: getattr(self, name) for name in names} | {"curves": [curve.to_json() for curve in self.curves]}


def replicas(group: str, x: Tensor, columns: Tensor, *, most: int = 12) -> list[Curve]:
    """A curve for each of the first columns of a recording, as one group.

    Args:
        group: What the legend calls them.
        x: Shape (n,).
        columns: Shape (n, replicas).
        most: More replicas than this are left out: a page has to load, and the eye follows no more of them.

    Returns:
        The curves.
    """
    count = min(most, columns.shape[1])
    return [Curve(f"replica {index + 1}", x, columns[:, index], group=group) for index in range(count)]


def thinned(length: int, most: int = 200) -> Tensor:
    """Indices of at most so many entries of a recording, evenly spread and with both ends, for long ones."""
    return torch.linspace(0, length - 1, min(most, length), dtype=torch.float64).round().long()


def _rounded(values: Tensor | Sequence[float]) -> list[float | None]:
    listed = values.tolist() if isinstance(values, Tensor) else values
    rounded: list[float | None] = _files.finite([float(f"{value:.6g}") for value in listed])
    return rounded

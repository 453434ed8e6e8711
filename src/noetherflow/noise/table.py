"""Measured moments as tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noetherflow._table import Column, Table
from noetherflow.symmetry import Grams, Symmetry

if TYPE_CHECKING:
    from noetherflow.noise.moments import NoiseMoments

_LEGEND = (
    ("noise+", "N+, gradient noise on the plus side, per example, added over coordinates"),
    ("noise-", "N-, the same on the minus side"),
    ("net", "N+ - N- = Tr[Sigma Q], what drives the charge"),
    ("error", "standard error of net, coordinates taken as independent"),
)


def halves(symmetry: Symmetry, grams: Grams) -> Grams:
    """What plus and minus contribute to the charge, added over its coordinates, each of shape ()."""
    nothing = Grams(*map(torch.zeros_like, grams))
    plus = symmetry.charge_of(Grams(grams.plus, nothing.minus))
    minus = symmetry.charge_of(Grams(nothing.plus, grams.minus))
    return Grams(total(plus), 0.0 - total(minus))  # 0, not -0, without a minus side


def total(coordinates: Tensor) -> Tensor:
    """A number, the sum of a vector, or the trace of a matrix; shape ()."""
    return coordinates.trace() if coordinates.ndim == 2 else coordinates.sum()


def tables_of(moments: "NoiseMoments") -> tuple[Table, ...]:
    """The noise of each symmetry, the total, and what the columns mean."""
    names = Column("symmetry", folds=True)
    columns = (names, *(Column(heading, right=True) for heading, _ in _LEGEND))
    title = f"Gradient noise ({moments.count} examples)"
    notes: tuple[str, ...] = ()
    if moments.fallback:
        notes = (f"* {len(moments.fallback)} parameters were measured example by example: see fallback",)
    sums = Table(
        "",
        (Column("total"), Column("per example", right=True)),
        (("gradient noise, Tr Sigma", f"{float(moments.trace):.6g}"),),
    )
    legend = Table("", (Column("", right=True), Column("", folds=True)), _LEGEND)
    return Table(title, columns, tuple(_rows(moments)), notes), sums, legend


def _rows(moments: "NoiseMoments") -> Iterator[tuple[str, ...]]:
    errors = moments.standard_errors
    for name, grams in moments.grams.items():
        plus, minus = halves(moments.symmetries[name], grams)
        error = errors[name].net.square().sum().sqrt()
        yield name, f"{plus:.3g}", f"{minus:.3g}", f"{plus - minus:+.3g}", f"{error:.1e}"

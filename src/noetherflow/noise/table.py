"""Moments of gradients as tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noetherflow._table import Column, Table
from noetherflow.symmetry import Grams, Symmetry

if TYPE_CHECKING:
    from noetherflow.noise.moments import NoiseMoments

_LEGEND = (
    ("noise+", "N+, gradient noise on the plus side, per example, summed over coordinates"),
    ("noise-", "N-, gradient noise on the minus side, per example, summed over coordinates"),
    ("net", "N+ - N- = Tr[Sigma Q], which drives the charge"),
    ("error", "standard error of net, if the coordinates are independent"),
)


def halves(symmetry: Symmetry, grams: Grams) -> Grams:
    """C+ and C- of the charge C = C+ - C-, summed over its coordinates, each of shape ()."""
    zeros = Grams(*map(torch.zeros_like, grams))
    plus = symmetry.charge_of(Grams(grams.plus, zeros.minus))
    minus = symmetry.charge_of(Grams(zeros.plus, grams.minus))
    return Grams(total(plus), 0.0 - total(minus))  # 0.0 - 0.0 is 0 and not -0, if there is no minus side


def total(coordinates: Tensor) -> Tensor:
    """The sum over coordinates, shape (): a number, the sum of a vector, or the trace of a matrix."""
    return coordinates.trace() if coordinates.ndim == 2 else coordinates.sum()


def tables_of(moments: "NoiseMoments") -> tuple[Table, ...]:
    """The noise of each symmetry, the total, and the legend."""
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
    """The cells of each symmetry, in the order of the columns."""
    errors = moments.standard_errors
    for name, grams in moments.grams.items():
        plus, minus = halves(moments.symmetries[name], grams)
        error = errors[name].net.square().sum().sqrt()
        yield name, f"{plus:.3g}", f"{minus:.3g}", f"{plus - minus:+.3g}", f"{error:.1e}"

"""The squares of all parameters in one vector, so that what is done with them takes few operations however many."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from noetherflow.noise.asked import Squares
from noetherflow.symmetry import Axis

# What is asked of one parameter: whether there are rows, and columns, and along which axes there are Gram matrices.
Page = tuple[str, list[tuple[str | Axis, torch.Size]]]


@final
@dataclass(frozen=True, eq=False)
class Ledger:
    """The squares of several parameters.

    Args:
        numbers: Totals, sums and Gram matrices, one after the other, float64; or several such vectors, shape (..., k).
        pages: Where in it they are: for each parameter, what comes in which shape.
        entries: Squares of single entries, where these are kept.
    """

    numbers: Tensor
    pages: list[Page]
    entries: dict[str, Tensor]

    @classmethod
    def of(cls, squares: Mapping[str, Squares]) -> "Ledger":
        """All of these."""
        parts, pages = [], []
        for name in sorted(squares):  # two ledgers have to be in one order
            one = squares[name]
            fields: list[tuple[str | Axis, Tensor | None]] = [
                ("total", one.total), ("rows", one.rows), ("columns", one.columns),
                *sorted(one.grams.items(), key=_place),
            ]  # fmt: skip
            found = [(field, part) for field, part in fields if part is not None]
            pages.append((name, [(field, part.shape) for field, part in found]))
            parts += [part.reshape(-1) for _, part in found]
        entries = {name: one.entries for name, one in squares.items() if one.entries is not None}
        return cls(torch.cat(parts).double(), pages, entries)

    def squares(self) -> dict[str, Squares]:
        """The squares of each parameter; views."""
        lengths = [shape.numel() for _, fields in self.pages for _, shape in fields]
        parts = iter(self.numbers.split(lengths, dim=-1))
        found = {}
        for name, fields in self.pages:
            own = {field: next(parts).unflatten(-1, shape or (1,)) for field, shape in fields}
            grams = {field: one for field, one in own.items() if isinstance(field, Axis)}
            total = own["total"].squeeze(-1)
            found[name] = Squares(total, own.get("rows"), own.get("columns"), self.entries.get(name), grams)
        return found

    def combine(self, other: "Ledger", weight: float, *, reuse: bool = False) -> "Ledger":
        """This plus a multiple of another; in the memory of this one, if that is to be reused."""
        if reuse:
            self.numbers.add_(other.numbers, alpha=weight)
            for name, mine in self.entries.items():
                mine.add_(other.entries[name], alpha=weight)
            return self
        entries = {name: torch.add(mine, other.entries[name], alpha=weight) for name, mine in self.entries.items()}
        return replace(self, numbers=torch.add(self.numbers, other.numbers, alpha=weight), entries=entries)

    def scaled(self, factor: float) -> "Ledger":
        """A multiple, in float64; a copy."""
        entries = {name: one.double() * factor for name, one in self.entries.items()}
        return replace(self, numbers=self.numbers * factor, entries=entries)

    @property
    def trace(self) -> Tensor:
        """The sum of all squares, shape ()."""
        return torch.stack([one.total for one in self.squares().values()]).sum()


def _place(gram: tuple[Axis, Tensor]) -> tuple[int, int, int, int, tuple[int, ...]]:
    axis = gram[0]
    return axis.dim, axis.start or 0, axis.stop or 0, axis.repeat, axis.within or ()

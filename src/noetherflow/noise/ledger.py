"""The squares of all parameters in one vector, so that what is done with them takes few operations however many."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.noise.asked import Asked, Page, Squares
from noetherflow.symmetry import Axis

# Rows of a blank ledger: sums over examples, and squares of the sum of all examples' gradients.
EACH, WHOLE = 0, 1


@final
@dataclass(eq=False)
class Sums:
    """Where the squares of one parameter's gradients are added up.

    Args:
        page: Where what is.
        ledger: Numbers of several parameters, shape (2, ...), float64: of each example, and of the sum of all.
        part: Which of these belong to this one.
        entries: The square of every entry, shape (2, *shape of the parameter), or None if they were not asked for.
    """

    page: Page
    ledger: Tensor
    part: slice
    entries: Tensor | None

    @classmethod
    def blank(cls, page: Page, like: Tensor) -> "Sums":
        """Zeros, entries in the type and all of them on the device of a tensor."""
        numbers = like.new_zeros(2, page.length, dtype=torch.float64)
        entries = like.new_zeros(2, *page.shape) if page.asked.entries else None
        return cls(page, numbers, slice(None), entries)

    @property
    def numbers(self) -> Tensor:
        """Shape (2, length of the page)."""
        return self.ledger[:, self.part]

    @property
    def each(self) -> Squares:
        """Sums over examples."""
        return Squares(self.page, self.numbers[EACH], None if self.entries is None else self.entries[EACH])

    @property
    def whole(self) -> Squares:
        """Of the sum of all gradients."""
        return Squares(self.page, self.numbers[WHOLE], None if self.entries is None else self.entries[WHOLE])

    def add_grams(self, row: int, grams: Mapping[Axis, Tensor]) -> None:
        """Add Gram matrices to one of the two rows."""
        for axis, gram in grams.items():
            start = self.page.grams[axis]
            self.numbers[row, start : start + gram.numel()].add_(gram.reshape(-1))


@final
class Contents:
    """Where in a ledger the squares of each parameter are.

    Args:
        pages: One for each, by name.
    """

    def __init__(self, pages: dict[str, Page]) -> None:
        self.pages = pages
        ends = list(accumulate(page.length for page in self.pages.values()))
        self.parts = dict(zip(self.pages, map(slice, [0, *ends], ends), strict=False))
        self.length = ends[-1] if ends else 0
        self.with_entries = [name for name, page in self.pages.items() if page.asked.entries]

    @classmethod
    def of(cls, asked: Mapping[str, Asked], params: Params) -> "Contents":
        """What is wanted of every parameter."""
        return cls({name: Page.of(params[name].shape, one) for name, one in asked.items()})

    def diagonals(self) -> tuple["Contents", Tensor | slice]:
        """The same with but the diagonals of Gram matrices, and where in such a ledger its numbers are."""
        if not any(page.grams for page in self.pages.values()):
            return self, slice(None)
        found = {name: page.diagonals() for name, page in self.pages.items()}
        places = [self.parts[name].start + index for name, (_, index) in found.items()]
        return Contents({name: page for name, (page, _) in found.items()}), torch.cat(places)


@final
@dataclass(frozen=True, eq=False)
class Ledger:
    """The squares of several parameters.

    Args:
        contents: Where what is.
        numbers: Totals, sums and Gram matrices, float64, shape (..., length).
        entries: Squares of single entries, shape (..., *shape of the parameter), where these are kept.
    """

    contents: Contents
    numbers: Tensor
    entries: dict[str, Tensor]

    @classmethod
    def blank(cls, contents: Contents, like: Tensor) -> "Ledger":
        """Two rows of zeros to add up in, on the device of a tensor."""
        numbers = like.new_zeros(2, contents.length, dtype=torch.float64)
        return cls(contents, numbers, {})

    def sums(self, name: str, kind: torch.dtype) -> Sums:
        """Where to add up the squares of a parameter in a blank ledger; entries in some type."""
        page, part = self.contents.pages[name], self.contents.parts[name]
        if page.asked.entries and name not in self.entries:
            self.entries[name] = self.numbers.new_zeros(2, *page.shape, dtype=kind)
        return Sums(page, self.numbers, part, self.entries.get(name))

    def renewed(self, name: str, kind: torch.dtype) -> Sums:
        """The same after what was added for this parameter is forgotten."""
        self.numbers[:, self.contents.parts[name]] = 0.0
        self.entries.pop(name, None)
        return self.sums(name, kind)

    def settled(self, weight: float) -> "Ledger":
        """The first row of what was a blank ledger plus a multiple of the second, in the memory of the first."""
        for one in (self.numbers, *self.entries.values()):
            one[EACH].add_(one[WHOLE], alpha=weight)
        return self.row(EACH)

    def row(self, index: int) -> "Ledger":
        """One of the two rows of a blank ledger; a view."""
        for name in self.contents.with_entries:
            self.sums(name, torch.float64)  # zeros, if no gradient reached the parameter
        return Ledger(self.contents, self.numbers[index], {name: one[index] for name, one in self.entries.items()})

    def squares(self) -> dict[str, Squares]:
        """The squares of each parameter; views."""
        return {
            name: Squares(page, self.numbers[..., self.contents.parts[name]], self.entries.get(name))
            for name, page in self.contents.pages.items()
        }

    def combine(self, other: "Ledger", weight: float) -> "Ledger":
        """This plus a multiple of another, in the memory of this one."""
        self.numbers.add_(other.numbers, alpha=weight)
        for name, mine in self.entries.items():
            mine.add_(other.entries[name], alpha=weight)
        return self

    def scaled(self, factor: float) -> "Ledger":
        """A multiple, in float64; a copy."""
        entries = {name: one.double() * factor for name, one in self.entries.items()}
        return Ledger(self.contents, self.numbers * factor, entries)

    @property
    def trace(self) -> Tensor:
        """The sum of all squares, shape (...)."""
        return self.numbers[..., [part.start for part in self.contents.parts.values()]].sum(-1)

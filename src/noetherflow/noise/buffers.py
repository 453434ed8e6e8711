"""Buffers in which statistics are accumulated: those of all parameters in one vector, for few operations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.noise.statistics import ABSENT, Requested, Squares, StatisticsLayout
from noetherflow.symmetry import Axis

# Rows of a buffer: sums over examples of the squares of g_b, and the squares of sum_b g_b.
EACH, OF_SUM = 0, 1


@final
@dataclass(eq=False)
class Buffer:
    """Where the squares of one parameter's gradients are accumulated.

    Args:
        layout: Where each statistic is.
        memory: Statistics of several parameters, shape (2, ...), float64: row EACH and row OF_SUM.
        part: The columns of this parameter.
        entries: The square of every entry, shape (2, *shape of the parameter), or None if they are not requested.
        weights: Weights of the squares, of the shape of the parameter, or None if they are not summed with weights.
    """

    layout: StatisticsLayout
    memory: Tensor
    part: slice
    entries: Tensor | None
    weights: Tensor | None = None

    @classmethod
    def blank(cls, layout: StatisticsLayout, like: Tensor, weights: Tensor | None = None) -> "Buffer":
        """Zeros on the device of a tensor: statistics in float64, entries in the dtype of that tensor."""
        numbers = like.new_zeros(2, layout.length, dtype=torch.float64)
        entries = like.new_zeros(2, *layout.shape) if layout.requested.entries else None
        return cls(layout, numbers, slice(None), entries, weights)

    def weights_of(self, stack: Tensor, first: int = 0) -> Tensor | None:
        """The weights of r rows of a gradient, as matrices (..., r, m), from the first on; None if there are none."""
        if self.weights is None:
            return None
        rows = self.weights.reshape(self.layout.shape[:1].numel(), -1)[first : first + stack.shape[-2]]
        return rows.to(stack.device, stack.dtype)

    @property
    def numbers(self) -> Tensor:
        """The statistics of this parameter, shape (2, length of the layout)."""
        return self.memory[:, self.part]

    @property
    def each(self) -> Squares:
        """The squares of g_b, summed over examples b."""
        return Squares(self.layout, self.numbers[EACH], None if self.entries is None else self.entries[EACH])

    @property
    def of_sum(self) -> Squares:
        """The squares of sum_b g_b."""
        return Squares(self.layout, self.numbers[OF_SUM], None if self.entries is None else self.entries[OF_SUM])

    def add_grams(self, row: int, grams: Mapping[Axis, Tensor]) -> None:
        """Add Gram matrices to row EACH or OF_SUM."""
        for axis, gram in grams.items():
            start = self.layout.grams[axis]
            self.numbers[row, start : start + gram.numel()].add_(gram.reshape(-1))


@final
class ModelLayout:
    """Where the statistics of each parameter are in the vector of all parameters.

    Args:
        layouts: The layout of each parameter, by name; they follow each other in this order.
    """

    def __init__(self, layouts: dict[str, StatisticsLayout]) -> None:
        self.layouts = layouts
        ends = list(accumulate(layout.length for layout in self.layouts.values()))
        self.parts = dict(zip(self.layouts, map(slice, [0, *ends], ends), strict=False))
        self.length = ends[-1] if ends else 0
        self._places: dict[tuple[tuple[str, ...], torch.device, bool], tuple[Tensor, Tensor]] = {}
        self.with_entries = [name for name, layout in self.layouts.items() if layout.requested.entries]

    @classmethod
    def of(cls, requested: Mapping[str, Requested], params: Params) -> "ModelLayout":
        """The layout for what is requested of every parameter."""
        layouts = {name: StatisticsLayout.of(params[name].shape, request) for name, request in requested.items()}
        return cls(layouts)

    def places_of_vectors(
        self, names: tuple[str, ...], device: torch.device, *, weighted: bool
    ) -> tuple[Tensor, Tensor]:
        """Which entries of the vectors of some parameters, one after the other, are added where.

        Args:
            names: The parameters.
            device: Of the indices.
            weighted: Whether the entries come once more, with weights.

        Returns:
            Indices of entries, and as many indices in the vector of all statistics.
        """
        key = names, device, weighted
        if key not in self._places:
            entries, places, start, again = [], [], 0, sum(self.layouts[name].shape.numel() for name in names)
            for name in names:
                layout, first = self.layouts[name], self.parts[name].start
                indices = torch.arange(start, start := start + layout.shape.numel())
                entries.append(indices)
                places.append(torch.full_like(indices, first))
                if weighted:
                    entries.append(again + indices)
                    places.append(torch.full_like(indices, first + self.layouts[name].weighted))
                if layout.requested.rows:
                    entries.append(indices)
                    places.append(first + layout.rows + torch.arange(len(indices)))
            self._places[key] = torch.cat(entries).to(device), torch.cat(places).to(device)
        return self._places[key]

    def diagonals(self) -> tuple["ModelLayout", Tensor | slice]:
        """The layout with the diagonals of Gram matrices only, and the indices of its numbers in this layout."""
        if not any(layout.grams for layout in self.layouts.values()):
            return self, slice(None)
        thin = {name: layout.diagonals() for name, layout in self.layouts.items()}
        indices = [self.parts[name].start + index for name, (_, index) in thin.items()]
        return ModelLayout({name: layout for name, (layout, _) in thin.items()}), torch.cat(indices)


@final
@dataclass(frozen=True, eq=False)
class Buffers:
    """The squares of the gradients of several parameters.

    Args:
        model_layout: Where the statistics of each parameter are.
        numbers: Totals, sums and Gram matrices, float64, shape (..., length).
        entries: Squares of single entries, shape (..., *shape of the parameter), where these are requested.
        weights: Weights of the squares that are added, by name; none where nothing is summed with weights.
    """

    model_layout: ModelLayout
    numbers: Tensor
    entries: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def blank(cls, model_layout: ModelLayout, like: Tensor, weights: Params | None = None) -> "Buffers":
        """Two rows of zeros, EACH and OF_SUM, on the device of a tensor; raises unless weights fit the layout."""
        for name, layout in model_layout.layouts.items() if weights else ():
            given = (weights or {}).get(name)
            if layout.weighted == ABSENT or given is None or given.shape != layout.shape:
                what = "none" if given is None else f"shape {tuple(given.shape)}"
                raise SettingsError(
                    "weights of squares are those of all parameters, given to a meter that was made with "
                    f"weighted=True; of {name!r}, of shape {tuple(layout.shape)}, got {what}"
                )
        numbers = like.new_zeros(2, model_layout.length, dtype=torch.float64)
        return cls(model_layout, numbers, {}, dict(weights or {}))

    def buffer(self, name: str, kind: torch.dtype) -> Buffer:
        """The buffer of a parameter; entries are kept in a dtype."""
        layout, part = self.model_layout.layouts[name], self.model_layout.parts[name]
        if layout.requested.entries and name not in self.entries:
            self.entries[name] = self.numbers.new_zeros(2, *layout.shape, dtype=kind)
        return Buffer(layout, self.numbers, part, self.entries.get(name), self.weights.get(name))

    def renewed(self, name: str, kind: torch.dtype) -> Buffer:
        """The buffer of a parameter, set to zero; entries are kept in a dtype."""
        self.numbers[:, self.model_layout.parts[name]] = 0.0
        self.entries.pop(name, None)
        return self.buffer(name, kind)

    def add_vectors(self, vectors: Sequence[tuple[str, Tensor, Tensor]]) -> None:
        """Add the squares of the gradients of many vectors, in as few operations as those of a single vector.

        Args:
            vectors: The name of each parameter, its gradients (B, m), and their sum (m,).
        """
        names, stacks, totals = zip(*vectors, strict=True)
        device = self.numbers.device
        stack, total = (torch.cat([part.to(device) for part in parts], -1) for parts in (stacks, totals))
        squares = torch.stack([stack.square().sum(0), total.square()]).to(self.numbers.dtype)
        weighted = any(name in self.weights for name in names)
        if weighted:
            weights = torch.cat([self.weights[name].reshape(-1).to(device) for name in names])
            squares = torch.cat([squares, squares * weights], 1)
        entries, places = self.model_layout.places_of_vectors(names, device, weighted=weighted)
        self.numbers.index_add_(1, places, squares[:, entries])

    def merge_rows(self, weight: float) -> "Buffers":
        """Row EACH plus a multiple of row OF_SUM, in the memory of row EACH."""
        for statistics in (self.numbers, *self.entries.values()):
            statistics[EACH].add_(statistics[OF_SUM], alpha=weight)
        return self.row(EACH)

    def row(self, index: int) -> "Buffers":
        """Row EACH or OF_SUM; a view."""
        for name in self.model_layout.with_entries:
            self.buffer(name, torch.float64)  # zeros, if no gradient reached the parameter
        entries = {name: squares[index] for name, squares in self.entries.items()}
        return Buffers(self.model_layout, self.numbers[index], entries)

    def squares(self) -> dict[str, Squares]:
        """The squares of each parameter; views."""
        return {
            name: Squares(layout, self.numbers[..., self.model_layout.parts[name]], self.entries.get(name))
            for name, layout in self.model_layout.layouts.items()
        }

    def with_entries_of(self, names: Collection[str]) -> "Buffers":
        """The numbers of all parameters, and the squares of single entries of some; views."""
        entries = {name: squares for name, squares in self.entries.items() if name in names}
        return Buffers(self.model_layout, self.numbers, entries)

    def combine(self, other: "Buffers", weight: float) -> "Buffers":
        """This plus a multiple of other buffers, in the memory of this."""
        self.numbers.add_(other.numbers, alpha=weight)
        for name, mine in self.entries.items():
            mine.add_(other.entries[name], alpha=weight)
        return self

    def scaled(self, factor: float) -> "Buffers":
        """A multiple, in float64; a copy."""
        entries = {name: squares.double() * factor for name, squares in self.entries.items()}
        return Buffers(self.model_layout, self.numbers * factor, entries)

    @property
    def trace(self) -> Tensor:
        """The sum of all squares, shape (...)."""
        return self.numbers[..., [part.start for part in self.model_layout.parts.values()]].sum(-1)

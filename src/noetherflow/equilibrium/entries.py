r"""Sums over the entries of a tensor whose exponents are linear in the joint coordinates of an orbit.

Entry p of a tensor is scaled by $e^{s_p(x)}$. A term of the potential is a tensor T with the value
$\sum_p T_p e^{k s_p}$, and the solver needs its derivatives. For a matrix whose exponents are $s_{ij} = r_i + c_j$
these are products of T with the vectors $e^{k r}$ and $e^{k c}$, so that no exponential of an entry is formed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.equilibrium.roles import Role, roles_of
from noetherflow.symmetry import Axis, AxisSymmetry

Parts = tuple[Tensor, ...]
"""Vectors, each along a dimension of the tensor; or a tensor of its shape."""


class Place(NamedTuple):
    """Where the coordinates of a symmetry stand among the joint coordinates."""

    start: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """The coordinates of the symmetry, a view; `flat` has shape (..., n)."""
        return flat.narrow(-1, self.start, self.shape.numel()).unflatten(-1, self.shape or (1,))


class Curvature(NamedTuple):
    """The second derivatives of a potential with respect to exponents: entry by entry, and their sums."""

    entries: Tensor
    sums: Parts


class Entries(ABC):
    """The entries of a tensor, and how its exponents depend on the joint coordinates."""

    @abstractmethod
    def exponents(self, x: Tensor) -> Parts:
        """The exponents at joint coordinates x of shape (n,)."""

    @abstractmethod
    def terms(self, term: Tensor, power: int, exponents: Parts) -> Parts:
        r"""The terms $T_p e^{k s_p}$ with k = `power`, as far as they need to be taken apart."""

    @abstractmethod
    def curvature(self, weighted: Sequence[tuple[float, Tensor, int]], exponents: Parts) -> Curvature:
        r"""The sum of $w\,T_p e^{k s_p}$ over triples (w, T, k)."""

    @abstractmethod
    def bend(self, curvature: Curvature, direction: Parts) -> Parts:
        """The curvature of every entry times its exponent along a direction, as `terms`."""

    @abstractmethod
    def add(self, terms: Parts, sides: Tensor, power: int = 1) -> None:
        """Add the terms to the sums over both sides of every coordinate, shape (2, n).

        Args:
            terms: The terms.
            sides: The sums over the plus side and over the minus side.
            power: The power with which the coefficient of a coordinate in an exponent counts.
        """


class Along(NamedTuple):
    """An axis with a row, or `repeat` neighbouring rows, for each row of a symmetry."""

    symmetry: AxisSymmetry
    place: Place
    sign: int
    axis: Axis


@final
class SeparableEntries(Entries):
    """A vector, or a matrix whose exponents are sums of an exponent of the row and an exponent of the column.

    Args:
        tensor: Any tensor of the shape of the terms, of size 1 along dimensions without an axis.
        roles: The axes that run along each used dimension.
    """

    def __init__(self, tensor: Tensor, roles: Mapping[int, Sequence[Along]]) -> None:
        self._shape = tuple((tensor.shape or (1,))[dim] for dim in roles)
        self._dims, self._roles = tuple(roles), tuple(roles.values())

    def exponents(self, x: Tensor) -> Parts:
        """A vector for each used dimension."""
        vectors = []
        for size, roles in zip(self._shape, self._roles, strict=True):
            vector = x.new_zeros(size)
            for symmetry, place, sign, axis in roles:
                rows = _rows(vector, axis)
                rows.add_(symmetry.multiply(place.of(x).reshape(place.shape), torch.ones_like(rows)), alpha=sign)
            vectors.append(vector)
        return tuple(vectors)

    def terms(self, term: Tensor, power: int, exponents: Parts) -> Parts:
        """The sums of the terms over each row, and over each column."""
        scales = [torch.exp(power * vector) for vector in exponents]
        matrix = self._used(term)
        if len(scales) == 1:
            return (matrix * scales[0],)
        rows, columns = scales
        return rows * (matrix @ columns), columns * (matrix.mT @ rows)

    def curvature(self, weighted: Sequence[tuple[float, Tensor, int]], exponents: Parts) -> Curvature:
        """A vector or a matrix, and its sums."""
        total = exponents[0].new_zeros(self._shape)
        for weight, term, power in weighted:
            first, *rest = (torch.exp(power * vector) for vector in exponents)
            scaled = self._used(term) * (weight * first if not rest else (weight * first).unsqueeze(1))
            total += scaled.mul_(rest[0]) if rest else scaled
        return Curvature(total, (total,) if total.ndim == 1 else (total.sum(1), total.sum(0)))

    def bend(self, curvature: Curvature, direction: Parts) -> Parts:
        """Two products of the curvature with vectors."""
        if len(direction) == 1:
            return (curvature.entries * direction[0],)
        rows, columns = direction
        return (
            torch.addcmul(curvature.entries @ columns, rows, curvature.sums[0]),
            torch.addcmul(curvature.entries.mT @ rows, columns, curvature.sums[1]),
        )

    def add(self, terms: Parts, sides: Tensor, power: int = 1) -> None:
        """The coefficients are 1 and -1, so that the power does not count."""
        for vector, roles in zip(terms, self._roles, strict=True):
            for symmetry, place, sign, axis in roles:
                place.of(sides[0 if sign > 0 else 1]).add_(symmetry.reduce(_rows(vector, axis)))

    def _used(self, term: Tensor) -> Tensor:
        """A term as a vector or as a matrix."""
        rest = [dim for dim in range(term.ndim) if dim not in self._dims]
        return term.permute(*self._dims, *rest).reshape(self._shape) if term.ndim else term.reshape(1)


@final
class GeneralEntries(Entries):
    """A tensor of which axes limit themselves to parts, or which a symmetry scales in several roles.

    Args:
        unit: Ones, of the shape of the terms.
        axes: The axes of the tensor, with signs.
        roles: Their roles in the exponents, with the symmetry and its place.
    """

    def __init__(self, unit: Tensor, axes: Sequence[Along], roles: Sequence[tuple[AxisSymmetry, Place, Role]]) -> None:
        self._unit, self._axes, self._roles = unit, axes, roles

    def exponents(self, x: Tensor) -> Parts:
        """The exponent of every entry."""
        total = torch.zeros_like(self._unit)
        for symmetry, place, sign, axis in self._axes:
            rows = symmetry.multiply(sign * place.of(x).reshape(place.shape), axis.rows(self._unit))
            total = total + axis.embed(rows, self._unit)
        return (total,)

    def terms(self, term: Tensor, power: int, exponents: Parts) -> Parts:
        """The term of every entry."""
        return (term * torch.exp(power * exponents[0]),)

    def curvature(self, weighted: Sequence[tuple[float, Tensor, int]], exponents: Parts) -> Curvature:
        """The curvature of every entry."""
        total = torch.zeros_like(self._unit)
        for weight, term, power in weighted:
            total += weight * term * torch.exp(power * exponents[0])
        return Curvature(total, (total,))

    def bend(self, curvature: Curvature, direction: Parts) -> Parts:
        """Entry by entry."""
        return (curvature.entries * direction[0],)

    def add(self, terms: Parts, sides: Tensor, power: int = 1) -> None:
        """Entries count by a power of their coefficient: the first for slopes, the second for curvatures."""
        for symmetry, place, (axis, coefficient) in self._roles:
            for side, sign in zip(sides, (1, -1), strict=True):
                share = (sign * coefficient).clamp_min(0).pow(power)
                if coefficient.ndim:
                    place.of(side).add_(symmetry.reduce(axis.rows(share * terms[0])))
                elif share > 0:
                    place.of(side).add_(symmetry.reduce(axis.rows(terms[0])))


def entries_of(
    name: str, units: Params, symmetries: Mapping[str, AxisSymmetry], places: Mapping[str, Place]
) -> Entries:
    """The entries of a tensor on the orbit of symmetries that scale entries.

    Args:
        name: The tensor.
        units: Ones, of the shapes of the terms of every tensor.
        symmetries: Those that act on the tensor, by name.
        places: Where the coordinates of each symmetry stand.

    Returns:
        The entries, separable if they can be.
    """
    axes = [
        Along(symmetry, places[key], sign, axis)
        for key, symmetry in symmetries.items()
        for sign, side in ((1, symmetry.plus), (-1, symmetry.minus))
        for axis in side
        if axis.name == name
    ]
    unit = units[name]
    by_dim: dict[int, list[Along]] = {}
    for along in axes:
        by_dim.setdefault(along.axis.dim % max(1, unit.ndim), []).append(along)
    once = len({along.place.start for along in axes}) == len(axes)
    if once and len(by_dim) <= 2 and all(along.axis.within is None for along in axes):
        return SeparableEntries(unit, dict(sorted(by_dim.items())))
    mine = [
        (symmetry, places[key], role)
        for key, symmetry in symmetries.items()
        for role in roles_of(symmetry, units)
        if role.axis.name == name
    ]
    return GeneralEntries(unit, axes, mine)


def _rows(vector: Tensor, axis: Axis) -> Tensor:
    """The rows of an axis along a vector, shape (rows, repeat): a view."""
    start, stop = axis.start or 0, len(vector) if axis.stop is None else axis.stop
    return vector[start:stop].unflatten(0, (-1, axis.repeat))

"""What the three groups that act along axes have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noetherflow._errors import ParameterShapeError
from noetherflow._params import require_names
from noetherflow._types import Params
from noetherflow.symmetry.axis import Axis
from noetherflow.symmetry.base import Grams, Symmetry


@dataclass(frozen=True)
class AxisSymmetry(Symmetry):
    r"""A group that acts on the rows of some axes by $e^{x}$ (`plus`) and on those of others by $e^{-x}$ (`minus`).

    A parameter may stand on both sides, or several times on one (a tied weight has one entry per role).
    """

    plus: tuple[Axis, ...]
    minus: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        # Lists are a natural thing to write, and one axis alone too.
        for side in ("plus", "minus"):
            given = getattr(self, side)
            object.__setattr__(self, side, (given,) if isinstance(given, Axis) else tuple(given))
        if not self.plus + self.minus:
            raise ParameterShapeError(f"{type(self).__name__} needs at least one Axis in plus or minus")

    @property
    @abstractmethod
    def per_row(self) -> bool:
        """Whether coordinates belong to rows, so that all axes must have the same number of them."""

    @abstractmethod
    def reduce(self, rows: Tensor) -> Tensor:
        """The sums of rows, shape (*batch, n, m), over the entries of each coordinate: (*batch) or (*batch, n)."""

    @abstractmethod
    def gram(self, rows: Tensor) -> Tensor:
        """What this group keeps of the Gram matrix of rows of shape (n, m): its trace, its diagonal or all of it."""

    @abstractmethod
    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """The coordinates, as a linear map of rows."""

    @abstractmethod
    def exponential(self, x: Tensor) -> Tensor:
        """The coordinates of e^x, so that `multiply(exponential(x), rows)` is the finite transformation."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters on which the group acts."""
        return tuple(dict.fromkeys(axis.name for axis in self.plus + self.minus))

    def regions(self, v: Params) -> tuple[Axis, ...]:
        """All axes, one per role."""
        return self.plus + self.minus

    def check(self, v: Params) -> None:
        """Raise if a parameter is missing, an axis does not exist, or the axes do not have the same number of rows."""
        require_names(v, self.names, type(self).__name__)
        sizes = {axis: axis.size(v[axis.name]) for axis in self.plus + self.minus}
        if self.per_row and len(set(sizes.values())) > 1:
            listing = "; ".join(
                f"{axis} of shape {tuple(v[axis.name].shape)} has {size}" for axis, size in sizes.items()
            )
            raise ParameterShapeError(
                f"all axes of a {type(self).__name__} must have the same number of rows: {listing}"
            )

    def size(self, v: Params) -> int:
        """Number of rows of every axis."""
        axis = (self.plus + self.minus)[0]
        return axis.size(v[axis.name])

    def act(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        """The finite transformation; tensors that the group does not move are passed on."""
        self.check(v)
        moved = dict(v)
        for axis, sign in self._signed():
            tensor = moved[axis.name]
            factor = self.exponential(sign * self._coordinates(x, tensor))
            moved[axis.name] = axis.replace(tensor, self.multiply(factor, axis.rows(tensor)))
        return moved

    def generate(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        """The infinitesimal transformation, zero on tensors that the group does not move."""
        self.check(v)
        moved = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
        for axis, sign in self._signed():
            tensor = v[axis.name]
            rows = self.multiply(sign * self._coordinates(x, tensor), axis.rows(tensor))
            moved[axis.name] = moved[axis.name] + axis.embed(rows, tensor)
        return moved

    def grams(self, v: Params, *, batched: bool = False) -> Grams:
        """Squared sizes of the rows on both sides; with `batched`, summed over a leading example dimension."""

        def side(axes: tuple[Axis, ...]) -> Tensor:
            total = self._empty_gram(v, batched)
            for rows in self._rows(v, axes, int(batched)):
                # Examples become further columns: the Gram of the wide matrix is the sum of the Grams.
                total = total + self.gram(rows.movedim(0, 1).flatten(1) if batched else rows)
            return total

        return Grams(side(self.plus), side(self.minus))

    def example_charges(self, v: Params) -> Grams:
        """Both halves of every example's charge (its diagonal, for a matrix): shape (B,) or (B, n)."""

        def side(axes: tuple[Axis, ...]) -> Tensor:
            total = torch.zeros_like(self.reduce(self._rows(v, (self.plus + self.minus)[:1], 1)[0]))
            for rows in self._rows(v, axes, 1):
                total = total + self.reduce(rows.square())
            return total

        return Grams(side(self.plus), side(self.minus))

    def charge_of(self, grams: Grams) -> Tensor:
        """Plus minus minus."""
        return grams.plus - grams.minus

    def rename(self, names: Mapping[str, str]) -> "AxisSymmetry":
        """The same symmetry on renamed parameters."""

        def renamed(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(replace(axis, name=names.get(axis.name, axis.name)) for axis in axes)

        return replace(self, plus=renamed(self.plus), minus=renamed(self.minus))

    def _signed(self) -> list[tuple[Axis, float]]:
        return [(axis, 1.0) for axis in self.plus] + [(axis, -1.0) for axis in self.minus]

    def _rows(self, v: Params, axes: tuple[Axis, ...], batch_dims: int) -> list[Tensor]:
        return [axis.rows(v[axis.name], batch_dims=batch_dims) for axis in axes]

    def _coordinates(self, x: Tensor, like: Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)

    def _empty_gram(self, v: Params, batched: bool) -> Tensor:
        rows = self._rows(v, (self.plus + self.minus)[:1], int(batched))[0]
        return torch.zeros_like(self.gram((rows[0] if batched else rows)[:, :0]))

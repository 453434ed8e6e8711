"""Groups that act along axes of tensors: what a scaling, a rescaling and a double rotation have in common."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from noetherflow._device import joined
from noetherflow._errors import ParameterShapeError, SettingsError
from noetherflow._params import require_names
from noetherflow._types import Params
from noetherflow.symmetry.axis import Axis
from noetherflow.symmetry.base import Action, Grams, Symmetry


@dataclass(frozen=True)
class AxisSymmetry(Symmetry):
    r"""A group that acts on the rows of some axes by $e^{x}$ (`plus`) and on those of others by $e^{-x}$ (`minus`).

    A parameter may stand on both sides, or several times on one side (a tied weight has an entry per role; an axis that
    stands k times on a side is scaled by $e^{kx}$).

    A group of your own derives from this class and says which rows share a coordinate, in five short methods:
    `reduce` sums rows over the entries of each coordinate, `multiply` is its transpose, and `gram`, `exponential` and
    `identity` are what the group keeps of a Gram matrix, its exponential and its zero.

    Args:
        plus: Axes whose rows are multiplied by the exponential.
        minus: Axes whose rows are multiplied by its inverse.

    Examples:
        A symmetry of pairs of neurons, each with its own coordinate, is a `DiagonalSymmetry` in which two neighbouring
        rows share a number:

        >>> import dataclasses, torch, noetherflow as nf
        >>> @dataclasses.dataclass(frozen=True)
        ... class PairSymmetry(nf.AxisSymmetry):
        ...     action, per_row = nf.Action.SCALES_ENTRIES, True
        ...     def dimension(self, v): return self.size(v) // 2
        ...     def identity(self, v): return v[self.names[0]].new_zeros(self.size(v) // 2)
        ...     def reduce(self, rows): return rows.sum(-1).unflatten(-1, (-1, 2)).sum(-1)
        ...     def gram(self, rows): return self.reduce(rows.square())
        ...     def multiply(self, x, rows): return x.repeat_interleave(2)[:, None] * rows
        ...     def exponential(self, x): return x.exp()
        >>> pairs = PairSymmetry(plus=[nf.Axis("w", 0)], minus=[nf.Axis("u", 1)])
        >>> pairs.charge({"w": torch.ones(4, 3), "u": torch.zeros(2, 4)})
        tensor([6., 6.])
        >>> pairs.label
        'pair'

    Source: Ziyin et al. (2024); one quadratic form for all three groups is this package's own.
    """

    plus: tuple[Axis, ...]
    minus: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        # A list of axes and a single axis are natural to write.
        for side in ("plus", "minus"):
            given = getattr(self, side)
            object.__setattr__(self, side, (given,) if isinstance(given, Axis) else tuple(given))
        if not self.plus + self.minus:
            raise ParameterShapeError(f"{type(self).__name__} needs at least one Axis in plus or minus")

    @property
    @abstractmethod
    def per_row(self) -> bool:
        """Whether coordinates belong to rows, so that all axes must have the same number of rows."""

    @abstractmethod
    def reduce(self, rows: Tensor) -> Tensor:
        """Sum rows of shape (*batch, n, m) over the entries of each coordinate: shape (*batch, *coordinates)."""

    @abstractmethod
    def gram(self, rows: Tensor) -> Tensor:
        """The part of the Gram matrix of rows of shape (n, m) that the charge needs: trace, diagonal or all of it."""

    @abstractmethod
    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        """The coordinates x as a linear map of rows of shape (n, m)."""

    @abstractmethod
    def exponential(self, x: Tensor) -> Tensor:
        """The coordinates of e^x, so that `multiply(exponential(x), rows)` is the finite transformation."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters on which the group acts."""
        return tuple(dict.fromkeys(axis.name for axis in self.plus + self.minus))

    @property
    def eigenvalues(self) -> Grams:
        """1 on the plus side and -1 on the minus side."""
        return Grams(torch.ones((), dtype=torch.float64), -torch.ones((), dtype=torch.float64))

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
        """The finite transformation; tensors on which the group does not act are returned unchanged."""
        self.check(v)
        moved = dict(v)
        for axis, sign in self._signed():
            tensor = moved[axis.name]
            factor = self.exponential(sign * self._coordinates(x, tensor))
            moved[axis.name] = axis.replace(tensor, self.multiply(factor, axis.rows(tensor)))
        return moved

    def act_on_variances(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        r"""The variances of the entries of $e^{Q_x} g$, for a random vector g with uncorrelated entries.

        With $A = e^{Q_x}$ and variances v, the covariance $A\,\mathrm{diag}(v)\,A^T$ has the diagonal
        $\sum_j A_{ij}^2 v_j$. A group that scales entries has a diagonal A, and the result is exact for correlated
        entries too.

        Args:
            x: The coordinates.
            v: Variances of the entries of g, by name, of the shapes of the parameters.

        Returns:
            Variances by name; tensors on which the group does not act are returned unchanged.
        """
        if self.action is Action.SCALES_ENTRIES:
            return self.act(2 * x, v)
        self.check(v)
        moved = dict(v)
        for axis, sign in self._signed():
            tensor = moved[axis.name]
            unit = torch.eye(axis.size(tensor), dtype=tensor.dtype, device=tensor.device)
            matrix = self.multiply(self.exponential(sign * self._coordinates(x, tensor)), unit)
            moved[axis.name] = axis.replace(tensor, matrix.square() @ axis.rows(tensor))
        return moved

    def generate(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        """The infinitesimal transformation, zero on tensors on which the group does not act."""
        self.check(v)
        moved = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
        for axis, sign in self._signed():
            tensor = v[axis.name]
            rows = self.multiply(sign * self._coordinates(x, tensor), axis.rows(tensor))
            moved[axis.name] = moved[axis.name] + axis.embed(rows, tensor)
        return moved

    def grams(self, v: Params, *, batched: bool = False) -> Grams:
        """Squared sizes of the rows on both sides; with `batched`, summed over a leading example dimension."""

        def gram(rows: Tensor) -> Tensor:
            # Examples become further columns: the Gram of the wide matrix is the sum of the Grams.
            return self.gram(rows.movedim(0, 1).flatten(1) if batched else rows)

        return self._sides(gram, v, int(batched), self._empty_gram(v, batched))

    def example_charges(self, v: Params) -> Grams:
        """Both halves of every example's charge (its diagonal, for a matrix): shape (B,) or (B, n)."""
        zero = torch.zeros_like(self.reduce(self._rows(v, (self.plus + self.minus)[:1], 1)[0]))
        return self._sides(lambda rows: self.reduce(rows.square()), v, 1, zero)

    def charge_of(self, grams: Grams) -> Tensor:
        """Plus minus minus."""
        return grams.plus - grams.minus

    def rename(self, names: Mapping[str, str]) -> "AxisSymmetry":
        """This symmetry on renamed parameters."""

        def renamed(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
            return tuple(replace(axis, name=names.get(axis.name, axis.name)) for axis in axes)

        return replace(self, plus=renamed(self.plus), minus=renamed(self.minus))

    def _signed(self) -> list[tuple[Axis, float]]:
        return [(axis, 1.0) for axis in self.plus] + [(axis, -1.0) for axis in self.minus]

    def _rows(self, v: Params, axes: tuple[Axis, ...], batch_dims: int) -> list[Tensor]:
        return [axis.rows(v[axis.name], batch_dims=batch_dims) for axis in axes]

    def _sides(self, size: Callable[[Tensor], Tensor], v: Params, batch_dims: int, zero: Tensor) -> Grams:
        """A size of the rows, summed over the axes of each side; on the CPU if the axes are on several devices."""
        zero, *sizes = joined([zero, *map(size, self._rows(v, self.plus + self.minus, batch_dims))])
        count = len(self.plus)
        return Grams(sum(sizes[:count], zero), sum(sizes[count:], zero))

    def _coordinates(self, x: Tensor, like: Tensor) -> Tensor:
        # Coordinates are real, also those of complex tensors.
        dtype = like.dtype.to_real() if like.is_complex() else like.dtype
        return torch.as_tensor(x, dtype=dtype, device=like.device)

    def _empty_gram(self, v: Params, batched: bool) -> Tensor:
        rows = self._rows(v, (self.plus + self.minus)[:1], int(batched))[0]
        return torch.zeros_like(self.gram((rows[0] if batched else rows)[:, :0]))


def along_axes(symmetries: Mapping[str, Symmetry]) -> dict[str, AxisSymmetry]:
    """The symmetries, after a check that each of them acts along axes.

    Returns:
        The symmetries by name.

    Raises:
        SettingsError: If a symmetry joins single entries of several tensors.
    """
    checked = {}
    for name, symmetry in symmetries.items():
        if not isinstance(symmetry, AxisSymmetry):
            raise SettingsError(
                f"symmetry {name!r} ({type(symmetry).__name__}) does not act along axes of tensors but joins single "
                "entries of several tensors: its noise cannot be measured layer by layer. Use "
                "estimate_noise(..., exact=True)"
            )
        checked[name] = symmetry
    return checked

"""Where a group acts: an axis of a tensor, unfolded into rows."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._errors import ParameterShapeError


@final
@dataclass(frozen=True)
class Axis:
    """An axis of a named parameter, or a slice of it, on which a group acts row by row.

    Args:
        name: The parameter, as in `named_parameters()`.
        dim: Which dimension of it is the axis; negative counts from the end. A parameter without dimensions is a row
            of one entry, along dimension 0.
        start: First index of a slice (a head of a packed projection, an input of a concatenation); None is the
            beginning.
        stop: One past the last index of the slice; None is the end.
        repeat: Number of neighbouring indices that form a row. After conv -> flatten, each channel has height * width
            neighbouring inputs of the linear layer: `repeat=height * width`.
        within: (dimension, start, stop) if the group acts only on a part of another dimension: a matrix of a stack, a
            group of a grouped convolution.

    Examples:
        >>> import torch, noetherflow as nf
        >>> weight = torch.arange(6.0).reshape(2, 3)
        >>> nf.Axis("weight", dim=1).rows(weight)  # each column is a row of the result
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """

    name: str
    dim: int
    start: int | None = None
    stop: int | None = None
    repeat: int = 1
    within: tuple[int, int, int] | None = None

    def size(self, tensor: Tensor) -> int:
        """Number of rows of this axis in a tensor; raises if the tensor has no such axis."""
        shape = tuple(tensor.shape) or (1,)
        ndim = len(shape)
        if not -ndim <= self.dim < ndim:
            raise ParameterShapeError(
                f"{self}: {self.name!r} has shape {tuple(tensor.shape)}, so dim must lie in [{-ndim}, {ndim})"
            )
        length = shape[self.dim]
        start, stop = self._bounds(length)
        if not 0 <= start < stop <= length:
            raise ParameterShapeError(
                f"{self}: the slice [{start}:{stop}] does not fit dimension {self.dim} of {self.name!r}, shape {shape}"
            )
        if self.repeat < 1 or (stop - start) % self.repeat:
            raise ParameterShapeError(
                f"{self}: {stop - start} entries along dimension {self.dim} of {self.name!r}, shape {shape}, cannot "
                f"be cut into groups of repeat={self.repeat}"
            )
        if self.within is not None:
            other, first, last = self.within
            if not (0 <= other < tensor.ndim and other != self.dim % tensor.ndim and 0 <= first < last <= shape[other]):
                raise ParameterShapeError(
                    f"{self}: {self.name!r} has shape {shape}, so within must be another dimension and a part of it"
                )
        return (stop - start) // self.repeat

    def rows(self, tensor: Tensor, *, batch_dims: int = 0) -> Tensor:
        """The axis unfolded, shape (*batch, rows, columns); `batch_dims` leading dimensions stay in front."""
        part, dim = self._part(tensor, batch_dims)
        batch = part.shape[:batch_dims]
        count = part.shape[dim] // self.repeat
        columns = part.numel() // max(1, batch.numel() * count)
        return part.movedim(dim, batch_dims).reshape(*batch, count, columns)

    def fold(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`: the slice in the shape that it has in the tensor."""
        part, dim = self._part(like, 0)
        moved = part.movedim(dim, 0).shape
        return rows.reshape(moved).movedim(0, dim) if like.ndim else rows.reshape(())

    def replace(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """A copy of the tensor with the rows of this axis replaced."""
        folded = self.fold(rows, tensor)
        if not tensor.ndim:
            return folded
        if self.within is not None:
            other, first, last = self.within
            inner = tensor.narrow(other, first, last - first)
            return _put(
                tensor, other, first, last, _put(inner, self.dim, *self._bounds(tensor.shape[self.dim]), folded)
            )
        return _put(tensor, self.dim, *self._bounds(tensor.shape[self.dim]), folded)

    def embed(self, rows: Tensor, like: Tensor) -> Tensor:
        """A tensor of the shape of `like` with these rows, and zeros elsewhere."""
        return self.replace(torch.zeros_like(like), rows)

    def _bounds(self, length: int) -> tuple[int, int]:
        return self.start or 0, length if self.stop is None else self.stop

    def _part(self, tensor: Tensor, batch_dims: int) -> tuple[Tensor, int]:
        if tensor.ndim == batch_dims:
            tensor = tensor.unsqueeze(-1)
        dim = self.dim % (tensor.ndim - batch_dims) + batch_dims
        start, stop = self._bounds(tensor.shape[dim])
        if self.within is not None:
            other, first, last = self.within
            tensor = tensor.narrow(other + batch_dims, first, last - first)
        return tensor.narrow(dim, start, stop - start), dim


def _put(tensor: Tensor, dim: int, start: int, stop: int, part: Tensor) -> Tensor:
    """A copy of a tensor with a slice replaced."""
    dim %= tensor.ndim
    before, after = tensor.narrow(dim, 0, start), tensor.narrow(dim, stop, tensor.shape[dim] - stop)
    return torch.cat([before, part, after], dim=dim)

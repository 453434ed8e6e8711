"""Exponents of entries: how often the coordinate of a scaling or rescaling counts in the exponent of an entry."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Axis, AxisSymmetry


class Role(NamedTuple):
    """An axis of a symmetry, and the coefficient of its coordinate in the exponent of an entry of its tensor.

    The coefficient is 1 or -1, shape (). For a tensor in several roles (a tied weight) it has the shape of the tensor:
    the roles in which an entry belongs to one coordinate are added up, and counted in the first of these roles.
    """

    axis: Axis
    coefficient: Tensor


def roles_of(symmetry: AxisSymmetry, params: Params) -> list[Role]:
    """Every role of every tensor in a symmetry that scales entries."""
    signed = [(axis, 1.0) for axis in symmetry.plus] + [(axis, -1.0) for axis in symmetry.minus]
    shared = {axis.name for axis, _ in signed if sum(other.name == axis.name for other, _ in signed) > 1}
    coordinates = [_coordinate_of(symmetry, axis, params) if axis.name in shared else None for axis, _ in signed]
    roles = []
    for index, (axis, sign) in enumerate(signed):
        coefficient = torch.tensor(sign, dtype=torch.float64, device=params[axis.name].device)
        here = coordinates[index]
        if here is not None:
            coefficient = torch.zeros_like(params[axis.name])
            counted = torch.zeros_like(here, dtype=torch.bool)
            for place, (other, other_sign) in enumerate(signed):
                there = coordinates[place]
                if there is not None and other.name == axis.name:
                    equal = (there == here) & (here >= 0)
                    coefficient = coefficient + other_sign * equal
                    if place < index:
                        counted |= equal
            coefficient = torch.where(counted, 0.0, coefficient)
        roles.append(Role(axis, coefficient))
    return roles


def unused_dims(tensor: Tensor, axes: Sequence[Axis]) -> tuple[int, ...]:
    """The dimensions of a tensor along which none of its axes runs, or is limited to a part."""
    used = {axis.dim % max(1, tensor.ndim) for axis in axes} | {
        axis.within[0] for axis in axes if axis.within is not None
    }
    return tuple(dim for dim in range(tensor.ndim) if dim not in used)


def _coordinate_of(symmetry: AxisSymmetry, axis: Axis, params: Params) -> Tensor:
    """The index of the coordinate that scales each entry of a tensor along an axis, -1 for none."""
    tensor, zero = params[axis.name], symmetry.identity(params)
    index = torch.arange(zero.numel(), device=tensor.device).reshape(zero.shape)
    rows = symmetry.multiply(index, torch.ones_like(axis.rows(tensor), dtype=torch.int64))
    return axis.replace(torch.full(tensor.shape, -1, device=tensor.device), rows)

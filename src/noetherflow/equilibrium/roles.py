"""How often the coordinate of a scaling or rescaling counts in the exponent of an entry."""

from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Axis, DiagonalSymmetry, ScalarSymmetry

Commuting = ScalarSymmetry | DiagonalSymmetry


class Role(NamedTuple):
    """An axis of a symmetry, and how often its coordinate counts in the exponent of an entry of its tensor.

    The coefficient is 1 or -1, shape (); or, for a tensor that stands in several roles (a tied weight), of the tensor's
    shape, where the roles in which an entry belongs to the same coordinate are added up and counted once.
    """

    axis: Axis
    coefficient: Tensor


def roles_of(symmetry: Commuting, params: Params) -> list[Role]:
    """Every role that a tensor plays in a symmetry."""
    signed = [(axis, 1.0) for axis in symmetry.plus] + [(axis, -1.0) for axis in symmetry.minus]
    shared = {axis.name for axis, _ in signed if sum(other.name == axis.name for other, _ in signed) > 1}
    belongs = [_coordinate_of(symmetry, axis, params[axis.name]) if axis.name in shared else None for axis, _ in signed]
    roles = []
    for index, (axis, sign) in enumerate(signed):
        coefficient = torch.tensor(sign, dtype=torch.float64, device=params[axis.name].device)
        mine = belongs[index]
        if mine is not None:
            coefficient = torch.zeros_like(params[axis.name])
            counted = torch.zeros_like(mine, dtype=torch.bool)
            for place, (other, other_sign) in enumerate(signed):
                theirs = belongs[place]
                if theirs is not None and other.name == axis.name:
                    same = (theirs == mine) & (mine >= 0)
                    coefficient = coefficient + other_sign * same
                    if place < index:
                        counted |= same
            coefficient = torch.where(counted, 0.0, coefficient)
        roles.append(Role(axis, coefficient))
    return roles


def _coordinate_of(symmetry: Commuting, axis: Axis, tensor: Tensor) -> Tensor:
    """The coordinate to which every entry of a tensor belongs by an axis, -1 for none."""
    rows = axis.rows(tensor)
    count = len(rows) if symmetry.per_row else 1
    index = torch.arange(count, device=tensor.device).unsqueeze(1).expand(rows.shape)
    return axis.replace(torch.full(tensor.shape, -1, device=tensor.device), index)

"""The directions of a set of scalings along which the potential has a minimum."""

from typing import final

import torch
from torch import Tensor

# A coordinate with a smaller share in a runaway does not take part in it.
_PART = 1e-3


@final
class Free:
    """The directions that have an equilibrium: coordinates with a force on both sides, less joint runaways.

    Args:
        mask: The coordinates, shape (n,).
        held: Orthonormal directions along which several coordinates run away together, shape (k, n).
    """

    def __init__(self, mask: Tensor, held: Tensor) -> None:
        self.mask, self._held = mask, held
        self._everywhere = bool(mask.all())

    def project(self, vector: Tensor) -> Tensor:
        """The part of a vector along these directions."""
        masked = vector if self._everywhere else torch.where(self.mask, vector, 0.0)
        return masked - self._held.mT @ (self._held @ masked) if self.held else masked

    @property
    def held(self) -> bool:
        """Whether a direction is held along which several coordinates run away together."""
        return len(self._held) > 0

    def without(self, direction: Tensor) -> "Free":
        """The directions orthogonal to a further one."""
        rest = self.project(direction)
        return Free(self.mask, torch.cat([self._held, (rest / rest.norm())[None]]))

    @property
    def coordinates(self) -> Tensor:
        """The coordinates that take part in no runaway, shape (n,)."""
        return self.mask & (self._held.abs() <= _PART).all(0)

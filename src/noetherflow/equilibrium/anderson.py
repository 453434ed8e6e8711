"""Anderson acceleration of a fixed-point iteration."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd

# Differences of past iterates that are combined.
_DEPTH = 8


@final
class Anderson:
    r"""Extrapolates the iteration $x \to G(x)$ from its last iterates.

    With residuals $f_k = G(x_k) - x_k$, the next iterate is $x_k + f_k - (\Delta X + \Delta F)\gamma$, where
    $\gamma$ minimises $|f_k - \Delta F \gamma|$ over the last differences of iterates and residuals. On a linear
    iteration this is GMRES.

    Source: Anderson (1965); Walker and Ni (2011).
    """

    def __init__(self) -> None:
        self._points: list[Tensor] = []
        self._residuals: list[Tensor] = []

    def restart(self) -> None:
        """Forget all iterates but the last."""
        del self._points[:-1], self._residuals[:-1]

    def next(self, x: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next iterate.

        Args:
            x: The present iterate, by name: numbers, vectors or symmetric matrices.
            image: G(x).

        Returns:
            By name.
        """
        point, target = _flat(x), _flat(image)
        self._points.append(point)
        self._residuals.append(target - point)
        del self._points[: -_DEPTH - 1], self._residuals[: -_DEPTH - 1]
        return _split(point + self._solve(self._residuals[-1]), x)

    def respond(self, displacement: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""The displacement of the fixed point if G is displaced: $(1 - G')^{-1}$, as far as the last iterates know G'.

        Args:
            displacement: Added to G, by name.

        Returns:
            By name.
        """
        return _split(self._solve(_flat(displacement)), displacement)

    def _solve(self, residual: Tensor) -> Tensor:
        """The Newton step for a residual, with the Jacobian of the last iterates, and that of G = 0 beyond these."""
        if len(self._points) < 2:
            return residual
        points, residuals = (torch.stack(parts, 1).diff(dim=1) for parts in (self._points, self._residuals))
        # Differences shrink from pass to pass; scaled to length 1 none is lost in the rank decision.
        length = residuals.norm(dim=0).clamp_min(torch.finfo(residuals.dtype).tiny)
        points, residuals = points / length, residuals / length
        weights = torch.linalg.lstsq(residuals, residual.unsqueeze(1), driver="gelsd").solution
        return residual - ((points + residuals) @ weights).squeeze(1)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: _shaped(part, like[name]) for name, part in zip(like, parts, strict=True)}


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    tensor = part.reshape(like.shape)
    return _spd.symmetric(tensor) if tensor.ndim == 2 else tensor

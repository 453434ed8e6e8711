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
        step = self._residuals[-1]
        if len(self._points) > 1:
            points, residuals = (torch.stack(parts, 1).diff(dim=1) for parts in (self._points, self._residuals))
            # Differences shrink from pass to pass; scaled to length 1 none is lost in the rank decision.
            length = residuals.norm(dim=0).clamp_min(torch.finfo(residuals.dtype).tiny)
            points, residuals = points / length, residuals / length
            weights = torch.linalg.lstsq(residuals, step.unsqueeze(1), driver="gelsd").solution
            step = step - ((points + residuals) @ weights).squeeze(1)
        parts = (point + step).split([tensor.numel() for tensor in x.values()])
        return {name: _shaped(part, x[name]) for name, part in zip(x, parts, strict=True)}


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    tensor = part.reshape(like.shape)
    return _spd.symmetric(tensor) if tensor.ndim == 2 else tensor

"""Is what the finder finds all there is?"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._params import snapshot
from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.discover.generators import Discovery, discover_generators
from noetherflow.symmetry import Symmetry

_SAME = 1e-6


@final
@dataclass(frozen=True, eq=False)
class Completeness:
    """What comes of comparing `find_symmetries` with `discover_generators`.

    Args:
        found: How many independent symmetric generators the finder's symmetries have, dead directions taken out.
        discovered: How many there are.
        missing: How many of those discovered are not in the span of those found.
        false: How many of those found are not in the span of those discovered.
        discovery: All generators.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.check_completeness(net, loss, batch).complete
        True
    """

    found: int
    discovered: int
    missing: int
    false: int
    discovery: Discovery

    @property
    def complete(self) -> bool:
        """Whether both agree, and the discovery could decide."""
        return self.discovery.decided and self.missing == self.false == 0


def check_completeness(model: nn.Module, loss: Loss, batch: Batch) -> Completeness:
    """Compare the finder with the numerical search on a small model.

    Args:
        model: As for `discover_generators`: at most 80 trainable parameters.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples.

    Returns:
        How many symmetric generators are missing, and how many are false.

    Raises:
        SettingsError: If the model is too large.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.check_completeness(net, loss, batch).discovered
        0

    Source: this package's own.
    """
    discovery = discover_generators(model, loss, batch, progress=False)
    params = {name: one for name, one in snapshot(model).items() if name in discovery.names}
    matrices = [
        matrix for symmetry in find_symmetries(model, loss, batch).values() for matrix in _matrices(symmetry, params)
    ]
    size = sum(one.numel() for one in params.values())
    found = torch.stack(matrices) if matrices else torch.zeros(0, size, size, dtype=torch.float64)
    # What moves dead directions, or is moved by them, says nothing.
    live = torch.eye(size, dtype=torch.float64) - discovery.dead.T @ discovery.dead
    one, other = _span(live @ found @ live), _span(discovery.symmetric)
    both = len(_join(one, other))
    return Completeness(len(one), len(other), both - len(one), both - len(other), discovery)


def _matrices(symmetry: Symmetry, params: dict[str, Tensor]) -> list[Tensor]:
    """Each generator of a symmetry as a matrix on all parameters laid out one after the other."""
    identity = symmetry.identity(params)
    coordinates = []
    for index in range(identity.numel()):
        x = torch.zeros_like(identity).reshape(-1)
        x[index] = 1.0
        x = x.reshape(identity.shape)
        if x.ndim == 2:
            row, column = divmod(index, len(x))
            if row > column:
                continue
            x = (x + x.mT) / 2
        coordinates.append(x)
    shapes = {name: one.shape for name, one in params.items()}
    sizes = [one.numel() for one in params.values()]
    total = sum(sizes)
    found = []
    for x in coordinates:
        columns = []
        for unit in torch.eye(total, dtype=torch.float64):
            parts = {
                name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), unit.split(sizes), strict=True)
            }
            moved = symmetry.generate(x, parts)
            columns.append(
                torch.cat(
                    [moved[name].reshape(-1) if name in moved else 0 * parts[name].reshape(-1) for name in shapes]
                )
            )
        found.append(torch.stack(columns, 1))
    return found


def _span(matrices: Tensor) -> Tensor:
    """An orthonormal basis, shape (k, n^2)."""
    if not len(matrices):
        return matrices.reshape(0, matrices.shape[-1] ** 2)
    _, values, right = torch.linalg.svd(matrices.reshape(len(matrices), -1), full_matrices=False)
    return right[values > _SAME * max(1.0, float(values[0]))]


def _join(first: Tensor, second: Tensor) -> Tensor:
    both = torch.cat([first, second])
    if not len(both):
        return both
    _, values, right = torch.linalg.svd(both, full_matrices=False)
    return right[values > 1e-5]

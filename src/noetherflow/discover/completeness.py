"""Is what the finder finds all there is?"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._params import snapshot
from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.discover.generators import MOST_PARAMETERS, Discovery, discover_generators
from noetherflow.discover.rescalings import Rescalings, discover_rescalings
from noetherflow.symmetry import Symmetry

_SAME = 1e-6


@final
@dataclass(frozen=True, eq=False)
class Completeness:
    """What comes of comparing `find_symmetries` with `discover_generators`.

    In a model of more than 80 trainable parameters only rescalings are compared: what the finder's symmetries do to the
    entries of parameters one by one, with `discover_rescalings`.

    Args:
        found: How many independent symmetric generators the finder's symmetries have, dead directions taken out.
        discovered: How many there are.
        missing: How many of those discovered are not in the span of those found.
        false: How many of those found are not in the span of those discovered.
        discovery: All generators, or all rescalings.

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
    discovery: Discovery | Rescalings

    @property
    def complete(self) -> bool:
        """Whether both agree, and the discovery could decide."""
        return self.discovery.decided and self.missing == self.false == 0


def check_completeness(model: nn.Module, loss: Loss, batch: Batch) -> Completeness:
    """Compare the finder with the numerical search: of all generators on a small model, of rescalings on a larger one.

    A scale invariance that is exact up to an eps of 1e-12 is found by a search in numbers, and not by the finder: it
    counts as missing.

    Args:
        model: As for `discover_generators`, or, with more than 80 trainable parameters, `discover_rescalings`.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples.

    Returns:
        How many symmetric generators are missing, and how many are false.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
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
    size = sum(one.numel() for one in model.parameters() if one.requires_grad)
    found = find_symmetries(model, loss, batch)
    if size > MOST_PARAMETERS:
        return _compare_rescalings(model, list(found.values()), discover_rescalings(model, loss, batch, progress=False))
    discovery = discover_generators(model, loss, batch, progress=False)
    params = {name: one for name, one in snapshot(model).items() if name in discovery.names}
    matrices = [matrix for symmetry in found.values() for matrix in _matrices(symmetry, params)]
    stacked = torch.stack(matrices) if matrices else torch.zeros(0, size, size, dtype=torch.float64)
    # What moves dead directions, or is moved by them, says nothing.
    live = torch.eye(size, dtype=torch.float64) - discovery.dead.T @ discovery.dead
    return _compare(live @ stacked @ live, discovery.symmetric, discovery)


def _compare_rescalings(model: nn.Module, found: list[Symmetry], discovery: Rescalings) -> Completeness:
    ones = {name: torch.ones_like(one) for name, one in snapshot(model).items() if name in discovery.exponents}
    exponents = []
    for symmetry in found:
        for x in _coordinates(symmetry.identity(ones)):
            if x.ndim < 2 or torch.equal(x, x.diag().diag()):
                moved = symmetry.generate(x, ones)
                exponents.append({name: moved.get(name, 0 * one) for name, one in ones.items()})
    stacked = {name: [one[name] for one in exponents] for name in ones}
    live = {name: torch.stack(one) * discovery.reached[name] for name, one in stacked.items() if one}
    return _compare(_flat(live), _flat(discovery.exponents), discovery)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(0, 1, dtype=torch.float64)
    return torch.cat([one.flatten(1) for one in tensors.values()], 1)


def _compare(found: Tensor, discovered: Tensor, discovery: Discovery | Rescalings) -> Completeness:
    one, other = _span(found), _span(discovered)
    both = len(_join(one, other))
    return Completeness(len(one), len(other), both - len(one), both - len(other), discovery)


def _coordinates(identity: Tensor) -> list[Tensor]:
    """A basis of what a symmetry can be given: numbers, vectors, or symmetric matrices."""
    found = []
    for index in range(identity.numel()):
        x = torch.zeros_like(identity).reshape(-1)
        x[index] = 1.0
        x = x.reshape(identity.shape)
        if x.ndim == 2:
            row, column = divmod(index, len(x))
            if row > column:
                continue
            x = (x + x.mT) / 2
        found.append(x)
    return found


def _matrices(symmetry: Symmetry, params: dict[str, Tensor]) -> list[Tensor]:
    """Each generator of a symmetry as a matrix on all parameters laid out one after the other."""
    shapes = {name: one.shape for name, one in params.items()}
    sizes = [one.numel() for one in params.values()]
    total = sum(sizes)
    found = []
    for x in _coordinates(symmetry.identity(params)):
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
    """An orthonormal basis of tensors laid out as vectors."""
    flat = matrices.flatten(1)
    if not len(flat):
        return flat
    _, values, right = torch.linalg.svd(flat, full_matrices=False)
    return right[values > _SAME * max(1.0, float(values[0]))]


def _join(first: Tensor, second: Tensor) -> Tensor:
    if not len(first) or not len(second):
        return first if len(first) else second
    both = torch.cat([first, second])
    _, values, right = torch.linalg.svd(both, full_matrices=False)
    return right[values > 1e-5]

"""A comparison of the symmetries that the finder returns with all generators of a model."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._params import snapshot
from noetherflow._types import Batch, Loss
from noetherflow.detect import find_symmetries
from noetherflow.discover.equations import span
from noetherflow.discover.generators import MOST_PARAMETERS, Discovery, discover_generators
from noetherflow.discover.rescalings import Rescalings, discover_rescalings
from noetherflow.discover.spans import basis_of, live_generators
from noetherflow.symmetry import Symmetry

# Sines of angles between spaces below this are rounding.
_ANGLE = 1e-5


@final
@dataclass(frozen=True, eq=False)
class Completeness:
    """A comparison of `find_symmetries` with a numerical search.

    In a model of more than 80 trainable parameters only rescalings are compared: the effects of the finder's symmetries
    on single entries of parameters, with `discover_rescalings`.

    Args:
        found: Number of independent symmetric generators of the finder's symmetries, dead directions taken out.
        discovered: Number of independent symmetric generators, or rescalings, of the numerical search.
        missing: Dimension of the discovered space that the finder's symmetries do not span; 0 if the search is
            undecided.
        false: Dimension of the space of the finder outside the discovered space; 0 if the search is undecided.
        discovery: All generators, or all rescalings. Its note says why a search is undecided.

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
        """Whether both searches agree, and the numerical search is decided."""
        return self.discovery.decided and self.missing == self.false == 0


def check_completeness(model: nn.Module, loss: Loss, batch: Batch) -> Completeness:
    """Compare the finder with a numerical search: for all generators, in a larger model for rescalings.

    A scale invariance that is exact up to an eps of 1e-12 is exact for the numerical search, and not for the finder: it
    counts as missing.

    Args:
        model: As for `discover_generators`, or, with more than 80 trainable parameters, `discover_rescalings`.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples.

    Returns:
        The numbers of symmetric generators that are missing and that are false.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If the model is too large, or if a trainable parameter is complex.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.check_completeness(net, loss, batch).discovered
        0

    Source: this package's own.
    """
    size = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    # The search comes first, because it explains what it cannot look at.
    if size > MOST_PARAMETERS:
        rescalings = discover_rescalings(model, loss, batch, progress=False)
        symmetries = list(find_symmetries(model, loss, batch).values())
        return _compare(_exponents(model, symmetries, rescalings), _joined(rescalings.exponents), rescalings)
    discovery = discover_generators(model, loss, batch, progress=False)
    symmetries = list(find_symmetries(model, loss, batch).values())
    return _compare(live_generators(discovery, symmetries, model), discovery.symmetric, discovery)


def _exponents(model: nn.Module, symmetries: list[Symmetry], rescalings: Rescalings) -> Tensor:
    """The exponents of all entries under every basis element that rescales entries, shape (k, entries)."""
    ones_like = {name: torch.ones_like(tensor).cpu() for name, tensor in snapshot(model).items()}
    rows = []
    for symmetry in symmetries:
        for x in basis_of(symmetry.identity(ones_like)):
            if x.ndim < 2 or torch.equal(x, x.diag().diag()):
                moved = ones_like | symmetry.generate(x, ones_like)
                acted = set(symmetry.names)
                parts = {name: moved[name] if name in acted else 0 * moved[name] for name in rescalings.exponents}
                rows.append(torch.cat([(parts[name] * rescalings.reached[name]).reshape(-1) for name in parts]))
    return torch.stack(rows) if rows else torch.zeros(0, 1, dtype=torch.float64)


def _joined(tensors: dict[str, Tensor]) -> Tensor:
    """Tensors of shape (k, *parameter) as vectors, shape (k, entries)."""
    return torch.cat([tensor.reshape(len(tensor), math.prod(tensor.shape[1:])) for tensor in tensors.values()], 1)


def _compare(detected: Tensor, discovered: Tensor, discovery: Discovery | Rescalings) -> Completeness:
    """The dimensions of two spaces of generators, and of the parts outside each other."""
    left, right = span(detected), span(discovered)
    if not discovery.decided:
        return Completeness(len(left), len(right), 0, 0, discovery)
    union = len(_sum(left, right))
    return Completeness(len(left), len(right), union - len(left), union - len(right), discovery)


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """An orthonormal basis of the sum of two spaces, each given by an orthonormal basis in its rows."""
    if not len(first) or not len(second):
        return first if len(first) else second
    _, values, right = torch.linalg.svd(torch.cat([first, second]), full_matrices=False)
    return right[values > _ANGLE]

r"""Every linear generator of a small model, numerically.

A matrix A generates a symmetry if $\nabla\ell(\theta, z) \cdot A\theta = 0$ for every example at every $\theta$: linear
equations for the entries of A, one for each pair of a parameter vector and an example, both drawn anew. With more
equations than unknowns their null space is the set of all generators.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Batch, Loss
from noetherflow.discover.equations import MOST_UNKNOWNS, Draws, enough, null_space, part
from noetherflow.symmetry import DenseSymmetry

MOST_PARAMETERS = int(MOST_UNKNOWNS**0.5)


@final
@dataclass(frozen=True, eq=False)
class Discovery:
    """All generators of a model, of the form of a matrix on its trainable parameters, laid out one after the other.

    Args:
        names: The parameters, in the order in which they are laid out.
        symmetric: An orthonormal basis of the symmetric ones, shape (k, n, n): these have charges.
        antisymmetric: Of the antisymmetric ones, shape (k, n, n): rotations, which have none.
        others: How many more there are that are neither, nor sums of the two.
        dead: An orthonormal basis of directions that no gradient ever has, shape (k, n). A generator that moves
            parameters only along these is no news and is left out of the counts above.
        charges: How many of the charges of the symmetric ones are functionally independent.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the two are far apart; if not, the counts are not to be trusted.
        symmetries: The symmetric ones as `DenseSymmetry`.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 2, bias=False))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> found = nf.discover_generators(net, loss, batch)
        >>> len(found.symmetric), found.charges, found.decided
        (1, 1, True)
    """

    names: tuple[str, ...]
    symmetric: Tensor
    antisymmetric: Tensor
    others: int
    dead: Tensor
    charges: int
    gap: tuple[float, float]
    decided: bool
    symmetries: tuple[DenseSymmetry, ...]


def discover_generators(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Discovery:
    r"""All matrices A with $\nabla\ell \cdot A\theta = 0$ for every example at every parameter vector.

    Parameters are drawn around zero, examples are those of the batch with their floating-point tensors drawn anew, in
    float64. First the directions that no gradient has are found and taken out; in what is left the null space of the
    equations is split into symmetric and antisymmetric generators.

    Args:
        model: A small model: at most 80 trainable parameters. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples; integers (tokens, labels) stay as they are, so there should be many different ones.
        generator: Source of the draws; a fixed one by default.
        progress: Show a progress bar on a terminal.

    Returns:
        The generators.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If the model has too many parameters: the unknowns are their number squared. `find_symmetries`
            has no such limit.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> len(nf.discover_generators(net, loss, batch).symmetric)
        2

    Source: this package's own.
    """
    draws = Draws(model, loss, batch, generator)
    size = draws.size
    if size > MOST_PARAMETERS:
        raise SettingsError(
            f"discover_generators looks at all {size}^2 entries of a generator of this model's {size} trainable "
            f"parameters; beyond {MOST_PARAMETERS} parameters that is not feasible. Use nf.find_symmetries, "
            "nf.discover_rescalings or nf.discover_blocks, or a smaller model of the same architecture"
        )
    first = draws.rows(4 * size + 50, lambda _, gradients: _flat(gradients), "directions", progress)
    # Directions that no gradient has: the null space of the gradients themselves.
    _, lengths, basis = torch.linalg.svd(first, full_matrices=True)
    rank = int((lengths > 1e-9 * lengths[0]).sum())
    live, dead = basis[:rank], basis[rank:]

    def products(params: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        theta, gradient = _flat(params) @ live.T, _flat(gradients) @ live.T
        return (gradient[:, :, None] * theta[:, None, :]).flatten(1)

    found = null_space(draws.rows(enough(rank * rank), products, "equations", progress))
    null = found.vectors.reshape(len(found.vectors), rank, rank)
    symmetric, antisymmetric = (part([null], sign)[0] for sign in (1.0, -1.0))
    wide = torch.einsum("kij,ia,jb->kab", symmetric, live, live)
    turned = torch.einsum("kij,ia,jb->kab", antisymmetric, live, live)
    theta = torch.randn(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    charges = int(torch.linalg.matrix_rank(symmetric @ theta)) if len(symmetric) else 0
    return Discovery(
        names=draws.names,
        symmetric=wide,
        antisymmetric=turned,
        others=len(null) - len(symmetric) - len(antisymmetric),
        dead=dead,
        charges=charges,
        gap=found.gap,
        decided=found.decided,
        symmetries=tuple(DenseSymmetry(one, draws.names) for one in wide),
    )


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten(1) for one in tensors.values()], 1)

r"""Every linear generator of a small model, numerically.

A matrix A generates a symmetry if $\nabla\ell(\theta, z) \cdot A\theta = 0$ for every example at every $\theta$: linear
equations for the entries of A, one for each pair of a parameter vector and an example, both drawn at random.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import SettingsError
from noetherflow._types import Batch, Loss
from noetherflow.discover.equations import MOST_UNKNOWNS, Thresholds, refine, with_parity
from noetherflow.discover.points import Points, Tensors
from noetherflow.discover.search import RowScale, Search, Solution, jump
from noetherflow.symmetry import DenseSymmetry

MOST_PARAMETERS = int(MOST_UNKNOWNS**0.5)
# How often directions that looked dead are corrected.
_ATTEMPTS = 5
# Entries of dead directions below this are rounding.
_TOUCHED = 1e-9


@final
@dataclass(frozen=True, eq=False)
class Discovery:
    """All generators of a model, of the form of a matrix on its trainable parameters, laid out one after the other.

    Args:
        names: The parameters, in the order in which they are laid out.
        symmetric: An orthonormal basis of the symmetric generators, shape (k, n, n): these have charges.
        antisymmetric: A basis of the antisymmetric generators, shape (k, n, n): rotations, which have no charge.
        others: Dimension of the space of all generators less those of both bases.
        dead: An orthonormal basis of directions in which every gradient is zero, shape (k, n). A generator that moves
            parameters only along these changes no loss, and is not counted above.
        charges: Number of functionally independent charges of the symmetric generators.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the generators are established. If not, the counts are not to be trusted.
        symmetries: The symmetric generators as `DenseSymmetry`.
        note: Why the search is undecided, or which tensors were not drawn at random; empty if there is nothing to say.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 2, bias=False))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> discovery = nf.discover_generators(net, loss, batch)
        >>> len(discovery.symmetric), discovery.charges, discovery.decided
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
    note: str = ""


def discover_generators(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Discovery:
    r"""All matrices A with $\nabla\ell \cdot A\theta = 0$ for every example at every parameter vector.

    Parameters, floating-point buffers that are part of the state dict, and floating-point tensors of examples are drawn
    at random. First the directions are determined in which every gradient is zero; on their orthogonal complement the
    null space of the equations is split into symmetric and antisymmetric generators.

    The result is right or undecided. Points without a gradient do not count, every generator is tested at fresh points,
    and each parameter that a gradient ever reaches has to have one at 100 of them. Both steps, directions and
    equations, draw at most 50,000 points, or 20 times the number of equations, and then end without a decision.
    Parameters are standard normal numbers times 0.03 to 30: a nonlinearity that shows only at activations far outside
    their range, such as a clamp at 1e6, is not seen.

    Args:
        model: A small model: at most 80 trainable parameters. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples; integers (tokens, labels) stay as they are, so there should be many different examples.
        generator: Source of random numbers; by default a generator with seed 0.
        progress: Show a progress bar on a terminal.

    Returns:
        The generators.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If the model has too many parameters: the unknowns are their number squared. `find_symmetries`
            has no such limit. Also if a trainable parameter is complex.
        LossError: If the loss cannot be evaluated at random parameters.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> len(nf.discover_generators(net, loss, batch).symmetric)
        2

    Source: this package's own.
    """
    points = Points(model, loss, batch, generator)
    size = points.size
    if size > MOST_PARAMETERS:
        raise SettingsError(
            f"discover_generators looks at all {size}^2 entries of a generator of this model's {size} trainable "
            f"parameters; beyond {MOST_PARAMETERS} parameters that is not feasible. Use nf.find_symmetries, "
            "nf.discover_rescalings or nf.discover_blocks, or a smaller model of the same architecture"
        )
    directions = Search(points, lambda _, gradients: flat(gradients), size, "directions", progress).run()
    dead = directions.vectors
    if directions.note:
        return _discovery(points, directions, _complement(dead), dead)
    for _ in range(_ATTEMPTS):
        live = _complement(dead)
        products = _Products(points, live, dead)
        solution = Search(points, products, len(live) ** 2, "equations", progress).run()
        further = refine(dead, products.leaks, Thresholds.of(points.precision)).vectors
        if len(further) == len(dead):
            break
        # A rare gradient was not zero along a direction that looked dead.
        dead = further
    else:
        solution = Solution(solution.vectors[:0], solution.gap, f"new directions of gradients at {_ATTEMPTS} attempts")
    return _discovery(points, solution, live, dead)


def _discovery(points: Points, solution: Solution, live: Tensor, dead: Tensor) -> Discovery:
    """The result, with the generators of the live coordinates in the coordinates of all parameters."""
    rank = len(live)
    # Without a decision about the dead directions there are no generators.
    vectors = solution.vectors if solution.vectors.shape[1] == rank * rank else live.new_zeros(0, rank * rank)
    null = vectors.reshape(len(vectors), rank, rank)
    symmetric, antisymmetric = (with_parity([null], sign)[0] for sign in (1.0, -1.0))
    embedded, rotations = (live.T @ generators @ live for generators in (symmetric, antisymmetric))
    both = torch.cat([embedded, rotations])
    undecided = solution.note or jump(points, len(both), lambda x, params: _move(both, x, params))
    theta = torch.randn(rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Discovery(
        names=points.names,
        symmetric=embedded,
        antisymmetric=rotations,
        others=len(null) - len(symmetric) - len(antisymmetric),
        dead=dead,
        charges=int(torch.linalg.matrix_rank(symmetric @ theta)) if len(symmetric) else 0,
        gap=solution.gap,
        decided=not undecided,
        symmetries=tuple(DenseSymmetry(generator, points.names) for generator in embedded),
        note="; ".join(filter(None, [undecided, points.note])),
    )


def _move(generators: Tensor, coordinates: Tensor, params: Tensors) -> Tensors:
    """Parameters of shape (m, *parameter) after the transformation exp(A) with A = sum_k x_k A_k, at norm 1."""
    generator = torch.tensordot(coordinates, generators, 1)
    transformation = torch.linalg.matrix_exp(generator / torch.linalg.matrix_norm(generator, 2))
    parts = (flat(params) @ transformation.T).split([tensor[0].numel() for tensor in params.values()], 1)
    return {name: part.reshape(params[name].shape).to(params[name]) for name, part in zip(params, parts, strict=True)}


@final
class _Products:
    """The rows g_i theta_j of the equations in live coordinates; keeps the components of g along dead directions.

    Args:
        points: The source of points.
        live: An orthonormal basis of the live directions, shape (r, n).
        dead: An orthonormal basis of the dead directions, shape (n - r, n).

    Attributes:
        leaks: The components along dead directions of unit gradients, shape (m, n - r).
    """

    def __init__(self, points: Points, live: Tensor, dead: Tensor) -> None:
        self._live, self._dead, self._scale = live, dead, RowScale.of(points)
        self.leaks = dead.new_zeros(0, len(dead))

    def __call__(self, params: Tensors, gradients: Tensors) -> Tensor:
        """The rows, shape (m, r * r)."""
        gradient, theta = flat(gradients), flat(params) @ self._live.T
        if len(self._dead):
            self.leaks = torch.cat([self.leaks, self._scale.select(gradient)[0] @ self._dead.T])
        return ((gradient @ self._live.T)[:, :, None] * theta[:, None, :]).flatten(1)


def _complement(dead: Tensor) -> Tensor:
    """An orthonormal basis of the orthogonal complement, shape (n - k, n) for k dead directions, shape (k, n).

    Unit vectors stay unit vectors as far as possible, so that a row shows which parameters have a gradient.

    Returns:
        The basis.
    """
    size = dead.shape[1]
    units = torch.eye(size, dtype=dead.dtype)
    if not len(dead):
        return units
    touched = dead.abs().amax(0) > _TOUCHED
    inside = dead[:, touched]
    _, _, right = torch.linalg.svd(inside, full_matrices=True)
    mixed = right[len(dead) :] @ units[touched]
    return torch.cat([units[~touched], mixed])


def flat(tensors: Tensors) -> Tensor:
    """Tensors of shape (m, *parameter) as the rows of a matrix in float64, shape (m, n)."""
    rows = [tensor.reshape(len(tensor), math.prod(tensor.shape[1:])) for tensor in tensors.values()]
    return torch.cat([part.to(CPU, torch.float64) for part in rows], 1)

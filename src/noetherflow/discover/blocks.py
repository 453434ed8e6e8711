r"""Every generator that acts by matrices along given axes, numerically.

For axes $a$ of tensors $\theta_a$, unfolded into rows, a generator acts as $\theta_a \mapsto X_a \theta_a$: a symmetry
if $\sum_a \langle X_a, \nabla_a\ell\, \theta_a^T \rangle = 0$ for every example at every $\theta$.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._params import require_names
from noetherflow._types import Batch, Loss
from noetherflow.discover.equations import MOST_UNKNOWNS, Thresholds, enough, null_space, with_parity, without
from noetherflow.discover.points import Points, Tensors
from noetherflow.discover.search import RowScale, Search, jump
from noetherflow.symmetry import Axis

# Squared lengths of directions below this share of the largest are rounding.
_DEAD = 1e-14


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """All generators that act by a matrix along each of several axes.

    Args:
        axes: The axes.
        symmetric: For each axis its matrices in each symmetric generator, shape (k, n, n): these have charges.
        antisymmetric: For each axis its matrices in each antisymmetric generator, shape (k, n, n): rotations.
        others: Dimension of the space of all generators less those of both.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the generators are established. If not, the counts are not to be trusted.
        note: Why the search is undecided, or which tensors were not drawn at random; empty if there is nothing to say.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(9, 4, bias=False), torch.nn.Linear(4, 8, bias=False))
        >>> batch = torch.randn(4, 9), torch.randn(4, 8)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> blocks = nf.discover_blocks(net, loss, batch, [nf.Axis("0.weight", 0), nf.Axis("1.weight", 1)])
        >>> blocks.count, torch.allclose(blocks.symmetric[0], -blocks.symmetric[1])
        (10, True)
    """

    axes: tuple[Axis, ...]
    symmetric: tuple[Tensor, ...]
    antisymmetric: tuple[Tensor, ...]
    others: int
    gap: tuple[float, float]
    decided: bool
    note: str = ""

    @property
    def count(self) -> int:
        """Number k of independent symmetric generators."""
        return len(self.symmetric[0])


def discover_blocks(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    axes: Sequence[Axis],
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Blocks:
    r"""All generators that act by one matrix along each of the given axes, and nowhere else.

    For models too large for `discover_generators`, and for the question whether some axes share a symmetry: the rows of
    a map, the columns of the next map, and the bias between both. Generators that move parameters only along directions
    in which every gradient is zero are left out. Points are drawn and solutions are tested as by `discover_generators`:
    the result is right or undecided.

    Args:
        model: The model, of any size. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples; integers (tokens, labels) stay as they are, so there should be many different examples.
        axes: Two or more axes; the squares of their sizes add up to 6,400 at most: two of 56, or three of 46.
        generator: Source of random numbers; by default a generator with seed 0.
        progress: Show a progress bar on a terminal.

    Returns:
        The generators, as a matrix for each axis.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        ParameterNameError: If an axis belongs to a parameter that does not exist or is frozen.
        SettingsError: If there are too many unknowns or no axes, or if a trainable parameter is complex.
        LossError: If the loss cannot be evaluated at random parameters.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(9, 4), torch.nn.Linear(4, 8))
        >>> batch = torch.randn(4, 9), torch.randn(4, 8)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> axes = [nf.Axis("0.weight", 0), nf.Axis("1.weight", 1)]
        >>> nf.discover_blocks(net, loss, batch, axes).count  # the bias was forgotten
        0
        >>> nf.discover_blocks(net, loss, batch, [*axes, nf.Axis("0.bias", 0)]).count
        10

    Source: this package's own.
    """
    points = Points(model, loss, batch, generator)
    require_names(points.names, [axis.name for axis in axes], "axes")
    if not axes:
        raise SettingsError("discover_blocks was given no axes: name the axes along which a symmetry may act")
    sizes = [axis.size(torch.empty(points.shapes[axis.name])) for axis in axes]
    unknowns = sum(size**2 for size in sizes)
    if unknowns > MOST_UNKNOWNS:
        raise SettingsError(
            f"the squares of the sizes {sizes} of the axes make {unknowns} unknowns, and "
            f"discover_blocks can look at {MOST_UNKNOWNS}. Give fewer axes, or slices of them (a single head)"
        )
    products = _Products(points, axes, sizes)
    solution = Search(points, products, unknowns, "equations", progress).run()
    live = products.live
    # Matrices that move parameters along dead directions only, and pairs of axes whose actions cancel.
    params, gradients = points.pretend(enough(unknowns))
    trivial = null_space(_rows(axes, params, gradients, live), Thresholds.of(torch.float64)).vectors
    vectors = without(solution.vectors, trivial)
    null = [
        part.reshape(len(part), size, size)
        for part, size in zip(vectors.split([size**2 for size in sizes], 1), sizes, strict=True)
    ]
    symmetric, antisymmetric = (tuple(with_parity(null, sign)) for sign in (1.0, -1.0))
    both = [torch.cat(matrices) for matrices in zip(symmetric, antisymmetric, strict=True)]
    undecided = solution.note or jump(points, len(both[0]), lambda x, params: _move(axes, both, x, params))
    return Blocks(
        axes=tuple(axes),
        symmetric=symmetric,
        antisymmetric=antisymmetric,
        others=len(null[0]) - len(symmetric[0]) - len(antisymmetric[0]),
        gap=solution.gap,
        decided=not undecided,
        note="; ".join(filter(None, [undecided, points.note])),
    )


def _move(axes: Sequence[Axis], generators: Sequence[Tensor], coordinates: Tensor, params: Tensors) -> Tensors:
    """Parameters of shape (m, *parameter) after exp(X) along every axis, with X = sum_k x_k X_k, at norm 1."""
    sums = [torch.tensordot(coordinates, matrices, 1) for matrices in generators]
    largest = max(float(torch.linalg.matrix_norm(matrix, 2)) for matrix in sums)
    moved = dict(params)
    for axis, generator in zip(axes, sums, strict=True):
        matrix = torch.linalg.matrix_exp(generator / largest).to(params[axis.name])
        stack = moved[axis.name]
        moved[axis.name] = torch.stack([axis.replace(tensor, matrix @ axis.rows(tensor)) for tensor in stack])
    return moved


@final
class _Products:
    """The rows G theta^T of the equations, of every axis; keeps the directions that gradients have along each axis.

    Args:
        points: The source of points.
        axes: The axes.
        sizes: Their lengths.
    """

    def __init__(self, points: Points, axes: Sequence[Axis], sizes: Sequence[int]) -> None:
        self._axes = axes
        self._moments = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
        self._scale = RowScale.of(points)

    def __call__(self, params: Tensors, gradients: Tensors) -> Tensor:
        """The rows, shape (m, sum of squares of the sizes)."""
        unfolded = [_unfold(axis, gradients) for axis in self._axes]
        units, _ = self._scale.select(torch.cat([gradient.flatten(1) for gradient in unfolded], 1))
        parts = units.split([gradient[0].numel() for gradient in unfolded], 1)
        for moment, gradient, part in zip(self._moments, unfolded, parts, strict=True):
            unit = part.reshape(-1, *gradient.shape[1:])
            moment += torch.einsum("mij,mkj->ik", unit, unit)
        return _rows(self._axes, params, gradients)

    @property
    def live(self) -> list[Tensor]:
        """For each axis the orthogonal projection on the directions that gradients have."""
        projections = []
        for moment in self._moments:
            lengths, basis = torch.linalg.eigh(moment)
            directions = basis[:, lengths > _DEAD * lengths[-1].clamp_min(1e-300)]
            projections.append(directions @ directions.T)
        return projections


def _rows(axes: Sequence[Axis], params: Tensors, gradients: Tensors, projections: list[Tensor] | None = None) -> Tensor:
    """The products P G theta^T of every axis with an optional projection P, shape (m, sum of squares of the sizes)."""
    parts = []
    for index, axis in enumerate(axes):
        theta, gradient = _unfold(axis, params), _unfold(axis, gradients)
        if projections is not None:
            gradient = projections[index] @ gradient
        parts.append((gradient @ theta.mT).flatten(1))
    return torch.cat(parts, 1)


def _unfold(axis: Axis, tensors: Tensors) -> Tensor:
    """The slices of a parameter along an axis as rows, shape (m, n, numbers in a slice), in float64."""
    return axis.rows(tensors[axis.name], batch_dims=1).to("cpu", torch.float64)

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
from noetherflow.discover.equations import MOST_UNKNOWNS, Draws, Tensors, enough, null_space, part
from noetherflow.symmetry import Axis


@final
@dataclass(frozen=True, eq=False)
class Blocks:
    """All generators that act by a matrix along each of some axes.

    Args:
        axes: The axes.
        symmetric: For each axis its matrices in each symmetric generator, shape (k, n, n): these have charges.
        antisymmetric: For each axis its matrices in each antisymmetric one, shape (k, n, n): rotations.
        others: How many more there are that are neither, nor sums of the two.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the two are far apart; if not, the counts are not to be trusted.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(9, 4, bias=False), torch.nn.Linear(4, 8, bias=False))
        >>> batch = torch.randn(4, 9), torch.randn(4, 8)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> found = nf.discover_blocks(net, loss, batch, [nf.Axis("0.weight", 0), nf.Axis("1.weight", 1)])
        >>> found.count, torch.allclose(found.symmetric[0], -found.symmetric[1])
        (10, True)
    """

    axes: tuple[Axis, ...]
    symmetric: tuple[Tensor, ...]
    antisymmetric: tuple[Tensor, ...]
    others: int
    gap: tuple[float, float]
    decided: bool

    @property
    def count(self) -> int:
        """How many independent symmetric ones there are."""
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
    one map and the columns of the next, and the bias between them. What moves parameters only along directions that no
    gradient has is left out.

    Args:
        model: The model, of any size. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples; integers (tokens, labels) stay as they are, so there should be many different ones.
        axes: Two or more axes, the squares of whose sizes make 6,400 at most: two of 56, or three of 46.
        generator: Source of the draws; a fixed one by default.
        progress: Show a progress bar on a terminal.

    Returns:
        The generators, as a matrix for each axis.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        ParameterNameError: If an axis is that of a parameter which is not there or is frozen.
        SettingsError: If there are too many unknowns, or no axes.

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
    draws = Draws(model, loss, batch, generator)
    require_names(draws.names, [axis.name for axis in axes], "axes")
    if not axes:
        raise SettingsError("discover_blocks was given no axes: say which ones a symmetry may act along")
    sizes = [axis.size(torch.empty(draws.shapes[axis.name])) for axis in axes]
    if sum(size**2 for size in sizes) > MOST_UNKNOWNS:
        raise SettingsError(
            f"the squares of the sizes {sizes} of the axes make {sum(size**2 for size in sizes)} unknowns, and "
            f"discover_blocks can look at {MOST_UNKNOWNS}. Give fewer axes, or slices of them (one head)"
        )

    def spreads(_: Tensors, gradients: Tensors) -> Tensor:
        rows = [axis.rows(gradients[axis.name], batch_dims=1) for axis in axes]
        return torch.cat([(one @ one.mT).flatten(1) for one in rows], 1)

    # Along each axis, the directions that some gradient has.
    moments = draws.rows(4 * max(sizes) + 50, spreads, "directions", progress).sum(0)
    live = []
    for moment, size in zip(moments.split([size**2 for size in sizes]), sizes, strict=True):
        lengths, basis = torch.linalg.eigh(moment.reshape(size, size))
        live.append(basis[:, lengths > 1e-14 * lengths[-1]] if lengths[-1] > 0 else basis[:, :0])

    def products(params: Tensors, gradients: Tensors) -> Tensor:
        found = []
        for axis, basis in zip(axes, live, strict=True):
            theta, gradient = (basis.T @ axis.rows(one[axis.name], batch_dims=1) for one in (params, gradients))
            found.append((gradient @ theta.mT).flatten(1))
        return torch.cat(found, 1)

    count = enough(sum(basis.shape[1] ** 2 for basis in live))
    trivial = null_space(draws.pretend(count, products)).vectors
    found = null_space(draws.rows(count, products, "equations", progress), trivial)
    null = [
        vectors.reshape(len(vectors), basis.shape[1], basis.shape[1])
        for vectors, basis in zip(found.vectors.split([basis.shape[1] ** 2 for basis in live], 1), live, strict=True)
    ]
    symmetric, antisymmetric = (
        tuple(basis @ one @ basis.T for one, basis in zip(part(null, sign), live, strict=True)) for sign in (1.0, -1.0)
    )
    return Blocks(
        axes=tuple(axes),
        symmetric=symmetric,
        antisymmetric=antisymmetric,
        others=len(null[0]) - len(symmetric[0]) - len(antisymmetric[0]),
        gap=found.gap,
        decided=found.decided,
    )

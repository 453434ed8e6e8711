r"""Every linear generator of a small model, numerically.

A matrix A generates a symmetry if $\nabla\ell(\theta, z) \cdot A\theta = 0$ for every example at every $\theta$: linear
equations for the entries of A, one for each pair of a parameter vector and an example, both drawn anew. With more
equations than unknowns their null space is the set of all generators.
"""

import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from noetherflow._batch import cast, is_per_example, tensors_of, with_tensors
from noetherflow._errors import SettingsError
from noetherflow._params import bind, snapshot
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._progress import track
from noetherflow._types import Batch, Loss
from noetherflow.symmetry import DenseSymmetry

# Unknowns beyond which the null space takes minutes and gigabytes: n^2 for n parameters.
MOST_PARAMETERS = 80
# Singular values below this share of the largest are zero, above it are not, and in between nobody can say.
ZERO = 1e-11
CLEAR = 1e-7
_CHUNK = 512


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
    params = {name: one for name, one in snapshot(model).items() if dict(model.named_parameters())[name].requires_grad}
    frozen = {name: one for name, one in snapshot(model).items() if name not in params}
    size = sum(one.numel() for one in params.values())
    if size > MOST_PARAMETERS:
        raise SettingsError(
            f"discover_generators looks at all {size}^2 entries of a generator of this model's {size} trainable "
            f"parameters; beyond {MOST_PARAMETERS} parameters that is not feasible. Use nf.find_symmetries, or a "
            "smaller model of the same architecture"
        )
    draw = _Draws(model, loss, batch, params, frozen, generator or torch.Generator().manual_seed(0))
    first = draw.rows(4 * size + 50, "directions", progress)
    # Directions that no gradient has: the null space of the gradients themselves.
    _, lengths, basis = torch.linalg.svd(first[1], full_matrices=True)
    rank = int((lengths > 1e-9 * lengths[0]).sum())
    live, dead = basis[:rank], basis[rank:]
    unknowns = rank * rank
    theta, gradients = draw.rows(int(1.15 * unknowns) + 60, "equations", progress)
    theta, gradients = theta @ live.T, gradients @ live.T
    rows = (gradients[:, :, None] * theta[:, None, :]).reshape(len(theta), unknowns)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    _, upper = torch.linalg.qr(rows, mode="r")
    _, values, right = torch.linalg.svd(upper)
    relative = values / values[0]
    count = int((relative < (ZERO * CLEAR) ** 0.5).sum())
    null = right[unknowns - count :].reshape(count, rank, rank)
    symmetric, antisymmetric = (_part(null, sign) for sign in (1.0, -1.0))
    gap = (
        float(relative[unknowns - count :].max()) if count else 0.0,
        float(relative[unknowns - count - 1]) if count < unknowns else 0.0,
    )
    wide = torch.einsum("kij,ia,jb->kab", symmetric, live, live)
    turned = torch.einsum("kij,ia,jb->kab", antisymmetric, live, live)
    charges = int(torch.linalg.matrix_rank(symmetric @ theta[0])) if len(symmetric) else 0
    return Discovery(
        names=tuple(params),
        symmetric=wide,
        antisymmetric=turned,
        others=count - len(symmetric) - len(antisymmetric),
        dead=dead,
        charges=charges,
        gap=gap,
        decided=gap[0] < ZERO < CLEAR < gap[1] or not count,
        symmetries=tuple(DenseSymmetry(one, tuple(params)) for one in wide),
    )


def _part(null: Tensor, sign: float) -> Tensor:
    """The matrices A = +-A^T in a space of matrices: those combinations whose other part vanishes."""
    count, size = len(null), null.shape[-1]
    if not count:
        return null
    other = (null - sign * null.mT).reshape(count, size * size)
    left, values, _ = torch.linalg.svd(other, full_matrices=True)
    rank = int((values > 1e-6).sum())
    return torch.einsum("ck,cij->kij", left[:, rank:], null)


@final
class _Draws:
    """Parameters and examples drawn anew, and the gradients there."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batch: Batch,
        params: dict[str, Tensor],
        frozen: dict[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        self._params, self._frozen, self._generator = params, frozen, generator
        device = next(iter(params.values())).device
        self._batch = cast(batch, torch.float64, device)
        self._losses = bind(model, loss, torch.float64)
        with own_randomness(device, seed=0), torch.no_grad():
            self._size = require_losses(self._losses(params | frozen, self._batch), "discover_generators")

    def rows(self, count: int, what: str, progress: bool) -> tuple[Tensor, Tensor]:
        """Parameter vectors, and the gradient of one example at each; both of shape (count, n)."""
        thetas, gradients = [], []
        for start in track(range(0, count, _CHUNK), what, total=-(-count // _CHUNK), shown=progress):
            theta, gradient = self._chunk(min(_CHUNK, count - start))
            thetas.append(theta)
            gradients.append(gradient)
        return torch.cat(thetas), torch.cat(gradients)

    def _chunk(self, count: int) -> tuple[Tensor, Tensor]:
        drawn = {name: self._normal(count, *one.shape) for name, one in self._params.items()}
        chosen = torch.randint(self._size, (count,), generator=self._generator)
        examples = []
        for leaf in tensors_of(self._batch):
            if not is_per_example(leaf, self._size):
                examples.append(leaf.expand(count, *leaf.shape))
            elif leaf.is_floating_point():
                examples.append(self._normal(count, 1, *leaf.shape[1:]))
            else:
                examples.append(leaf[chosen].unsqueeze(1))

        def one(params: dict[str, Tensor], *leaves: Tensor) -> Tensor:
            return self._losses(params | self._frozen, with_tensors(self._batch, list(leaves))).sum()

        with warnings.catch_warnings():
            # An operation that cannot be batched is done one by one, which is fast enough here.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = vmap(grad(one), randomness="same")(drawn, *examples)
        flat = [torch.cat([part[name].reshape(count, -1) for name in self._params], 1) for part in (drawn, found)]
        return flat[0], flat[1]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

r"""Systems of homogeneous linear equations: null spaces, and how clearly they are null spaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

# Beyond this many unknowns the null space takes minutes and gigabytes.
MOST_UNKNOWNS = 6400
# Shares of a space of which a smaller one is taken out, and asymmetries of matrices, below this are rounding.
_SMALL = 1e-6


class Thresholds(NamedTuple):
    """Singular values relative to the largest: up to `zero` they are rounding, from `clear` on they are not."""

    zero: float
    clear: float

    @staticmethod
    def of(precision: torch.dtype) -> "Thresholds":
        """The thresholds for losses that are computed in a floating-point type."""
        epsilon = torch.finfo(precision).eps
        return Thresholds(max(1e-11, 100 * epsilon), max(1e-7, 1e4 * epsilon))

    @property
    def between(self) -> float:
        """The geometric mean of both."""
        return (self.zero * self.clear) ** 0.5


@final
@dataclass(frozen=True, eq=False)
class NullSpace:
    """Solutions of a system of equations.

    Args:
        vectors: An orthonormal basis of the solutions, shape (k, unknowns).
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
    """

    vectors: Tensor
    gap: tuple[float, float]

    def is_clear(self, thresholds: Thresholds) -> bool:
        """Whether no singular value lies between the two thresholds."""
        return self.gap[0] < thresholds.zero and self.gap[1] > thresholds.clear


def enough(unknowns: int) -> int:
    """A number of equations that determines the unknowns, with a reserve."""
    return int(1.15 * unknowns) + 60


def null_space(rows: Tensor, thresholds: Thresholds) -> NullSpace:
    """The vectors that are orthogonal to every row.

    Args:
        rows: The coefficients of the equations, shape (m, unknowns), of about equal length.
        thresholds: Which singular values are zero.

    Returns:
        The solutions.
    """
    unknowns = rows.shape[1]
    if not unknowns:
        return NullSpace(rows.new_zeros(0, 0), (0.0, 1.0))
    _, upper = torch.linalg.qr(rows, mode="r")
    _, values, right = torch.linalg.svd(upper)
    values = torch.cat([values, values.new_zeros(unknowns - len(values))])
    relative = values / values[0].clamp_min(1e-300)
    count = int((relative < thresholds.between).sum())
    gap = (
        float(relative[unknowns - count :].max()) if count else 0.0,
        float(relative[unknowns - count - 1]) if count < unknowns else 1.0,
    )
    return NullSpace(right[unknowns - count :], gap)


def refine(vectors: Tensor, residuals: Tensor, thresholds: Thresholds) -> NullSpace:
    """The solutions of further equations among the solutions of earlier equations.

    Args:
        vectors: An orthonormal basis of the earlier solutions, shape (k, unknowns).
        residuals: The products of the further rows with that basis, shape (m, k); rows have length 1 or less.
        thresholds: Which singular values are zero.

    Returns:
        What is left of the solutions; the gap is relative to the length of a row.
    """
    _, values, right = torch.linalg.svd(residuals, full_matrices=True)
    values = torch.cat([values, values.new_zeros(len(vectors) - len(values))])
    rank = int((values >= thresholds.between).sum())
    gap = (float(values[rank]) if rank < len(values) else 0.0, float(values[rank - 1]) if rank else 1.0)
    return NullSpace(right[rank:] @ vectors, gap)


def without(vectors: Tensor, removed: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to a space, in a larger space that holds it.

    Args:
        vectors: An orthonormal basis of the larger space, shape (k, unknowns).
        removed: An orthonormal basis of the smaller space, shape (j, unknowns).

    Returns:
        The basis, shape (k - j, unknowns).
    """
    if not len(removed) or not len(vectors):
        return vectors
    _, shares, turned = torch.linalg.svd(removed @ vectors.T, full_matrices=True)
    return turned[int((shares > _SMALL).sum()) :] @ vectors


def span(tensors: Tensor) -> Tensor:
    """An orthonormal basis, shape (k, entries), of the space that tensors of shape (m, ...) span as vectors."""
    flat = tensors.flatten(1)
    if not len(flat):
        return flat
    _, values, right = torch.linalg.svd(flat, full_matrices=False)
    return right[values > _SMALL * max(1.0, float(values[0]))]


def with_parity(blocks: Sequence[Tensor], sign: float) -> list[Tensor]:
    """The symmetric or the antisymmetric generators in a space of generators.

    Args:
        blocks: For every block the matrices of all k generators, shape (k, n, n).
        sign: 1 for symmetric generators, -1 for antisymmetric ones.

    Returns:
        For every block the matrices of a basis of the generators with X = sign * X^T in every block.
    """
    if not len(blocks[0]):
        return list(blocks)
    defect = torch.cat([(block - sign * block.mT).flatten(1) for block in blocks], 1)
    # The left singular vectors of a (k, N) matrix with k << N, from its square factor.
    left, values, _ = torch.linalg.svd(torch.linalg.qr(defect.T, mode="r")[1].T, full_matrices=True)
    rank = int((values > _SMALL).sum())
    return [torch.einsum("ck,cij->kij", left[:, rank:], block) for block in blocks]

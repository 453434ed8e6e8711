"""Symmetric positive matrices: functions of them, the geometric mean, and the ranges of rank-deficient pairs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# An eigenvalue below this fraction of the largest counts as zero. Estimated Grams are accumulated in float64, but
# from gradients that are often float32, whose rounding leaves about 1e-14 of the largest eigenvalue in empty
# directions.
RANK_TOLERANCE = 1e-12


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return (matrix + matrix.mT) / 2


def norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm of all entries, shape (), of which no square overflows or underflows."""
    largest = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
    return largest * (tensor / largest).norm() if largest > 0 and torch.isfinite(largest) else largest


def unit(matrix: Tensor) -> Tensor:
    """The matrix divided by its largest entry; a matrix of zeros as it is."""
    largest = matrix.abs().max()
    return matrix / largest if largest > 0 else matrix


def apply_spectral(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """A function of a symmetric matrix, applied to its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values).unsqueeze(-2)) @ vectors.mT


def expm(matrix: Tensor) -> Tensor:
    """Exponential of a symmetric matrix."""
    return apply_spectral(torch.exp, matrix)


def logm(matrix: Tensor) -> Tensor:
    """Logarithm of a symmetric positive definite matrix."""
    return apply_spectral(torch.log, matrix)


def compose(first: Tensor, second: Tensor) -> Tensor:
    r"""The coordinates of $e^{b} e^{a}$ up to a rotation: a + b for numbers, and for symmetric matrices the polar part.

    With $e^{b} e^{a} = O e^{c}$, $c = \tfrac12 \log(e^{a} e^{2b} e^{a})$.

    Args:
        first: a, of any shape; a matrix is symmetric.
        second: b, of that shape.

    Returns:
        c, of that shape.
    """
    if first.ndim < 2:
        return first + second
    grown = expm(first)
    return symmetric(logm(symmetric(grown @ expm(2 * second) @ grown)) / 2)


def riccati(left: Tensor, right: Tensor) -> Tensor:
    r"""The positive solution X of X R X = P, the geometric mean $R^{-1} \# P$.

    With the Cholesky factor $R = L L^T$, $X = L^{-T} (L^T P L)^{1/2} L^{-1}$. A Newton step on the equation then
    removes the rounding that an ill-conditioned R leaves.

    Args:
        left: R, symmetric positive definite, shape (n, n).
        right: P, likewise.

    Returns:
        X, symmetric positive definite, shape (n, n).
    """
    lower = torch.linalg.cholesky(left)
    values, vectors = torch.linalg.eigh(symmetric(lower.mT @ right @ lower))
    root = values.clamp_min(0).sqrt()

    def from_eigenbasis(inner: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(lower.mT, vectors @ inner @ vectors.mT, upper=True)
        return symmetric(torch.linalg.solve_triangular(lower.mT, half.mT, upper=True))

    solution = from_eigenbasis(torch.diag_embed(root))
    # X R D + D R X = P - X R X for the correction D, diagonalised by the same eigenvectors.
    defect = lower.mT @ symmetric(right - solution @ left @ solution) @ lower
    defect = vectors.mT @ defect @ vectors
    return solution + from_eigenbasis(defect / (root.unsqueeze(-1) + root.unsqueeze(-2)))


def pencil(matrix: Tensor, metric: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix relative to a positive definite one, ascending."""
    lower = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(lower, matrix, upper=False)
    return torch.linalg.eigvalsh(symmetric(torch.linalg.solve_triangular(lower, half.mT, upper=False)))


class Ranges(NamedTuple):
    """Orthonormal bases (columns) of the ranges and kernels of two positive semi-definite matrices."""

    both: Tensor
    only_left: Tensor
    only_right: Tensor
    neither: Tensor


def ranges(left: Tensor, right: Tensor, tolerance: float = RANK_TOLERANCE) -> Ranges:
    """Split the space into the ranges and kernels of two positive semi-definite matrices.

    `both` is orthogonal to the kernels of either, so that both matrices are positive definite on it. The rest is split
    into the common kernel (`neither`) and the rest of either kernel.

    Returns:
        The four bases.
    """
    kernel_left, kernel_right = kernel(left, tolerance), kernel(right, tolerance)
    neither = kernel(left / _scale(left) + right / _scale(right), tolerance)
    both = complement(torch.cat([kernel_left, kernel_right], dim=1))
    # In a right-only direction the left matrix vanishes and the right matrix does not.
    only_right = _beyond(kernel_left, neither)
    only_left = _beyond(kernel_right, torch.cat([neither, only_right], dim=1))
    return Ranges(both, only_left, only_right, neither)


def kernel(matrix: Tensor, tolerance: float = RANK_TOLERANCE) -> Tensor:
    """An orthonormal basis of the kernel of a positive semi-definite matrix, as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors[:, values <= tolerance * values.abs().max()]


def complement(columns: Tensor, tolerance: float = 1e-8) -> Tensor:
    """An orthonormal basis of the orthogonal complement of the span of some columns."""
    if columns.shape[1] == 0:
        return torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
    left, values, _ = torch.linalg.svd(columns, full_matrices=True)
    rank = int((values > tolerance).sum())
    return left[:, rank:]


def _beyond(columns: Tensor, known: Tensor) -> Tensor:
    """The part of a span that is orthogonal to the span of known columns."""
    rest = columns - known @ (known.mT @ columns)
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    return left[:, values > 1e-8]


def _scale(matrix: Tensor) -> Tensor:
    largest = matrix.abs().max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))

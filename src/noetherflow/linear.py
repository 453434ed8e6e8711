r"""Linear networks in closed form: the noise, the equilibrium, the sharpness of $\ell = |U W x - y|^2$.

Labels are $y = V x + \epsilon$. Here U has shape (outputs, hidden), W (hidden, inputs), V (outputs, inputs);
`input_cov` and `noise_cov` are the covariances of x and of the label noise $\epsilon$.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._errors import ParameterShapeError
from noetherflow._optimizers import SGD
from noetherflow.symmetry import Grams


class NoiseFactors(NamedTuple):
    r"""The covariances of $G = \partial\ell/\partial(UW)$ that each layer feels.

    $\Gamma_U = E[G G^T] - E[G] E[G]^T$ and $\Gamma_W = E[G^T G] - E[G]^T E[G]$.
    """

    u: Tensor
    w: Tensor


class TwoLayer(NamedTuple):
    """The weights of both layers."""

    u: Tensor
    w: Tensor


def noise_factors(input_cov: Tensor, noise_cov: Tensor, error: Tensor | None = None) -> NoiseFactors:
    r"""Gradient noise of the product of the two layers, for Gaussian inputs.

    With $D = UW - V$ the error of the product,
    $\Gamma_U = 4[\mathrm{Tr}\,\Sigma_x\,\Sigma_\epsilon + D(\Sigma_x \mathrm{Tr}\,\Sigma_x + \Sigma_x^2) D^T]$ and
    $\Gamma_W = 4[(\mathrm{Tr}\,\Sigma_\epsilon + \mathrm{Tr}\,D\Sigma_x D^T)\,\Sigma_x + \Sigma_x D^T D\,\Sigma_x]$.

    Args:
        input_cov: Shape (inputs, inputs).
        noise_cov: Shape (outputs, outputs).
        error: D, shape (outputs, inputs); zero (the minimum) by default. At the minimum inputs need not be Gaussian.

    Returns:
        Both factors, per example: shapes (outputs, outputs) and (inputs, inputs).
    """
    trace_x, trace_e = input_cov.trace(), noise_cov.trace()
    u, w = trace_x * noise_cov, trace_e * input_cov
    if error is not None:
        spread = error @ input_cov @ error.mT
        u = u + trace_x * spread + error @ input_cov @ input_cov @ error.mT
        w = w + spread.trace() * input_cov + input_cov @ error.mT @ error @ input_cov
    return NoiseFactors(4 * u, 4 * w)


def two_layer_noise(weights: TwoLayer, factors: NoiseFactors) -> Grams:
    r"""The noise that moves the charge $C = W W^T - U^T U$, shape (hidden, hidden) on each side.

    Returns:
        $N_+ = U^T \Gamma_U U$ and $N_- = W \Gamma_W W^T$.
    """
    return Grams(weights.u.mT @ factors.u @ weights.u, weights.w @ factors.w @ weights.w.mT)


def two_layer_equilibrium(target: Tensor, input_cov: Tensor, noise_cov: Tensor, hidden: int) -> TwoLayer:
    r"""The noise equilibrium at the minimum UW = V without weight decay, in closed form.

    With $\Sigma_\epsilon^{1/2} V \Sigma_x^{1/2} = L S R^T$ and
    $c^4 = \mathrm{Tr}\,\Sigma_x / \mathrm{Tr}\,\Sigma_\epsilon$: $W = c\,S^{1/2} R^T \Sigma_x^{-1/2}$ and
    $U = \Sigma_\epsilon^{-1/2} L S^{1/2} / c$, up to a rotation of the hidden units.

    Args:
        target: V, shape (outputs, inputs), of rank at most `hidden`.
        input_cov: Positive definite, shape (inputs, inputs).
        noise_cov: Positive definite, shape (outputs, outputs).
        hidden: Number of hidden units; those beyond the rank of V get weight zero.

    Returns:
        The weights of both layers.

    Raises:
        ParameterShapeError: If the rank of V exceeds the number of hidden units, so that UW = V has no solution.
    """
    root_x, root_e = (_spd.apply_spectral(torch.sqrt, cov) for cov in (input_cov, noise_cov))
    left, values, right = torch.linalg.svd(root_e @ target @ root_x, full_matrices=False)
    rank = int((values > 1e-12 * values[0]).sum())
    if rank > hidden:
        raise ParameterShapeError(
            f"the target has rank {rank}, more than the {hidden} hidden units: UW = V has no solution"
        )
    root = values[:rank].sqrt()
    scale = (input_cov.trace() / noise_cov.trace()) ** 0.25
    u = torch.linalg.solve(root_e, left[:, :rank] * root) / scale
    w = scale * torch.linalg.solve(root_x, (root[:, None] * right[:rank]).mT).mT
    pad = (0, hidden - rank)
    return TwoLayer(torch.nn.functional.pad(u, pad), torch.nn.functional.pad(w.mT, pad).mT)


def two_layer_sharpness(weights: TwoLayer, input_cov: Tensor) -> Tensor:
    r"""The trace of the Hessian of the mean loss, everywhere, not only at the minimum.

    $S = 2\,(d_y\,\mathrm{Tr}[W \Sigma_x W^T] + |U|^2\,\mathrm{Tr}\,\Sigma_x)$ with $d_y$ outputs.

    Args:
        weights: U of shape (outputs, hidden), W of shape (hidden, inputs).
        input_cov: Shape (inputs, inputs).

    Returns:
        S, shape ().
    """
    u, w = weights
    return 2 * (len(u) * (w @ input_cov @ w.mT).trace() + u.square().sum() * input_cov.trace())


def two_layer_relaxation(weights: TwoLayer, factors: NoiseFactors, sgd: SGD) -> Tensor:
    r"""Steps of SGD in which the slowest departure from the noise equilibrium shrinks by e, without weight decay.

    Departures of the charge decay at the rates of the pencil $(P + R,\; W W^T + U^T U)$ with $P = R = 2\sigma^2 N$. For
    one hidden unit the rate per step is $2\,\mathrm{lr}^2 N / (S K)$, $N = U^T \Gamma_U U$, $K = |U|^2 + |W|^2$.

    Args:
        weights: The equilibrium, with independent hidden units.
        factors: The noise there.
        sgd: The settings of the optimizer.

    Returns:
        The number of steps, shape ().
    """
    push, pull = two_layer_noise(weights, factors)
    squares = weights.w @ weights.w.mT + weights.u.mT @ weights.u
    slowest = _spd.pencil(2 * sgd.temperature * (push + pull), squares)[0]
    return 1 / (slowest * sgd.effective_lr)


def deep_equilibrium(target: Tensor, input_cov: Tensor, noise_cov: Tensor, depth: int) -> list[Tensor]:
    r"""The noise equilibrium of a deep linear network $W_D \cdots W_1 = V$, without weight decay, at the minimum.

    With $\Sigma_\epsilon^{1/2} V \Sigma_x^{1/2} = L S R^T$:
    $W_1 = c_1 S^{1/2} R^T \Sigma_x^{-1/2}$, $W_i = k\,1$ in the middle, and
    $W_D = \Sigma_\epsilon^{-1/2} L S^{1/2} / c_{D-1}$, up to a rotation of every hidden layer, where
    $k^{2D} = (\mathrm{Tr}\,S)^2 / (\mathrm{Tr}\,\Sigma_x\,\mathrm{Tr}\,\Sigma_\epsilon)$,
    $c_1^2 = k^2\,\mathrm{Tr}\,\Sigma_x / \mathrm{Tr}\,S$ and $c_i = c_1 k^{i-1}$.

    Args:
        target: V, shape (outputs, inputs).
        input_cov: Positive definite, shape (inputs, inputs).
        noise_cov: Positive definite, shape (outputs, outputs).
        depth: D, the number of layers, at least 2.

    Returns:
        $W_1, \dots, W_D$; hidden layers are as wide as the rank of V.

    Raises:
        ParameterShapeError: If the depth is less than 2.
    """
    if depth < 2:
        raise ParameterShapeError(f"a deep network has at least 2 layers, got depth {depth}")
    root_x, root_e = (_spd.apply_spectral(torch.sqrt, cov) for cov in (input_cov, noise_cov))
    left, values, right = torch.linalg.svd(root_e @ target @ root_x, full_matrices=False)
    rank = int((values > 1e-12 * values[0]).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    total, trace_x, trace_e = values.sum(), input_cov.trace(), noise_cov.trace()
    middle = (total.square() / (trace_x * trace_e)) ** (1 / (2 * depth))
    first = middle * (trace_x / total).sqrt()
    root = values.sqrt()
    inner = first * torch.linalg.solve(root_x, (root[:, None] * right).mT).mT
    outer = torch.linalg.solve(root_e, left * root) / (first * middle ** (depth - 2))
    between = [middle * torch.eye(rank, dtype=values.dtype) for _ in range(depth - 2)]
    return [inner, *between, outer]


def deep_noise(weights: Sequence[Tensor], input_cov: Tensor, noise_cov: Tensor) -> list[Grams]:
    r"""The noise that moves each charge $C_i = W_i W_i^T - W_{i+1}^T W_{i+1}$ of a deep linear network, at the minimum.

    With $A_i = W_D \cdots W_{i+1}$ and $B_i = W_i \cdots W_1$:
    $N_+ = 4\,A_i^T \Sigma_\epsilon A_i\,\mathrm{Tr}[B_{i-1} \Sigma_x B_{i-1}^T]$ and
    $N_- = 4\,B_i \Sigma_x B_i^T\,\mathrm{Tr}[A_{i+1}^T \Sigma_\epsilon A_{i+1}]$.

    Args:
        weights: $W_1, \dots, W_D$.
        input_cov: Shape (inputs, inputs).
        noise_cov: Shape (outputs, outputs).

    Returns:
        Both sides for i = 1, ..., D - 1.
    """
    below = [input_cov]
    for weight in weights:
        below.append(weight @ below[-1] @ weight.mT)
    above = [noise_cov]
    for weight in reversed(weights):
        above.append(weight.mT @ above[-1] @ weight)
    above.reverse()  # above[i] = A_i' Se A_i, below[i] = B_i Sx B_i'
    return [
        Grams(4 * above[i] * below[i - 1].trace(), 4 * below[i] * above[i + 1].trace()) for i in range(1, len(weights))
    ]

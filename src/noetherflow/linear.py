r"""Linear networks in closed form: gradient noise, noise equilibrium, sharpness and relaxation time.

The loss of an example is $\ell = |U W x - y|^2$ with $y = V x + \epsilon$: a first layer W of shape (hidden, inputs), a
second layer U of shape (outputs, hidden), a target V of shape (outputs, inputs). `input_cov` is $\Sigma_x$, the
covariance of x; `noise_cov` is $\Sigma_\epsilon$, the covariance of the label noise $\epsilon$. Tensors are float64 or
float32; results have the dtype of the arguments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._errors import ParameterShapeError
from noetherflow.optimizers import SGD
from noetherflow.symmetry import Grams


class NoiseFactors(NamedTuple):
    r"""The gradient noise of the product UW, summed over its columns or its rows.

    With $G = \partial\ell/\partial(UW)$ for an example:

    $$\Gamma_U = E[G G^T] - E[G] E[G]^T , \qquad \Gamma_W = E[G^T G] - E[G]^T E[G]$$

    Attributes:
        u: $\Gamma_U$, shape (outputs, outputs).
        w: $\Gamma_W$, shape (inputs, inputs).
    """

    u: Tensor
    w: Tensor


class TwoLayer(NamedTuple):
    """The weights of a two-layer linear network x -> U W x.

    Attributes:
        u: U, the weights of the second layer, shape (outputs, hidden).
        w: W, the weights of the first layer, shape (hidden, inputs).
    """

    u: Tensor
    w: Tensor


def noise_factors(input_cov: Tensor, noise_cov: Tensor, error: Tensor | None = None) -> NoiseFactors:
    r"""The gradient noise of the product UW, from the covariances of inputs and label noise.

    With $D = UW - V$ and Gaussian inputs:

    $$\Gamma_U = 4\,[\mathrm{Tr}\,\Sigma_x\,\Sigma_\epsilon + D(\Sigma_x\,\mathrm{Tr}\,\Sigma_x + \Sigma_x^2) D^T]$$

    $$\Gamma_W = 4\,[(\mathrm{Tr}\,\Sigma_\epsilon + \mathrm{Tr}\,D\Sigma_x D^T)\,\Sigma_x + \Sigma_x D^T D\,\Sigma_x]$$

    Args:
        input_cov: $\Sigma_x$, shape (inputs, inputs), units of x squared.
        noise_cov: $\Sigma_\epsilon$, shape (outputs, outputs), units of y squared.
        error: D, shape (outputs, inputs). None is D = 0, the minimum, where x may have any distribution of mean zero.

    Returns:
        $\Gamma_U$ and $\Gamma_W$ of a single example (batch size 1), shapes (outputs, outputs) and (inputs, inputs).

    Examples:
        >>> import torch, noetherflow as nf
        >>> factors = nf.linear.noise_factors(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(1))
        >>> factors.u, factors.w  # 4 Tr[Sx] Se and 4 Tr[Se] Sx
        (tensor([[12.]]), tensor([[4., 0.],
                [0., 8.]]))

    Source: Ziyin et al. (2024), matrix factorisation; the terms in D follow from the fourth moments of a Gaussian.
    """
    trace_x, trace_e = input_cov.trace(), noise_cov.trace()
    u, w = trace_x * noise_cov, trace_e * input_cov
    if error is not None:
        spread = error @ input_cov @ error.mT
        u = u + trace_x * spread + error @ input_cov @ input_cov @ error.mT
        w = w + spread.trace() * input_cov + input_cov @ error.mT @ error @ input_cov
    return NoiseFactors(4 * u, 4 * w)


def two_layer_noise(weights: TwoLayer, factors: NoiseFactors) -> Grams:
    r"""The gradient noise that changes the charge of a two-layer linear network.

    Without weight decay the charge $C = W W^T - U^T U$ changes by

    $$\frac{dC}{dt} = 2\sigma^2 (N_+ - N_-) , \qquad N_+ = U^T \Gamma_U U , \quad N_- = W \Gamma_W W^T .$$

    Args:
        weights: U and W, of hidden width `hidden`.
        factors: $\Gamma_U$ and $\Gamma_W$, from `noise_factors`.

    Returns:
        `plus` $= N_+$ and `minus` $= N_-$ of a single example, shape (hidden, hidden) each.

    Examples:
        >>> import torch, noetherflow as nf
        >>> weights = nf.linear.TwoLayer(u=torch.tensor([[2.0]]), w=torch.tensor([[1.0, 0.0]]))
        >>> factors = nf.linear.noise_factors(torch.eye(2), torch.eye(1))
        >>> nf.linear.two_layer_noise(weights, factors)
        Grams(plus=tensor([[32.]]), minus=tensor([[4.]]))

    Source: Ziyin et al. (2024), matrix factorisation.
    """
    return Grams(weights.u.mT @ factors.u @ weights.u, weights.w @ factors.w @ weights.w.mT)


def two_layer_equilibrium(target: Tensor, input_cov: Tensor, noise_cov: Tensor, hidden: int) -> TwoLayer:
    r"""The weights to which SGD takes a two-layer linear network: UW = V with equal noise in both layers.

    The noise equilibrium without weight decay satisfies UW = V and $N_+ = N_-$. With
    $\Sigma_\epsilon^{1/2} V \Sigma_x^{1/2} = L S R^T$ (singular value decomposition) and
    $c = (\mathrm{Tr}\,\Sigma_x / \mathrm{Tr}\,\Sigma_\epsilon)^{1/4}$:

    $$W = c\,S^{1/2} R^T \Sigma_x^{-1/2} , \qquad U = \Sigma_\epsilon^{-1/2} L S^{1/2} / c$$

    A rotation O of the hidden units gives further solutions $(U O^T, O W)$.

    Args:
        target: V, shape (outputs, inputs), of rank at most `hidden`.
        input_cov: $\Sigma_x$, positive definite, shape (inputs, inputs).
        noise_cov: $\Sigma_\epsilon$, positive definite, shape (outputs, outputs).
        hidden: Number of hidden units. Hidden units beyond the rank of V have weight zero.

    Returns:
        U of shape (outputs, hidden) and W of shape (hidden, inputs).

    Raises:
        ParameterShapeError: If the rank of V exceeds the number of hidden units, so that UW = V has no solution.

    Examples:
        >>> import torch, noetherflow as nf
        >>> target = torch.tensor([[2.0, 0.0]])
        >>> weights = nf.linear.two_layer_equilibrium(target, torch.eye(2), torch.eye(1), hidden=1)
        >>> torch.allclose(weights.u @ weights.w, target)
        True
        >>> round((weights.w.square().sum() / weights.u.square().sum()).item(), 3)  # Tr Sx / Tr Se, not 1
        2.0

    Source: Ziyin et al. (2024), the noise equilibrium of matrix factorisation.
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
    r"""The sharpness of a two-layer linear network: the trace of the Hessian of the mean loss.

    $$\mathrm{Tr}\,H = 2\,(d_y\,\mathrm{Tr}[W \Sigma_x W^T] + |U|^2\,\mathrm{Tr}\,\Sigma_x)$$

    with $d_y$ outputs. The formula holds at every point, since the mixed derivatives do not enter the trace.

    Args:
        weights: U of shape (outputs, hidden), W of shape (hidden, inputs).
        input_cov: $\Sigma_x$, shape (inputs, inputs).

    Returns:
        Tr H, shape ().

    Examples:
        >>> import torch, noetherflow as nf
        >>> weights = nf.linear.TwoLayer(u=torch.tensor([[2.0]]), w=torch.tensor([[1.0, 0.0]]))
        >>> nf.linear.two_layer_sharpness(weights, torch.eye(2))  # 2 (1 * 1 + 4 * 2)
        tensor(18.)

    Source: Ziyin et al. (2024), sharpness of matrix factorisation.
    """
    u, w = weights
    return 2 * (len(u) * (w @ input_cov @ w.mT).trace() + u.square().sum() * input_cov.trace())


def two_layer_relaxation(weights: TwoLayer, factors: NoiseFactors, sgd: SGD) -> Tensor:
    r"""The number of SGD steps in which the distance of the charge from the noise equilibrium shrinks by a factor e.

    Without weight decay, deviations of the charge decay at the generalised eigenvalues of
    $(P + R,\; W W^T + U^T U)$, where $P = R = 2\sigma^2 N$ and $N = N_+ = N_-$. The result belongs to the smallest
    eigenvalue. With a single hidden unit the rate per step is $2\,\mathrm{lr}^2 N / (S K)$, $K = |U|^2 + |W|^2$.

    Args:
        weights: U and W at the equilibrium; $W W^T + U^T U$ must be positive definite.
        factors: $\Gamma_U$ and $\Gamma_W$ at the equilibrium.
        sgd: The settings of the optimizer: learning rate, batch size, momentum.

    Returns:
        The number of steps, shape ().

    Examples:
        >>> import torch, noetherflow as nf
        >>> target, input_cov, noise_cov = torch.ones(1, 1), torch.eye(1), torch.eye(1)
        >>> weights = nf.linear.two_layer_equilibrium(target, input_cov, noise_cov, hidden=1)
        >>> factors = nf.linear.noise_factors(input_cov, noise_cov)
        >>> nf.linear.two_layer_relaxation(weights, factors, nf.SGD(lr=0.1, batch_size=4))  # S K / (2 lr^2 N)
        tensor(100.0000)

    Source: Ziyin et al. (2024), the Noether flow, linearised at its fixed point.
    """
    push, pull = two_layer_noise(weights, factors)
    squares = weights.w @ weights.w.mT + weights.u.mT @ weights.u
    slowest = _spd.pencil(2 * sgd.temperature * (push + pull), squares)[0]
    return 1 / (slowest * sgd.effective_lr)


def deep_equilibrium(target: Tensor, input_cov: Tensor, noise_cov: Tensor, depth: int) -> list[Tensor]:
    r"""The weights to which SGD takes a deep linear network: the product is V, and adjacent layers have equal noise.

    The noise equilibrium of $W_D \cdots W_1 = V$ without weight decay is, with
    $\Sigma_\epsilon^{1/2} V \Sigma_x^{1/2} = L S R^T$ (singular value decomposition):

    $$W_1 = c_1 S^{1/2} R^T \Sigma_x^{-1/2} , \qquad W_i = k\,1 \;\; (1 < i < D) , \qquad
    W_D = \Sigma_\epsilon^{-1/2} L S^{1/2} / c_{D-1}$$

    where $k^{2D} = (\mathrm{Tr}\,S)^2 / (\mathrm{Tr}\,\Sigma_x\,\mathrm{Tr}\,\Sigma_\epsilon)$,
    $c_1^2 = k^2\,\mathrm{Tr}\,\Sigma_x / \mathrm{Tr}\,S$ and $c_i = c_1 k^{i-1}$. Rotations of the hidden layers give
    further solutions.

    Args:
        target: V, shape (outputs, inputs).
        input_cov: $\Sigma_x$, positive definite, shape (inputs, inputs).
        noise_cov: $\Sigma_\epsilon$, positive definite, shape (outputs, outputs).
        depth: D, the number of layers, at least 2.

    Returns:
        $W_1, \dots, W_D$ of shapes (rank, inputs), (rank, rank), ..., (outputs, rank), where rank is the rank of V.

    Raises:
        ParameterShapeError: If the depth is less than 2.

    Examples:
        >>> import torch, noetherflow as nf
        >>> weights = nf.linear.deep_equilibrium(torch.tensor([[8.0]]), torch.eye(1), torch.eye(1), depth=3)
        >>> [round(weight.item(), 3) for weight in weights]
        [2.0, 2.0, 2.0]

    Source: Ziyin et al. (2024), deep linear networks.
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
    r"""The gradient noise that changes each charge of a deep linear network at its minimum.

    Adjacent layers have the charge $C_i = W_i W_i^T - W_{i+1}^T W_{i+1}$. With $A_i = W_D \cdots W_{i+1}$, $A_D = 1$,
    $B_i = W_i \cdots W_1$ and $B_0 = 1$, the noise of $W_i$ and that of $W_{i+1}$ are

    $$N_+ = 4\,A_i^T \Sigma_\epsilon A_i\,\mathrm{Tr}[B_{i-1} \Sigma_x B_{i-1}^T] , \qquad
    N_- = 4\,B_i \Sigma_x B_i^T\,\mathrm{Tr}[A_{i+1}^T \Sigma_\epsilon A_{i+1}] .$$

    Args:
        weights: $W_1, \dots, W_D$, with $W_D \cdots W_1 = V$: the residual is the label noise alone.
        input_cov: $\Sigma_x$, shape (inputs, inputs).
        noise_cov: $\Sigma_\epsilon$, shape (outputs, outputs).

    Returns:
        For i = 1, ..., D - 1: `plus` $= N_+$ and `minus` $= N_-$ of a single example, shape (width_i, width_i) each.

    Examples:
        >>> import torch, noetherflow as nf
        >>> cov = torch.eye(1)
        >>> weights = nf.linear.deep_equilibrium(torch.tensor([[8.0]]), cov, cov, depth=3)
        >>> [[round(side.item(), 2) for side in sides] for sides in nf.linear.deep_noise(weights, cov, cov)]
        [[64.0, 64.0], [64.0, 64.0]]

    Source: Ziyin et al. (2024), deep linear networks.
    """
    below = [input_cov]
    for weight in weights:
        below.append(weight @ below[-1] @ weight.mT)
    above = [noise_cov]
    for weight in reversed(weights):
        above.append(weight.mT @ above[-1] @ weight)
    above.reverse()  # above[i] = A_i^T Se A_i, below[i] = B_i Sx B_i^T
    return [
        Grams(4 * above[i] * below[i - 1].trace(), 4 * below[i] * above[i + 1].trace()) for i in range(1, len(weights))
    ]

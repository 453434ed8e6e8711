r"""F9: the averaged drift of SGD along the set of minima UW = V of two linear layers.

The fluctuation of SGD around the minima has the covariance X with $HX + XH = 2\sigma^2\Sigma$. Averaged over the
fluctuation, SGD drifts along the minima with the velocity $v = -\tfrac12 P\,\nabla\,\mathrm{Tr}[H X]$, where P is the
orthogonal projection on the kernel of H.

Source: Li, Wang, Arora (2022), *What happens after SGD reaches zero loss?*
"""

import torch
from torch import Tensor
from torch.func import grad, jacrev

from noetherflow.linear import TwoLayer
from noetherflow.paper.linear_pair import World


def grams(weights: TwoLayer) -> Tensor:
    r"""$W^T W$ and $U U^T$, which no rotation of the hidden units changes, as a vector.

    Args:
        weights: U of shape (..., outputs, hidden), W of shape (..., hidden, inputs).

    Returns:
        Shape (..., inputs^2 + outputs^2).
    """
    inner, outer = weights.w.mT @ weights.w, weights.u @ weights.u.mT
    return torch.cat([inner.flatten(-2), outer.flatten(-2)], dim=-1)


def valley_flow(world: World, start: TwoLayer, steps: int) -> tuple[TwoLayer, Tensor]:
    """Follow the averaged drift along the minima UW = V.

    Args:
        world: The data distribution.
        start: A point with U W = V.
        steps: Number of Euler steps. A step takes a tenth of the time scale that `valley_drift` returns.

    Returns:
        The last point, and `grams` of every point, shape (steps + 1, n).
    """
    theta, shapes = torch.cat([start.u.reshape(-1), start.w.reshape(-1)]), (start.u.shape, start.w.shape)
    path = [grams(start)]
    for _ in range(steps):
        drift, rate = valley_drift(world, theta, shapes)
        theta = _back_to_valley(world, theta + 0.1 / rate * drift, shapes)
        path.append(grams(_split(theta, shapes)))
    return _split(theta, shapes), torch.stack(path)


def valley_drift(world: World, theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> tuple[Tensor, float]:
    r"""The averaged velocity along the minima for $2\sigma^2 = 1$, and the rate $\mathrm{Tr}\,\Sigma / |\theta|^2$.

    Args:
        world: The data distribution.
        theta: U and W, flattened and concatenated, with U W = V. Shape (parameters,).
        shapes: Shapes of U and of W.

    Returns:
        $-\tfrac12 P\,\nabla \mathrm{Tr}[H X]$ of the shape of theta, with $HX + XH = \Sigma$; and the rate, the inverse
        of the time scale on which the velocity changes.
    """
    covariance = world.input_cov

    def mean_loss(theta: Tensor) -> Tensor:
        u, w = _split(theta, shapes)
        error = u @ w - world.target
        return (error @ covariance @ error.mT).trace()

    hessian_of = jacrev(jacrev(mean_loss))
    normals = _normals(theta, shapes)
    hessian = 2 * normals @ torch.kron(torch.eye(len(world.target), dtype=theta.dtype), covariance) @ normals.mT
    noise = 4 * normals @ torch.kron(world.noise_cov, covariance) @ normals.mT
    values, vectors = torch.linalg.eigh(hessian)
    fast = values > 1e-9 * values[-1]
    pairs = values[:, None] + values
    inner = torch.where(fast[:, None] & fast, vectors.mT @ noise @ vectors / pairs, 0.0)
    spread = vectors @ inner @ vectors.mT
    slope = grad(lambda point: (hessian_of(point) * spread).sum())(theta)
    kernel = vectors[:, ~fast]
    return -0.5 * kernel @ (kernel.mT @ slope), (noise.trace() / theta.square().sum()).item()


def _normals(theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
    """The gradients of all entries of U W, as columns: shape (parameters, entries)."""

    def product(theta: Tensor) -> Tensor:
        u, w = _split(theta, shapes)
        return (u @ w).reshape(-1)

    jacobian: Tensor = jacrev(product)(theta)
    return jacobian.mT


def _back_to_valley(world: World, theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
    """Project a point on the minima UW = V by four Gauss-Newton steps."""
    for _ in range(4):
        u, w = _split(theta, shapes)
        normals = _normals(theta, shapes)
        theta = theta - torch.linalg.pinv(normals.mT) @ (u @ w - world.target).reshape(-1)
    return theta


def _split(theta: Tensor, shapes: tuple[torch.Size, torch.Size]) -> TwoLayer:
    """U and W from the flattened parameters."""
    u, w = theta.split([shape.numel() for shape in shapes])
    return TwoLayer(u.reshape(shapes[0]), w.reshape(shapes[1]))

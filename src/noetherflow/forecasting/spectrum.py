r"""The largest eigenvalue of the Hessian, and the largest steps that are stable along its eigenvector."""

import math
from collections.abc import Callable
from typing import NamedTuple, final

import numpy
import scipy.sparse.linalg
import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.forecasting.estimate import NEVER_UNSTABLE, Estimate, unknown
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.forecasting.metric import Metric, memory_of, share_of
from noetherflow.optimizers import AdamW, Optimizer

# Relative accuracy of the eigenvalue, and restarts of Lanczos' method.
_TOLERANCE = 1e-5
_RESTARTS = 40
# Up to this dimension the matrix is formed.
_DENSE = 24


@final
class Top(NamedTuple):
    """The largest eigenvalue and its eigenvector, in the metric of an optimizer."""

    value: Estimate
    vector: dict[str, Tensor]


def largest(
    mean_loss: MeanLoss, params: Params, metric: Metric | None, seed: int, *, tolerance: float = _TOLERANCE
) -> Top:
    r"""The largest eigenvalue of $m^{1/2} H m^{1/2}$ by Lanczos' method; without a metric that of H.

    Args:
        mean_loss: The mean loss.
        params: The parameters.
        metric: The metric, or None.
        seed: Of the first vector.
        tolerance: The relative accuracy.

    Returns:
        The eigenvalue; `error` is the norm of the residual, within which an eigenvalue lies; `sampling` is the error
        for another sample of the data, by first-order perturbation. And the eigenvector, of norm 1.

    Raises:
        NoDoubleBackwardError: If an operation has no second derivative.
    """
    shapes = {name: tensor.shape for name, tensor in mean_loss.params.items()}
    size = sum(tensor.numel() for tensor in mean_loss.params.values())

    def scaled(vector: Params) -> dict[str, Tensor]:
        return dict(vector) if metric is None else metric.scaled(vector)

    def times(flat: numpy.ndarray) -> numpy.ndarray:
        vector = _split(torch.from_numpy(numpy.array(flat, dtype=float).ravel()), shapes, mean_loss)
        return _flat(scaled(mean_loss.hessian_times(params, scaled(vector)))).numpy()

    value, flat, why = _eigenpair(times, size, seed, tolerance)
    vector = _split(flat, shapes, mean_loss)
    if why:
        return Top(unknown(why), vector)
    residual = torch.from_numpy(times(flat.numpy())) - value * flat
    by_batch = [_dot(vector, scaled(product)) for product in _by_batch(mean_loss, params, scaled(vector))]
    return Top(Estimate(value, float(residual.norm()), _sampling(torch.tensor(by_batch), mean_loss.weights)), vector)


def stable_steps(
    mean_loss: MeanLoss, params: Params, metric: Metric, top: Top, settings: Optimizer
) -> tuple[Estimate, Estimate]:
    r"""The largest stable learning rate, without and with the noise of minibatches.

    Along the eigenvector u of the largest eigenvalue $\lambda$, gradient descent with momentum $\mu$ is stable for
    $\mathrm{lr} < 2(1+\mu)/\lambda$. With minibatches, the mean square of a displacement along u shrinks in a step if

    $$\mathrm{lr} < 2 \Big/ \left(\frac{\lambda}{1+\mu} + \frac{f\,V}{S\,\lambda\,(1-\mu)}\right), \qquad
    V = E|H_i u|^2 - |H u|^2 ,$$

    with the Hessian $H_i$ of an example: exact for a step of plain SGD, and an interpolation between both limits with
    momentum. For AdamW everything is in the metric of the optimizer, with v held, and its average of gradients makes
    the step larger by $1/(1-\beta_1)$.

    Returns:
        Both learning rates.
    """
    if not top.value.known:
        return top.value, top.value
    level = top.value.value
    if level <= 0:
        none = unknown(NEVER_UNSTABLE)
        return none, none
    memory = memory_of(settings, mean_loss.names)
    gain = 1 / (1 - memory) if isinstance(settings, AdamW) else 1.0
    quiet = top.value.over(2 * (1 + memory) * gain)
    if len(mean_loss.batches) < 2:
        return quiet, unknown("the noise of the Hessian needs two batches or more")
    products = [metric.scaled(p) for p in _by_batch(mean_loss, params, metric.scaled(top.vector))]
    weights, sizes = mean_loss.weights.tolist(), mean_loss.sizes.tolist()
    mean = {n: sum(w * p[n] for w, p in zip(weights, products, strict=True)) for n in products[0]}
    squares = [
        size * sum(float((part - mean[name]).double().square().sum()) for name, part in product.items())
        for size, product in zip(sizes, products, strict=True)
    ]
    count = len(squares)
    variance = sum(squares) / (count - 1)
    error = count / (count - 1) * float(torch.tensor(squares, dtype=torch.float64).std()) / count**0.5
    share = share_of(mean_loss, settings)
    noisy = share / (level * (1 - memory))
    total = level / (1 + memory) + noisy * variance
    inverse = Estimate(
        total,
        top.value.error * abs(1 / (1 + memory) - noisy * variance / level),
        math.hypot(top.value.sampling * abs(1 / (1 + memory) - noisy * variance / level), noisy * error),
    )
    return quiet, inverse.over(2 * gain)


def _by_batch(mean_loss: MeanLoss, params: Params, vector: Params) -> list[dict[str, Tensor]]:
    """The products of the Hessian of each batch with a vector."""
    return [mean_loss.multiply(params, k, [vector])[0] for k in range(len(mean_loss.batches))]


def _eigenpair(
    times: Callable[[numpy.ndarray], numpy.ndarray], size: int, seed: int, tolerance: float
) -> tuple[float, Tensor, str]:
    """The largest eigenvalue and its eigenvector, and why there is none."""
    if size <= _DENSE:
        matrix = numpy.stack([times(row) for row in numpy.eye(size)])
        values, vectors = torch.linalg.eigh(torch.from_numpy((matrix + matrix.T) / 2))
        return float(values[-1]), vectors[:, -1].contiguous(), ""
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=times, dtype=float)
    start = numpy.random.default_rng(seed).standard_normal(size)
    if not numpy.any(times(start)):
        return 0.0, torch.from_numpy(start / numpy.linalg.norm(start)), ""
    try:
        values, vectors = scipy.sparse.linalg.eigsh(operator, 1, which="LA", v0=start, tol=tolerance, maxiter=_RESTARTS)
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        return math.nan, torch.from_numpy(start), f"Lanczos' method did not converge ({error})"
    return float(values[0]), torch.from_numpy(vectors[:, 0].copy()), ""


def _split(flat: Tensor, shapes: dict[str, torch.Size], mean_loss: MeanLoss) -> dict[str, Tensor]:
    """A vector as tensors by name."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    like = mean_loss.params
    return {
        name: part.reshape(shape).to(like[name].device, like[name].dtype)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _flat(vector: Params) -> Tensor:
    return torch.cat([part.detach().double().cpu().flatten() for part in vector.values()])


def _dot(first: Params, second: Params) -> float:
    return sum(float((part.double() * second[name].double()).sum()) for name, part in first.items())


def _sampling(values: Tensor, weights: Tensor) -> float:
    """The standard error of a mean over batches; NaN for a single batch."""
    count = len(values)
    if count < 2:
        return math.nan
    values = values.double()
    return float(((weights * (values - weights @ values)).square().sum() * count / (count - 1)).sqrt())

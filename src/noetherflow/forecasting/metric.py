r"""The metric of an optimizer: an update is $-\mathrm{lr}\,m_p\,g_p$, with a multiplier m of every entry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.optimizers import SGD, AdamW, Optimizer


@final
@dataclass(frozen=True)
class Metric:
    r"""The multipliers of an optimizer at a point, with the loss and the gradient there.

    Args:
        loss: The mean loss.
        gradient: The gradient of the mean loss.
        multipliers: m by parameter: 1 for SGD, $1 / (\sqrt v + \epsilon)$ for AdamW; with learning rates by parameter
            times the share of the largest learning rate.
        noise: The variance of the gradient of a minibatch, summed over all entries; NaN from a single batch.
    """

    loss: float
    gradient: dict[str, Tensor]
    multipliers: dict[str, Tensor]
    noise: float

    @property
    def direction(self) -> dict[str, Tensor]:
        """The update of a step of size 1, with the sign changed."""
        return {name: self.multipliers[name] * g for name, g in self.gradient.items()}

    def scaled(self, vector: Params) -> dict[str, Tensor]:
        """A vector times the square roots of the multipliers."""
        return {name: self.multipliers[name].sqrt() * part for name, part in vector.items()}


def metric_at(mean_loss: MeanLoss, params: Params, settings: Optimizer, kept: Params | None = None) -> Metric:
    r"""The metric of an optimizer at given parameters.

    For AdamW, v is the second moment of the gradient of a minibatch, $E\,g_S^2 = g^2 + \mathrm{Var}\,g_S$. The variance
    is that between the batches of the data, scaled to the batch size of the optimizer.

    Args:
        mean_loss: The mean loss.
        params: The parameters.
        settings: The settings of the optimizer.
        kept: v of a run, by parameter, in place of v from the gradients of the batches, which a parameter has that is
            not among these.

    Returns:
        The metric.
    """
    parts = mean_loss.gradients(params)
    weights = mean_loss.weights.tolist()
    loss = sum(weight * value for weight, (value, _) in zip(weights, parts, strict=True))
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    share = share_of(mean_loss, settings)
    for name in mean_loss.names:
        stack = [g[name] for _, g in parts]
        mean[name] = sum((w * g for w, g in zip(weights, stack, strict=True)), torch.zeros_like(stack[0]))
        squares = sum(
            (size * (g - mean[name]).square() for size, g in zip(mean_loss.sizes.tolist(), stack, strict=True)),
            torch.zeros_like(stack[0]),
        )
        variance[name] = share * squares / max(1, len(stack) - 1)
    noise = sum(float(v.double().sum()) for v in variance.values()) if len(parts) > 1 else float("nan")
    largest = reference_lr(settings, mean_loss.names)
    multipliers = {}
    for name in mean_loss.names:
        relative = lr_of(settings, name) / largest
        if isinstance(settings, AdamW):
            v = mean[name].square() + variance[name]
            if kept is not None and name in kept:
                v = kept[name].to(v.device, v.dtype)
            root = v.sqrt() + settings.eps
            # An entry that never has a gradient does not move.
            multipliers[name] = torch.where(root > 0, relative / root, 0.0)
        else:
            multipliers[name] = torch.full_like(mean[name], relative)
    return Metric(loss, mean, multipliers, noise)


def share_of(mean_loss: MeanLoss, settings: Optimizer) -> float:
    """The variance of a minibatch gradient over that of an example; of a batch of the data if the size is unknown."""
    return settings.share if settings.share is not None else 1 / float(mean_loss.sizes.mean())


def lr_of(settings: Optimizer, name: str) -> float:
    """The learning rate of a parameter, without momentum."""
    if isinstance(settings, AdamW):
        return settings.lr_of(name)
    if isinstance(settings, SGD):
        return settings.step_of(name) * (1 - settings.momentum)
    raise SettingsError(f"a forecast is for nf.SGD and nf.AdamW, got nf.{type(settings).__name__}")


def shrinkage(settings: Optimizer, name: str) -> float:
    """The share of the squared norm of a parameter that weight decay removes in a step."""
    if isinstance(settings, SGD):
        return 4 * settings.step_of(name) * settings.gamma_of(name)
    assert isinstance(settings, AdamW)
    return 2 * settings.lr_of(name) * settings.decay_of(name)


def reference_lr(settings: Optimizer, names: list[str]) -> float:
    """The largest learning rate of the given parameters: the number that a schedule changes."""
    return max(lr_of(settings, name) for name in names)


def memory_of(settings: Optimizer, names: list[str]) -> float:
    """The momentum of SGD, or the first beta of AdamW, the largest over parameters."""
    if isinstance(settings, SGD):
        return settings.momentum
    assert isinstance(settings, AdamW)
    betas = settings.betas
    return max(settings.betas_of(name)[0] for name in names) if isinstance(betas, Mapping) else betas[0]

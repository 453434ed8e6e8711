"""Noise from the differences between microbatches: for whatever has no gradient of single examples, and for free."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow.noise.asked import Asked, Squares, asked_of
from noetherflow.noise.batches import Pool, along_axes
from noetherflow.noise.collect import squares_of
from noetherflow.noise.exact import resolve
from noetherflow.noise.moments import NoiseMoments
from noetherflow.symmetry import Symmetry


@final
class MicrobatchMeter:
    r"""Measures gradient noise from the microbatches of a step, as gradient accumulation has them.

    With mean gradients $\hat g_j$ of k microbatches of $b_j$ examples and their weighted mean $\bar g$,
    $\hat\Sigma = \frac{1}{k-1}\sum_j b_j (\hat g_j - \bar g)(\hat g_j - \bar g)^T$ is an unbiased estimate of the
    covariance of one example's gradient. It needs no such gradient, so the loss may couple the examples of a
    microbatch: BatchNorm in train mode, contrastive losses. Then it is b times the noise of a microbatch, whatever that
    is made of. Few microbatches make a rough estimate: one step's relative error is about $\sqrt{2 / (k-1)}$ in the
    worst case, and steps are pooled.

    Args:
        model: The model that is trained; on several ranks, what is inside DistributedDataParallel, under `no_sync()`.
        symmetries: What to measure the noise for, by name; they act along axes.
        variances: Measure the variance of every entry of the parameters on which scalings and rescalings act.

    Raises:
        SettingsError: If a symmetry is a `DenseSymmetry`.
        FrozenParameterError: If one acts on parameters that are not trained.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> parts = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(4)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> meter = nf.MicrobatchMeter(net, nf.find_symmetries(net, loss, parts[0]))
        >>> with meter.step() as done:
        ...     for part in parts:
        ...         (loss(net, part).mean() / 4).backward()
        ...         done(size=8, weight=1 / 4)
        >>> meter.noise.count, meter.noise.trace > 0
        (32, tensor(True))

    Source: McCandlish, Kaplan, Amodei et al. (2018) for the idea of comparing batches; the statistics are those of
        Ziyin et al. (2024).
    """

    def __init__(self, model: nn.Module, symmetries: Mapping[str, Symmetry], *, variances: bool = False) -> None:
        resolved, self._aliases = resolve(model, symmetries)
        along = along_axes(resolved)
        self._params = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._asked = asked_of(self._params, along, variances=variances)
        self._pool = Pool(along, self._params)
        self.skipped = 0

    @contextmanager
    def step(self) -> Iterator[Callable[..., None]]:
        """The block of one step: call what it gives after the backward pass of each microbatch.

        Yields:
            A function of `size`, the number of examples of the microbatch, and `weight`, what their mean loss counts in
            the loss that was differentiated: 1 by default, 1 / k if it was divided by the number of microbatches.

        Raises:
            SettingsError: If there were fewer than two microbatches.
        """
        running = _Running(self._params, self._asked)
        yield running.add
        if running.count < 2:
            raise SettingsError(
                f"the noise of a step is the difference between its microbatches, and there were {running.count}: call "
                "what `meter.step()` gives after the backward pass of each, of two or more"
            )
        if not self._pool.add(running.scatter, running.examples, running.count - 1):
            self.skipped += 1

    @property
    def noise(self) -> NoiseMoments:
        """What was measured, pooled over steps. The mean gradient is not kept: its entries are NaN.

        Raises:
            EmptyDataError: If nothing was measured.
        """
        return replace(self._pool.moments(), aliases=self._aliases)


@final
class _Running:
    """The gradients of the microbatches of one step, taken in as they come."""

    def __init__(self, params: Mapping[str, nn.Parameter], asked: Mapping[str, Asked]) -> None:
        self.count = self.examples = 0
        self.scatter: dict[str, Squares] = {}
        self._params, self._asked = params, asked
        self._mean: dict[str, Tensor] = {}
        self._before = {name: one.grad.detach().clone() for name, one in params.items() if one.grad is not None}

    def add(self, *, size: int, weight: float = 1.0) -> None:
        """Take what the last backward pass added to the gradients."""
        if size < 1 or not weight > 0:
            raise SettingsError(f"a microbatch has examples and a weight, got size={size} and weight={weight}")
        share = size / (self.examples + size)
        for name, one in self._params.items():
            now = torch.zeros_like(one) if one.grad is None else one.grad.detach().clone()
            gradient = (now - self._before.get(name, 0.0)) / weight
            self._before[name] = now
            mean = self._mean.setdefault(name, torch.zeros_like(gradient))
            gap = gradient - mean
            mean += share * gap
            squares = squares_of(gap, self._asked[name]).scaled(share * self.examples)
            before = self.scatter.get(name)
            self.scatter[name] = squares if before is None else before.combine(squares, 1.0)
        self.count += 1
        self.examples += size

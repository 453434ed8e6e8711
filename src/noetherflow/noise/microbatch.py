"""Noise from the differences between microbatches or ranks: for whatever has no gradient of single examples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import final

import torch.distributed as dist
from torch import nn

from noetherflow._errors import CoupledExamplesError, SettingsError
from noetherflow._types import Params
from noetherflow.noise.between_ranks import Ranks
from noetherflow.noise.buffers import EACH, OF_SUM, Buffers, ModelLayout
from noetherflow.noise.exact import resolve
from noetherflow.noise.moments import NoiseMoments
from noetherflow.noise.pooling import Pool
from noetherflow.noise.running import Running
from noetherflow.noise.sharded import complete, require_data_parallel
from noetherflow.noise.statistics import requested_of
from noetherflow.noise.step import StepNoise
from noetherflow.symmetry import Symmetry, along_axes


@final
class MicrobatchMeter:
    r"""Measures gradient noise from the microbatches of a step: those of gradient accumulation, of the ranks, or both.

    With mean gradients $\hat g_j$ of k microbatches of $b_j$ examples and their weighted mean $\bar g$,
    $\hat\Sigma = \frac{1}{k-1}\sum_j b_j (\hat g_j - \bar g)(\hat g_j - \bar g)^T$ is an unbiased estimate of the
    covariance of one example's gradient, sizes equal or not. It needs no such gradient, so the loss may couple the
    examples of a microbatch: BatchNorm in train mode, contrastive losses. Then it is b times the noise of a microbatch,
    whatever that is made of. Few microbatches make a rough estimate: one step's relative error is about
    $\sqrt{2 / (k-1)}$ in the worst case, and steps are pooled.

    Gradients are seen on their way into `.grad`: before DistributedDataParallel averages them, and whatever was in
    `.grad` before. So a training loop with several ranks stays as it is, `no_sync()` for accumulation included, and so
    does `.grad`; nothing is registered with DistributedDataParallel, whose communication hooks could not be removed:

    ```python
    meter = nf.MicrobatchMeter(ddp.module, symmetries, group=dist.group.WORLD)
    with meter.step() as done:  # on every rank
        loss(ddp, batch).mean().backward()  # averages .grad, as always
        done(size=len(batch))
    optimizer.step()
    ```

    At the end of such a block the scatter within each rank and that of the ranks' means about the mean of all are added
    up: the numbers are those of one process that had all microbatches, and the same on every rank. A step that
    overflows on one rank is skipped on all. This takes an all-reduce as large as that of the gradients, in pieces of
    some 30 MB, and with `variances` one of their squares in float64: measure every tenth step if that is felt.

    A model that is sharded by `torch.distributed.fsdp.fully_shard` (FSDP2, also over a mesh of copies and shards) is
    given as it is. The gradient of each rank is read where it is complete, before the reduce-scatter; the forward pass
    has to run inside the block. Training does not notice, but the memory does: this meter keeps complete gradients.
    Ranks that share an example (tensor parallelism) are refused.

    With a group on gloo, a rank that does not come to the end of the block is named on rank 0, after the timeout of the
    group at the latest; an NCCL group ends the process after its timeout and names the collective.

    During a step it keeps two copies of the complete gradients, or one while there is one microbatch per rank.

    Args:
        model: The model that is trained: what is inside DistributedDataParallel, or what `fully_shard` gave.
        symmetries: What to measure the noise for, by name; they act along axes.
        variances: Measure the variance of every entry of the parameters on which scalings and rescalings act.
        weighted: Sum the squares also with weights that each step is given, for `observers`.
        group: The ranks between which gradients are compared, each with examples of its own; by default none, every
            process for itself.

    Attributes:
        observers: Functions that are called with the `StepNoise` of every step that is measured.
        skipped: How many steps were left out, because a gradient overflowed.

    Raises:
        SettingsError: If a symmetry is a `DenseSymmetry`, or parameters are sharded otherwise than by data parallelism.
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

    Source: McCandlish, Kaplan, Amodei et al. (2018) for the idea of comparing batches, also those of ranks; the
        statistics are those of Ziyin et al. (2024), merged as by Chan, Golub, LeVeque (1979).
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: Mapping[str, Symmetry],
        *,
        variances: bool = False,
        weighted: bool = False,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        resolved = resolve(model, symmetries)
        along = along_axes(resolved)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        require_data_parallel(model, trained, group)
        self._model, self._params = model, complete(trained)
        requested = requested_of(self._params, along, variances=variances, weighted=weighted)
        self._model_layout = ModelLayout.of(requested, self._params)
        self._pool = Pool(along, self._params)
        device = next(iter(self._params.values())).device
        self._ranks = None if group is None else Ranks(group, self._model_layout, device)
        self.observers: list[Callable[[StepNoise], None]] = []
        self.skipped = 0

    @contextmanager
    def step(self, *, weights: Params | None = None) -> Iterator[Callable[..., None]]:
        """The block of one step: call what it gives after the backward pass of each microbatch.

        If it is called once after several backward passes, all their examples are one microbatch. With a `group`, every
        rank has to go through the block, and leaving it waits for the others.

        Args:
            weights: With `weighted`: of the square of every entry, by parameter; None for a step without.

        Yields:
            A function of `size`, the number of examples of the microbatch, and `weight`, what their mean loss counts in
            the loss that was differentiated: 1 by default, 1 / k if it was divided by the number of microbatches of
            this rank. A loss scale multiplies it; the average that is taken over ranks does not.

        Raises:
            CoupledExamplesError: If a layer normalises over all ranks: their gradients are not independent.
            RankError: If a rank of the group did not come to the end of the block.
            SettingsError: If there were fewer than two microbatches, one without a backward pass, or a gradient that
                was not seen, also on another rank.
        """
        if self._ranks is not None:
            _require_independent(self._model)
        buffers = Buffers.blank(self._model_layout, next(iter(self._params.values())), weights)
        with Running(self._model, self._params, buffers, with_mean=bool(self.observers)) as running:
            yield running.add
            with nullcontext() if self._ranks is None else self._ranks.told():
                running.require_seen()
            if self._ranks is not None:
                running.merge(self._ranks)
            running.square_mean()
            if running.count < 2:
                raise SettingsError(
                    "the noise of a step is the difference between its microbatches, and there were "
                    f"{running.count}: call what `meter.step()` gives after the backward pass of each, of two or more "
                    "(gradient accumulation), or give a `group` of several ranks"
                )
            scatter, freedom = running.buffers.row(EACH), running.count - 1
            if not self._pool.add(scatter, running.examples, freedom):
                self.skipped += 1
                return
            for observer in self.observers:
                mean = running.buffers.row(OF_SUM)
                observer(StepNoise(scatter, 1 / freedom, mean, 1.0, running.examples, bool(buffers.weights)))

    @property
    def noise(self) -> NoiseMoments:
        """What was measured, pooled over steps. The mean gradient is not kept: its entries are NaN.

        Raises:
            EmptyDataError: If nothing was measured.
        """
        return self._pool.moments()


def _require_independent(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and (module.training or module.running_mean is None):
            raise CoupledExamplesError(
                f"{name!r} (SyncBatchNorm) normalises over the examples of all ranks, which couples these: their "
                "gradients are no independent samples. Use BatchNorm, or measure in a process that trains alone, "
                "between its microbatches"
            )

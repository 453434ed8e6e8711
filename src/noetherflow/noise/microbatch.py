"""Noise from the differences between microbatches or ranks: for whatever has no gradient of single examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from noetherflow._errors import CoupledExamplesError, SettingsError
from noetherflow.noise.buffers import EACH, OF_SUM, Buffers, ModelLayout
from noetherflow.noise.exact import resolve
from noetherflow.noise.kernels import accumulator, square
from noetherflow.noise.moments import NoiseMoments
from noetherflow.noise.pooling import Pool
from noetherflow.noise.statistics import requested_of
from noetherflow.noise.step import StepNoise
from noetherflow.symmetry import Symmetry, along_axes

# Numbers that go over the wire at a time.
_BUCKET = 2**23


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

    During a step it keeps two copies of the gradients, or one while there is one microbatch per rank.

    Args:
        model: The model that is trained; on several ranks, what is inside DistributedDataParallel.
        symmetries: What to measure the noise for, by name; they act along axes.
        variances: Measure the variance of every entry of the parameters on which scalings and rescalings act.
        every_entry: Measure the squares of the entries of all parameters in every step, for `observers`.
        group: The ranks between which gradients are compared, each with examples of its own; by default none, every
            process for itself.

    Attributes:
        observers: Functions that are called with the `StepNoise` of every step that is measured.
        skipped: How many steps were left out, because a gradient overflowed.

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

    Source: McCandlish, Kaplan, Amodei et al. (2018) for the idea of comparing batches, also those of ranks; the
        statistics are those of Ziyin et al. (2024), merged as by Chan, Golub, LeVeque (1979).
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: Mapping[str, Symmetry],
        *,
        variances: bool = False,
        every_entry: bool = False,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        resolved = resolve(model, symmetries)
        along = along_axes(resolved)
        self._model, self._group = model, group
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        requested = requested_of(self._params, along, variances=variances, everywhere=every_entry)
        self._model_layout = ModelLayout.of(requested, self._params)
        self._pool = Pool(along, self._params)
        self.observers: list[Callable[[StepNoise], None]] = []
        self.skipped = 0

    @contextmanager
    def step(self) -> Iterator[Callable[..., None]]:
        """The block of one step: call what it gives after the backward pass of each microbatch.

        If it is called once after several backward passes, all their examples are one microbatch. With a `group`, every
        rank has to go through the block, and leaving it waits for the others.

        Yields:
            A function of `size`, the number of examples of the microbatch, and `weight`, what their mean loss counts in
            the loss that was differentiated: 1 by default, 1 / k if it was divided by the number of microbatches of
            this rank. A loss scale multiplies it; the average that is taken over ranks does not.

        Raises:
            CoupledExamplesError: If a layer normalises over all ranks: their gradients are not independent.
            SettingsError: If there were fewer than two microbatches, or one without a backward pass.
        """
        if self._group is not None:
            _require_independent(self._model)
        with _Running(self._params, self._model_layout, with_mean=bool(self.observers)) as running:
            yield running.add
            if self._group is not None:
                running.merge(self._group)
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
                observer(StepNoise(scatter, 1 / freedom, running.buffers.row(OF_SUM), 1.0, running.examples))

    @property
    def noise(self) -> NoiseMoments:
        """What was measured, pooled over steps. The mean gradient is not kept: its entries are NaN.

        Raises:
            EmptyDataError: If nothing was measured.
        """
        return self._pool.moments()


@final
class _Running:
    """The gradients of the microbatches of one step, taken in as they come."""

    def __init__(self, params: Mapping[str, nn.Parameter], model_layout: ModelLayout, *, with_mean: bool) -> None:
        self.count = self.examples = 0
        self._with_mean = with_mean
        # Row OF_SUM holds the squares of the gap between the next microbatch and the mean so far.
        self.buffers = Buffers.blank(model_layout, next(iter(params.values())))
        self._params = params
        self._arrived: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._nodes: list[Node] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "_Running":
        for name, parameter in self._params.items():
            if parameter.requires_grad:
                # Where gradients go into .grad: it exists only as long as somebody holds it.
                node = get_gradient_edge(parameter).node
                self._nodes.append(node)
                self._handles.append(node.register_prehook(partial(self._note, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        # Whoever keeps the function that the block gave keeps this object.
        for kept in (self._handles, self._nodes, self._arrived, self._mean):
            kept.clear()

    def add(self, *, size: int, weight: float = 1.0) -> None:
        """Take what has arrived since the last call."""
        if size < 1 or not weight > 0:
            raise SettingsError(f"a microbatch has examples and a weight, got size={size} and weight={weight}")
        if not self._arrived:
            raise SettingsError(
                "no gradient has come since the last microbatch: run the backward pass of each inside "
                "`with meter.step() as done`, and call `done` after it"
            )
        share = size / (self.examples + size)
        for name in self._params:
            gap = self._take(self._arrived, name).div_(weight)
            if not self.count:
                self._mean[name] = gap
                continue
            gap -= self._mean[name]
            self._mean[name].add_(gap, alpha=share)
            self._square(name, gap)
        self._merge_rows(share * self.examples)
        self.count += 1
        self.examples += size

    def merge(self, group: "dist.ProcessGroup") -> None:
        """Put together what all ranks have: afterwards each has the same."""
        mine = self.examples
        counts = torch.tensor([self.count, mine], device=next(iter(self._params.values())).device)
        dist.all_reduce(counts, group=group)
        self.count, self.examples = (int(count) for count in counts.tolist())
        for names in _buckets(self._params):
            gaps = [self._take(self._mean, name) for name in names]
            means = [gap * (mine / max(1, self.examples)) for gap in gaps]
            _sum_(means, group)
            for name, gap, mean in zip(names, gaps, means, strict=True):
                self._square(name, gap.sub_(mean))
                if self._with_mean:
                    self._mean[name] = mean
        self._merge_rows(mine)
        _sum_([self.buffers.numbers[EACH]], group)
        for names in _buckets(self._params):
            entries = [self.buffers.entries[name][EACH] for name in names if name in self.buffers.entries]
            if entries:
                _sum_(entries, group)

    def square_mean(self) -> None:
        """Put the squares of the mean gradient into row OF_SUM, after the last microbatch."""
        if self._with_mean:
            for name in self._params:
                self._square(name, self._take(self._mean, name))

    def _note(self, name: str, gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        if gradient is not None:
            # A copy, or what becomes .grad would be what is kept here.
            kept = gradient.detach().to_dense().to(accumulator(gradient), copy=True)
            before = self._arrived.get(name)
            self._arrived[name] = kept if before is None else kept.add_(before)

    def _take(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        """What is there of a parameter, or zeros if no gradient reached it."""
        taken, parameter = tensors.pop(name, None), self._params[name]
        if taken is None:
            return torch.zeros_like(parameter, dtype=accumulator(parameter), requires_grad=False)
        return taken

    def _square(self, name: str, gap: Tensor) -> None:
        # Statistics of all parameters share a buffer, on the device of the first parameter.
        square(gap.to(self.buffers.numbers.device), self.buffers.buffer(name, torch.float64), OF_SUM)

    def _merge_rows(self, weight: float) -> None:
        """Add a multiple of row OF_SUM to row EACH, and set row OF_SUM to zero."""
        self.buffers.merge_rows(weight)
        for statistics in (self.buffers.numbers, *self.buffers.entries.values()):
            statistics[OF_SUM] = 0.0


def _require_independent(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and (module.training or module.running_mean is None):
            raise CoupledExamplesError(
                f"{name!r} (SyncBatchNorm) normalises over the examples of all ranks, which couples these: their "
                "gradients are no independent samples. Use BatchNorm, or measure in a process that trains alone, "
                "between its microbatches"
            )


def _buckets(params: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in params.items():
        if names and size + parameter.numel() > _BUCKET:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.numel()
    yield names


def _sum_(tensors: Sequence[Tensor], group: "dist.ProcessGroup") -> None:
    """Make each tensor the sum of those of all ranks, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))

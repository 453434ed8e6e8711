"""Noise measured inside a training step, or in a step that only measures."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import final

import torch
import torch.distributed as dist
from torch import nn

from noetherflow._batch import is_per_example, length_of, tensors_of
from noetherflow._errors import CoupledExamplesError, EmptyDataError, SettingsError
from noetherflow._holder import eager
from noetherflow._per_example import BETWEEN_BATCHES, require_interval, require_uncoupled
from noetherflow._types import Batch, Params
from noetherflow.noise.between_ranks import Ranks, merge_examples
from noetherflow.noise.buffers import OF_SUM, Buffers, ModelLayout
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.capture.sink import GradientSink
from noetherflow.noise.exact import resolve
from noetherflow.noise.kernels import accumulator
from noetherflow.noise.moments import NoiseMoments
from noetherflow.noise.ops import RULES
from noetherflow.noise.pooling import Pool
from noetherflow.noise.sharded import require_unsharded
from noetherflow.noise.statistics import requested_of
from noetherflow.noise.step import StepNoise
from noetherflow.symmetry import Symmetry, along_axes

# Roundings of the squares of gradients beside which noise cannot be told: the square of the mean is subtracted.
_DROWNED = 1000


@final
class NoiseMeter:
    r"""Measures gradient noise inside your own training step, whose gradients stay what they are.

    Put forward and backward pass of a step into `with meter.step(batch)`. The parameters' gradients are then formed
    example by example in the cache and added up, so that their squares cost little more than memory traffic; `.grad`
    is what it would have been, up to the order of additions. Every step is centred by its own mean gradient, and all
    are pooled: an unbiased estimate of $N_\pm$, averaged over the parameters that training went through. With
    `train=False` a step only measures: no parameter gets a gradient, and where the squares of a gradient cost less than
    the gradient it is not formed.

    With a `group`, the examples of all ranks are measured as if a single process had them all, each counted once, also
    if ranks have batches of unequal sizes; DistributedDataParallel itself follows the mean over ranks. The sums of
    gradients are taken before any rank is averaged, so `no_sync()`, a communication hook and what was in `.grad` do
    not matter. At the end of a step every rank waits for the others, and an all-reduce as large as that of the
    gradients follows, in pieces of some 30 MB: measure every twentieth step. A step that overflows, or cannot be
    measured, on one rank is left out on all. Give the meter what is inside DistributedDataParallel:

    ```python
    meter = nf.NoiseMeter(ddp.module, symmetries, group=dist.group.WORLD)
    with meter.step(batch):  # on every rank
        loss(ddp, batch).mean().backward()
    optimizer.step()
    ```

    Args:
        model: The model that is trained.
        symmetries: What to measure the noise for, by name; they act along axes.
        variances: Measure the variance of every entry of the parameters on which scalings and rescalings act, which
            `solve_equilibrium` needs.
        weighted: Sum the squares also with weights that each step is given, for `observers`.
        check_every: Where the examples are in the results of PyTorch's functions is found out in the first step, and
            again after so many steps. Between these steps the answers are kept.
        group: The ranks that train copies of the model, as under DistributedDataParallel, each on examples of its own;
            by default none, every process for itself.

    Attributes:
        unmeasured: The parameters whose gradients cannot be taken apart by example, each with the reason.
        observers: Functions that are called with the `StepNoise` of every step that is measured.
        skipped: How many steps were left out: they overflowed, or their noise is so small beside the mean gradient
            that rounding hides it.

    Raises:
        SettingsError: If a symmetry is a `DenseSymmetry`: it joins single entries of several tensors; if check_every
            is less than 1; or if parameters are sharded: MicrobatchMeter measures these.
        FrozenParameterError: If one acts on parameters that are not trained.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> meter = nf.NoiseMeter(net, nf.find_symmetries(net, loss, batches[0]))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for batch in batches:
        ...     optimizer.zero_grad()
        ...     with meter.step(batch):
        ...         loss(net, batch).mean().backward()
        ...     optimizer.step()
        >>> meter.noise.count, meter.noise.trace > 0
        (24, tensor(True))

    Source: Ziyin et al. (2024) for the statistics; how they are measured is this package's own.
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: Mapping[str, Symmetry],
        *,
        variances: bool = False,
        weighted: bool = False,
        check_every: int = 1000,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        require_interval(check_every)
        resolved = resolve(model, symmetries)
        require_unsharded(model, dict(model.named_parameters()))
        self._symmetries = along_axes(resolved)
        self._model, self._check_every = model, check_every
        self._variances, self._weighted, self._group = variances, weighted, group
        self.observers: list[Callable[[StepNoise], None]] = []
        self.skipped = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything measured so far, and which parameters are trained."""
        self._params = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        requested = requested_of(self._params, self._symmetries, variances=self._variances, weighted=self._weighted)
        self._model_layout = ModelLayout.of(requested, self._params)
        self._pool = Pool(self._symmetries, self._params)
        device = next(iter(self._params.values())).device
        self._ranks = None if self._group is None else Ranks(self._group, self._model_layout, device)
        self._rounding = max((torch.finfo(accumulator(p)).eps for p in self._params.values()), default=0.0)
        self._places: dict[int, Places] = {}
        self._steps = 0
        self.unmeasured: dict[str, str] = {}

    @contextmanager
    def step(
        self,
        batch: Batch,
        *,
        weight: float | None = None,
        scale: float = 1.0,
        weights: Params | None = None,
        train: bool = True,
    ) -> Iterator[None]:
        """The block in which forward and backward pass of one step run.

        Args:
            batch: What goes into the model: the leading dimension of its first tensor is that of the examples.
            weight: Coefficient of an example's loss in the loss that is differentiated: 1 / B by default, for a mean
                over the batch; 1 for a sum, 1 / (k B) under k-step accumulation.
            scale: What the loss is multiplied by besides, such as the factor of a gradient scaler.
            weights: With `weighted`: of the square of every entry, by parameter; None for a step without.
            train: Whether parameters get their gradients. If not, `.grad` of those that were trained when the meter was
                made, or reset, stays what it was, and sums of gradients are not even formed where their squares cost
                less.

        Yields:
            Nothing.

        Raises:
            CoupledExamplesError: If the loss is no sum over examples, such as after a normalisation over the batch, or
                that cannot be seen.
            EmptyDataError: If the batch holds no example.
            RankError: If a rank of the group did not come to the end of the block.
            SettingsError: If no backward pass ran, no tensor of the batch reaches the model, the loss takes derivatives
                of the model, or no parameter can be measured, also on another rank of the group. What arrived in
                `.grad` is right all the same.
        """
        require_uncoupled(self._model)
        self._require_known()
        if weight is not None and not abs(weight) > 0:
            raise SettingsError(f"the weight of an example in the loss is a number other than 0, got {weight}")
        leaves = tensors_of(batch)
        size = length_of(leaves)
        if not size:
            with nullcontext() if self._ranks is None else self._ranks.told():
                if self._ranks is not None:
                    yield  # or the other ranks would wait in the backward pass
                raise EmptyDataError("the batch holds no tensor with an entry per example")
        given = [leaf for leaf in leaves if is_per_example(leaf, size)]
        if self._steps % self._check_every == 0:
            self._places.clear()
        self._steps += 1
        places = self._places.setdefault(size, Places(size))
        sink = GradientSink.PASSED_ON if train else GradientSink.DROPPED
        keep_sums = self._ranks is not None
        buffers = Buffers.blank(self._model_layout, next(iter(self._params.values())), weights)
        capture = Capture(self._params, buffers, places, given, RULES, sink=sink, keep_sums=keep_sums)
        with eager(), capture:
            yield
        coefficient = scale * (1 / size if weight is None else weight)
        if self._ranks is not None:
            with self._ranks.told():
                self._require_measured(capture, weight)
            size, coefficient = self._merge(self._ranks, capture, coefficient), 1.0
        if size < 2:
            return  # a single example is its own mean
        if self._ranks is None:
            self._require_measured(capture, weight)
            self.unmeasured = capture.refused | self.unmeasured
        self._take(capture.buffers, size, coefficient)

    def _take(self, buffers: Buffers, size: int, weight: float) -> None:
        """Take the squares of the gradients of a step, of examples and of their sum."""
        each, of_sum = buffers.trace.tolist()
        scatter = buffers.merge_rows(-1.0 / size)
        # A step that overflows is left out, as a gradient scaler skips it; and one that says nothing.
        drowned = each - of_sum / size <= _DROWNED * self._rounding * each and not self.unmeasured
        if drowned or not self._pool.add(scatter, size, size - 1, weight):
            self.skipped += 1
            return
        if self.observers:
            mean = buffers.row(OF_SUM)
            step = StepNoise(scatter, weight**-2 / (size - 1), mean, (weight * size) ** -2, size, bool(buffers.weights))
            for observer in self.observers:
                observer(step)

    def _merge(self, ranks: Ranks, capture: Capture, coefficient: float) -> int:
        """Put together what all ranks measured, as if each example's gradient had the coefficient 1.

        Returns:
            The number of examples of all ranks.
        """
        _, size = ranks.meet(capture.size, capture.size)
        names = list(self._params)
        anywhere = zip(names, ranks.any_of([name in capture.refused for name in names]), strict=True)
        elsewhere = "its gradients could not be taken apart by example on another rank"
        unmeasured = {name: capture.refused.get(name, elsewhere) for name, refused in anywhere if refused}
        self.unmeasured = unmeasured | self.unmeasured
        merge_examples(ranks, capture.buffers, self._params, capture.sums or {}, coefficient)
        return size

    @property
    def noise(self) -> NoiseMoments:
        """What was measured, pooled over steps. The mean gradient is not kept: its entries are NaN.

        Raises:
            EmptyDataError: If nothing was measured, or only batches of one example.
        """
        if self.skipped and not self._pool.count:
            raise EmptyDataError(
                f"nothing was measured: all {self.skipped} steps were left out, because a gradient overflowed or the "
                "noise is so small beside the mean gradient that rounding hides it. Compute in float64, or use "
                "estimate_noise, which forms the gradients of single examples then"
            )
        moments = self._pool.moments()
        if not self.unmeasured:
            return moments
        names = [name for name, s in self._symmetries.items() if self.unmeasured.keys().isdisjoint(s.names)]
        entries = {name: squares for name, squares in moments.square_scatter.items() if name not in self.unmeasured}
        return replace(moments.select(*names), square_scatter=entries, unmeasured=dict(self.unmeasured))

    def _require_known(self) -> None:
        """Raise if the model has other parameters than those that are measured."""
        known = {id(parameter) for parameter in self._params.values()}
        others = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in known]
        if others:
            raise SettingsError(
                f"the model trains parameters that it did not have when the meter was made, or reset: {others[:3]}"
                f"{' and more' if len(others) > 3 else ''}. Call reset(), or make another meter"
            )

    def _require_measured(self, capture: Capture, weight: float | None) -> None:
        """Raise if a step cannot be measured, or its weight was left out; the gradients that it left are right."""
        if capture.joined:
            raise CoupledExamplesError(
                "the loss is no sum over the examples of the batch, as far as can be seen: "
                f"{capture.joined}. The gradient of a single example does not exist, or cannot be told. "
                f"For such a loss, {BETWEEN_BATCHES}"
            )
        measured = capture.gradients.keys() - capture.refused.keys()
        if not measured and not capture.met and capture.refused:
            raise SettingsError(
                "no tensor of the batch reaches the model: give step() the tensors that go into it, after they were "
                "moved or normalised, or do that inside of the block"
            )
        if not measured and not capture.refused:
            raise SettingsError(
                "no gradient of a parameter was seen: forward and backward pass of this model both have to run inside "
                "`with meter.step(batch)`"
            )
        if not measured:
            listing = "; ".join(f"{name} ({cause})" for name, cause in capture.refused.items())
            raise SettingsError(
                f"the gradients of these parameters cannot be taken apart by example in passing: {listing}. "
                "Use estimate_noise, which forms them one by one"
            )
        if weight is None and capture.summed and capture.size > 1:
            size = capture.size
            raise SettingsError(
                f"the loss adds up the losses of the {size} examples, and the default weight of an example is that of "
                f"a mean, 1 / {size}, so that the noise would be {size}^2 times too large: step(batch, weight=1.0) for "
                "a sum, or weight=1 / k with k-step accumulation"
            )

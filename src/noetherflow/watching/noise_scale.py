"""The gradient noise scale of a training run, with its confidence interval."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noetherflow._errors import CoupledExamplesError, EmptyDataError, SettingsError
from noetherflow._params import snapshot
from noetherflow._table import html_of, text_of
from noetherflow._types import Batch
from noetherflow.noise import MicrobatchMeter, NoiseMeter, NoiseMoments
from noetherflow.noise.exact import resolve
from noetherflow.noise.sharded import gathered
from noetherflow.noise.step import StepNoise
from noetherflow.noise.table import total
from noetherflow.optimizers.by_parameter import innermost
from noetherflow.symmetry import Symmetry
from noetherflow.watching.checks import (
    EXAMPLES,
    MICROBATCHES,
    require_known,
    require_optimizer,
    require_settings,
    require_state,
)
from noetherflow.watching.estimate import ScaleEstimate
from noetherflow.watching.metric import has_metric, metric_of
from noetherflow.watching.parts import Parts
from noetherflow.watching.scale_averages import ScaleAverages, metrics_of
from noetherflow.watching.table import tables_of

# Measured steps after which the meter finds out again where the examples are.
_CHECK_EVERY = 50


@final
class NoiseScale:
    r"""Watches the gradient noise scale of a training run: $\mathcal B = \mathrm{Tr}\,\Sigma / |G|^2$.

    Put forward and backward pass of every step into `with watch.step(batch)`. Every `every`-th step is measured, from
    the differences between its examples, its microbatches or its ranks; the others are left alone. Every measured step
    gives unbiased estimates of $\mathrm{Tr}\,\Sigma$ and of $|G|^2 = |\bar g|^2 - \mathrm{Tr}\,\Sigma / N$, which are
    averaged over steps *separately*: the average of their ratio would be biased, and dominated by steps in which the
    estimate of $|G|^2$ is small by chance. The interval comes from the spread between steps. It has no upper end where
    $|G|^2$ cannot be told from zero. Gradients stay what they are, and are seen before they are clipped.

    With an adaptive optimizer the noise scale is also measured in its metric,
    $\mathrm{Tr}[P\Sigma] / G^T P G$ with $P = 1/(\sqrt{\hat v} + \epsilon)$: that is what its steps follow. Entries
    that had no gradient before, such as the rows of tokens that did not occur, are left out: v of them is not known.

    Args:
        model: The model that is trained; on several ranks, what is inside DistributedDataParallel.
        symmetries: Of which `charges` and `noise` are wanted, by name; none by default.
        optimizer: The optimizer, for its parameter groups and its metric; of several, the adaptive optimizer.
        every: Measure one step in so many.
        between: `"examples"`, by default: one pass per batch; or `"microbatches"`: those of gradient accumulation, or
            of ranks, for losses that couple the examples of a batch.
        window: How many measured steps an average is worth at most; infinity averages over all.
        confidence: Of the intervals.
        group: The ranks between which gradients are compared.
        scaler: The gradient scaler of mixed precision: it multiplies the loss. Steps that overflow are skipped.

    Attributes:
        meter: The meter that measures; `nf.ChargeLedger(..., meter=watch.meter)` uses the same measurement.
        steps: How many steps went through `step`.
        skipped: How many measured steps were left out, because a gradient overflowed or rounding hides the noise.
        unmeasured: The parameters whose gradients cannot be taken apart by example, each with the reason. The estimates
            leave them out.

    Raises:
        SettingsError: If a setting is out of range, or the optimizer trains none of the parameters.
        FrozenParameterError: If nothing is trained, or a symmetry acts on parameters that are not.

    Examples:
        >>> import torch, noetherflow as nf
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> watch = nf.NoiseScale(net, optimizer=optimizer, every=2)
        >>> for _ in range(40):
        ...     x = torch.randn(16, 4)
        ...     y = x.sum(1, keepdim=True) + torch.randn(16, 1)
        ...     optimizer.zero_grad()
        ...     with watch.step((x, y)):
        ...         (net(x) - y).square().mean().backward()
        ...     optimizer.step()
        >>> watch.estimate.steps, watch.estimate.low < watch.estimate.scale < watch.estimate.high
        (20, True)
        >>> sorted(watch.metrics(layers=False))
        ['grad/norm_sq_unbiased', 'noise/scale', 'noise/scale_high', 'noise/scale_low', 'noise/trace']

    Source: McCandlish, Kaplan, Amodei et al. (2018), An Empirical Model of Large-Batch Training, for the noise scale;
        Fieller (1954) for the interval.
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: Mapping[str, Symmetry] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 20,
        between: str = EXAMPLES,
        window: float = 100,
        confidence: float = 0.95,
        group: "dist.ProcessGroup | None" = None,
        scaler: "torch.amp.GradScaler | None" = None,
    ) -> None:
        require_settings(every, between, window, confidence)
        require_optimizer(optimizer)
        optimizer = None if optimizer is None else innermost(optimizer)
        self._symmetries = resolve(model, symmetries or {})
        self._model, self._scaler = model, scaler
        self._every = every
        self._adaptive = optimizer if has_metric(optimizer) else None
        adaptive = self._adaptive is not None
        self.meter: NoiseMeter | MicrobatchMeter
        if between == EXAMPLES:
            self.meter = NoiseMeter(model, self._symmetries, weighted=adaptive, check_every=_CHECK_EVERY, group=group)
        else:
            self.meter = MicrobatchMeter(model, self._symmetries, weighted=adaptive, group=group)
        self.meter.observers.append(self._observe)
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parts = Parts(list(self._params), model, optimizer)
        self._averages = ScaleAverages(parts, window, confidence, adaptive=adaptive)
        self.steps = self._skipped_before = 0

    @contextmanager
    def step(self, batch: Batch | None = None, *, weight: float | None = None) -> Iterator[Callable[..., None]]:
        """The block in which forward and backward pass of one step run, measured or not.

        Args:
            batch: Between examples: what goes into the model; its first tensor has an entry per example.
            weight: Between examples: the coefficient of an example's loss in the loss that is differentiated; 1 / B by
                default, for a mean over the batch; 1 for a sum, 1 / (k B) under k-step accumulation. The factor of a
                `scaler` is not part of it.

        Yields:
            Between microbatches: a function of `size` and `weight` to call after the backward pass of each, as
            `MicrobatchMeter.step` gives.

        Raises:
            CoupledExamplesError: If the loss is no sum over examples.
            SettingsError: If a step cannot be measured, such as with a single microbatch, or if the model trains
                parameters that it did not train when this object was made. What arrived in `.grad` is
                right all the same.
        """
        due = self.steps % self._every == 0
        self.steps += 1
        if not due:
            yield _nothing
            return
        require_known(self._model, self._params)
        factor = 1.0 if self._scaler is None else self._scaler.get_scale()
        # Of the state before this step: it does not depend on this step's gradient, so that nothing is biased.
        metric = None if self._adaptive is None else metric_of(self._adaptive, self._params)
        if isinstance(self.meter, MicrobatchMeter):
            with self.meter.step(weights=metric) as done:
                yield lambda *, size, weight=1.0: done(size=size, weight=weight * factor)
            return
        if batch is None:
            raise SettingsError("the noise between examples needs the batch: `with watch.step(batch)`")
        try:
            with self.meter.step(batch, weight=weight, scale=factor, weights=metric):
                yield _nothing
        except CoupledExamplesError as error:
            error.add_note(f"NoiseScale(..., between={MICROBATCHES!r}) measures between microbatches")
            raise

    @property
    def estimate(self) -> ScaleEstimate:
        """The noise scale of all measured parameters.

        Raises:
            EmptyDataError: If no step was measured yet.
        """
        return self._estimates()[""]

    @property
    def groups(self) -> dict[str, ScaleEstimate]:
        """The noise scale of each parameter group of the optimizer, if there are several: `group 0`, ..."""
        return {name: each for name, each in self._estimates().items() if name in self._averages.parts.groups}

    @property
    def layers(self) -> dict[str, ScaleEstimate]:
        """The noise scale of the parameters of each module, by its path."""
        return {name: each for name, each in self._estimates().items() if name in self._averages.parts.layers}

    @property
    def preconditioned(self) -> ScaleEstimate | None:
        """The noise scale in the metric of an adaptive optimizer; None for others, and before its second step."""
        return self._averages.estimates(adapted=True).get("")

    @property
    def charges(self) -> dict[str, Tensor]:
        """The charge of each symmetry at the present parameters, float64; all ranks together gather shards."""
        params = dict(self._model.named_parameters())
        return {
            name: symmetry.charge(snapshot({tensor: gathered(params[tensor]) for tensor in symmetry.names}))
            for name, symmetry in self._symmetries.items()
        }

    @property
    def noise(self) -> NoiseMoments:
        """The noise that acts on the symmetries, pooled over the measured steps since this object was made.

        Raises:
            EmptyDataError: If no step was measured yet.
        """
        return self.meter.noise

    @property
    def skipped(self) -> int:
        """How many measured steps were left out."""
        return self._skipped_before + self.meter.skipped

    @property
    def unmeasured(self) -> dict[str, str]:
        """The parameters whose gradients cannot be taken apart by example, each with the reason."""
        return self.meter.unmeasured if isinstance(self.meter, NoiseMeter) else {}

    def metrics(self, *, layers: bool = True) -> dict[str, float]:
        r"""What loggers take: a flat dictionary of numbers under the names of the field.

        `noise/scale`, `noise/scale_low`, `noise/scale_high` (infinite without an upper end), `noise/trace`,
        `grad/norm_sq_unbiased`; `noise/scale_preconditioned` with both ends, in the metric of an adaptive optimizer;
        the noise scale of parameter groups and layers, such as `noise/scale/encoder.0` and `noise/scale_low/encoder.0`;
        and `charge/<symmetry>`, summed over the coordinates.

        Args:
            layers: Whether to tell the noise scale of every layer.

        Returns:
            Numbers by name; of the noise none before the first measured step.
        """
        estimates = self._averages.estimates()
        if not layers:
            estimates = {name: estimates[name] for name in ("", *self._averages.parts.groups) if name in estimates}
        adapted = self._averages.estimates(adapted=True)
        charges = {f"charge/{name}": float(total(charge)) for name, charge in self.charges.items()}
        return metrics_of(estimates, {name: adapted[name] for name in ("",) if name in adapted}) | charges

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that the averages go on as if nothing had happened: numbers and tensors."""
        return {"steps": self.steps, "skipped": self.skipped, "averages": self._averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run stood that `state_dict` describes.

        Args:
            state: From a watch of the same model and optimizer.

        Raises:
            SettingsError: If it belongs to another model or another kind of optimizer, or is no such state.
        """
        require_state(state)
        self._averages.load_state_dict(state["averages"])
        self.steps, self._skipped_before = state["steps"], state["skipped"] - self.meter.skipped

    def _observe(self, step: StepNoise) -> None:
        """Take what a step says."""
        self._averages.add(step, self.unmeasured)

    def _estimates(self) -> dict[str, ScaleEstimate]:
        """By part; raises before the first measured step."""
        estimates = self._averages.estimates()
        if not estimates:
            raise EmptyDataError(
                f"no step was measured yet: {self.steps} steps went through `with watch.step(batch)`, the first and "
                f"then one in {self._every} is measured, and {self.skipped} were left out because a gradient "
                "overflowed or rounding hides the noise. A batch of a single example says nothing of the noise between "
                f"examples: between={MICROBATCHES!r} compares batches"
            )
        return estimates

    def __str__(self) -> str:
        return text_of(tables_of(self))

    def _repr_html_(self) -> str:
        return html_of(tables_of(self))


def _nothing(**_: float) -> None:
    """What a step gives in which no microbatch is looked at."""

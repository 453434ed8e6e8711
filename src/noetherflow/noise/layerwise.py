"""Noise from one forward and one backward pass per batch, for the layers that allow it, and exactly for the rest."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from noetherflow._batch import is_per_example, select, tensors_of
from noetherflow._holder import eager
from noetherflow._per_example import require_independent, require_losses
from noetherflow._residual import cosine
from noetherflow._types import Batch
from noetherflow.noise.buffers import EACH, OF_SUM, Buffers, ModelLayout
from noetherflow.noise.capture.autograd import DerivativeError
from noetherflow.noise.capture.calls import WithoutDropout
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.placing import Places
from noetherflow.noise.capture.sink import GradientSink
from noetherflow.noise.exact import Subject, chunks
from noetherflow.noise.kernels import square, square_stack
from noetherflow.noise.moments import NoiseMoments
from noetherflow.noise.ops import RULES
from noetherflow.noise.pooling import BatchNoise, pooled
from noetherflow.noise.statistics import requested_of
from noetherflow.symmetry import along_axes

# Examples of the first batch that are done one by one as well: not two, so that other sizes are less likely the same.
_CHECKED = 3
# Units of the last place of the whole gradient by which that of a parameter may be off.
_ROUNDING = 100
# Batches whose gradients are added up in their own precision before they are added to the rest: memory traffic.
_RECENT = 16


@final
class LayerwisePass:
    """Accumulates the moments of batches.

    Sums over examples are not centred before they are squared, as exact moments are. A batch whose noise is so small
    beside its mean gradient that rounding would show is left to the exact way.

    Args:
        subject: The model; its symmetries act along axes.
        variances: Whether to measure the variances of single parameters.
        max_bytes: Memory for what has to be done exactly.
    """

    def __init__(self, subject: Subject, *, variances: bool, max_bytes: int) -> None:
        self._number = 0
        self.unknown: dict[str, str] = {}
        self._symmetries = along_axes(subject.symmetries)
        self._subject, self._variances, self._max_bytes = subject, variances, max_bytes
        self._places: dict[int, Places] = {}
        self._batched: list[int] = []
        self._model_layout = ModelLayout.of(
            requested_of(subject.trained, self._symmetries, variances=variances), subject.trained
        )
        self._each: Buffers | None = None
        self._sum: dict[str, Tensor] = {}
        self._recent: dict[str, Tensor] = {}
        self._direction: dict[str, Tensor] | None = None
        self._batches = BatchNoise(self._symmetries, subject.trained)

    def fresh(self, subject: Subject) -> "LayerwisePass":
        """An empty accumulator with the outcome of all checks, for further batches or for further parameters."""
        other = LayerwisePass(subject, variances=self._variances, max_bytes=self._max_bytes)
        other._batched, other.unknown, other._direction = self._batched, self.unknown, {}
        other._places = self._places
        return other

    def forget_places(self) -> None:
        """Find out anew where the examples are in the results of every call."""
        self._places.clear()

    @property
    def count(self) -> int:
        """Number of examples seen."""
        return self._batches.count

    def check(self, batch: Batch, together: Tensor, *, random: bool, where: str) -> None:
        """Compare with single examples: what differs is done exactly from now on.

        Args:
            batch: The first batch.
            together: The losses of its examples.
            random: Whether losses differ from call to call.
            where: What to call the batch.

        Raises:
            CoupledExamplesError: If an example has another loss on its own.
            NotASymmetryError: If a symmetry changes a loss.
        """
        subject, size = self._subject, len(together)
        self._batched = [index for index, leaf in enumerate(tensors_of(batch)) if is_per_example(leaf, size)]
        if not self._batched:
            return
        few = torch.arange(min(_CHECKED, size), device=together.device)
        losses, stack = self._one_by_one([select(batch, index[None], size) for index in few], without_dropout=random)
        if not random:
            require_independent(losses, together[: len(losses)], where, subject.function.tolerance.rounding)
        subject.require_symmetric(stack, 0, where)
        if len(few) < 2:
            self._batched = []
            return
        try:
            capture, _ = self._measure(select(batch, few, size), without_dropout=random)
        except DerivativeError:
            self._batched = []  # everything is measured example by example
            return
        squares = capture.buffers.row(EACH).squares()
        rough = subject.function.tolerance.rounding
        truths = {name: gradients.double().square().sum() for name, gradients in stack.items()}
        # A gradient that vanishes, as that of a bias which softmax does not see, is nothing but rounding.
        narrow = min(torch.finfo(subject.function.precision).eps, torch.finfo(torch.float32).eps)
        nothing = (_ROUNDING * narrow) ** 2 * torch.stack([*truths.values()]).nansum()
        for name, truth in truths.items():
            total = squares[name].total
            if not ((total - truth).abs() <= rough * truth or torch.maximum(total, truth) <= nothing):
                self.unknown.setdefault(name, "the gradients of single examples are others")

    def add(self, batch: Batch, where: str) -> bool:
        """Measure a batch; false if it has to be done exactly."""
        if not self._batched:
            return False
        if len(tensors_of(batch)[self._batched[0]]) < 2:
            return False
        capture, losses = self._measure(batch, without_dropout=False)
        size = require_losses(losses, where)
        buffers, gradients = capture.buffers, self._gradients(capture)
        gradients.update(self._exactly(buffers, batch, size, where))
        number = self._number + 1
        if number & (number - 1) == 0 and not self._is_symmetric(buffers, gradients, size):
            return False
        each, of_sum = buffers.trace
        if not each - of_sum / size > self._subject.function.tolerance.rounding * each:
            return False
        accumulated = buffers.row(EACH)
        self._each = accumulated.scaled(1.0) if self._each is None else self._each.combine(accumulated, 1.0)
        for name, gradient in gradients.items():
            if name in self._sum:
                self._recent[name] += gradient
            else:
                self._sum[name] = gradient.double()
                self._recent[name] = torch.zeros_like(gradient)
        if number % _RECENT == 0:
            self._flush()
        self._batches.add(size, buffers.merge_rows(-1.0 / size), size - 1)
        self._number = number
        return True

    def moments(self) -> NoiseMoments:
        """The moments of everything that was added; to be called once, since the sums become means in their memory."""
        self._flush()
        trained, count = self._subject.trained, self.count
        assert self._each is not None
        buffers = Buffers.blank(self._model_layout, next(iter(trained.values())))
        for name in trained:
            square(self._sum[name], buffers.buffer(name, torch.float64), OF_SUM)
        mean = {name: self._sum[name].div_(count) for name in trained}
        scatter = buffers.row(OF_SUM).scaled(-1.0 / count).combine(self._each, 1.0)
        return replace(pooled(self._symmetries, scatter, mean, self._batches), fallback=dict(self.unknown))

    def _measure(self, batch: Batch, *, without_dropout: bool) -> tuple[Capture, Tensor]:
        """What is seen of every parameter that can be measured so, and the losses."""
        subject = self._subject
        leaves = tensors_of(batch)
        batched = [leaves[index] for index in self._batched]
        size = len(batched[0])
        places = self._places.setdefault(size, Places(size))
        roots = {name: tensor.detach().requires_grad_() for name, tensor in subject.trained.items()}
        capture = Capture(
            roots,
            Buffers.blank(self._model_layout, next(iter(roots.values()))),
            places,
            batched,
            RULES,
            sink=GradientSink.KEPT,
            without_dropout=without_dropout,
        )

        def differentiate(losses: Tensor) -> None:
            """The backward pass, in which layers under checkpoint look for their parameters once more."""
            if isinstance(losses, Tensor) and losses.requires_grad:
                torch.autograd.backward(losses.sum(), inputs=list(roots.values()))

        with eager(), torch.enable_grad(), capture:
            losses = subject.function.then(roots, batch, differentiate)
        self.unknown = capture.refused | self.unknown
        return capture, losses.detach()

    def _gradients(self, capture: Capture) -> dict[str, Tensor]:
        """The sum of gradients for each of these parameters; zeros if none reached it."""
        gradients = {}
        for name, parameter in self._subject.trained.items():
            if name not in self.unknown:
                gradient = capture.gradients.get(name)
                gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient
        return gradients

    def _flush(self) -> None:
        """Put recent batches with all others, in float64."""
        for name, recent in self._recent.items():
            self._sum[name] += recent
            recent.zero_()

    def _is_symmetric(self, buffers: Buffers, gradients: Mapping[str, Tensor], size: int) -> bool:
        """Whether the mean gradient has no component along a direction in which the loss should not change."""
        if self._direction is None:
            self._direction = self._subject.direction()
        if not self._direction:
            return True
        square = sum(float(gradients[name].double().square().sum()) for name in self._direction)
        squares = buffers.row(EACH).squares()
        total = size * sum(float(squares[name].total) for name in self._direction)
        # |g . v| / (|v| sqrt(B sum_b |g_b|^2)) for the sum g of the gradients g_b: at a minimum, g is nothing but
        # rounding.
        share = min(1.0, square / total) ** 0.5 if total > 0 else 1.0
        return float(cosine(gradients, self._direction)) * share <= self._subject.function.tolerance.rounding

    def _exactly(self, buffers: Buffers, batch: Batch, size: int, where: str) -> dict[str, Tensor]:
        """Accumulate statistics of parameters without a rule from single examples; returns sums of their gradients."""
        if not self.unknown:
            return {}
        unknown = {name: tensor for name, tensor in self._subject.trained.items() if name in self.unknown}
        part = replace(self._subject, trained=unknown)
        parameter_buffers = {name: buffers.renewed(name, torch.float64) for name in part.trained}
        totals: dict[str, Tensor] = {}
        for _, _, gradients in chunks(part, batch, size, self._max_bytes, where):
            for name, stack in gradients.items():
                total = square_stack(stack.double(), parameter_buffers[name])
                totals[name] = totals[name] + total if name in totals else total
        for name, total in totals.items():
            square(total, parameter_buffers[name], OF_SUM)
        return totals

    def _one_by_one(self, examples: list[Batch], *, without_dropout: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradient of each example, by a backward pass of its own."""
        subject = self._subject
        with WithoutDropout() if without_dropout else nullcontext():
            single = [subject.function.gradient(subject.trained, example) for example in examples]
        losses = torch.stack([losses.sum() for losses, _ in single])
        return losses, {name: torch.stack([gradient[name] for _, gradient in single]) for name in subject.trained}

"""The noise scale of a run of Lightning's Trainer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch.distributed as dist

from noetherflow._batch import length_of
from noetherflow._errors import (
    CoupledExamplesError,
    FrozenParameterError,
    NoetherflowError,
    ParameterNameError,
    SettingsError,
)
from noetherflow._extras import has, require
from noetherflow._types import Batch
from noetherflow.integrations._block import Block
from noetherflow.symmetry import Symmetry
from noetherflow.watching import NoiseScale
from noetherflow.watching.checks import EXAMPLES

if TYPE_CHECKING or has("lightning") or not has("pytorch_lightning"):
    require("lightning", "lightning", purpose="NoiseCallback")
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    from pytorch_lightning import Callback, LightningModule, Trainer

_MEAN, _SUM = "mean", "sum"
# By name: lightning.pytorch and pytorch_lightning have a class each, and a user may import either.
_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy"}
_REFUSED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}


@final
class NoiseCallback(Callback):
    r"""Watches the gradient noise scale of a run of Lightning's Trainer: `Trainer(callbacks=[NoiseCallback()])`.

    Each batch is a step of a `NoiseScale`, or each accumulation window if microbatches are compared: every `every`-th
    is measured. Gradients stay what they are. They are seen before they are clipped, with the factor of a gradient
    scaler taken out, and with Lightning's division of the loss by `accumulate_grad_batches`. Batches of validation and
    of the sanity check are not measured, and a batch whose `training_step` returns None is left out.

    The metrics of `NoiseScale.metrics` go to the loggers of the trainer at every measured step, whatever
    `log_every_n_steps`, with `trainer.global_step` as their step. They are in `trainer.callback_metrics`, too, where
    `ModelCheckpoint` and `EarlyStopping` look. Checkpoints hold the averages, so that a run that is continued from a
    checkpoint continues the curves.

    Args:
        symmetries: Of which the charges are logged, by name, as `find_symmetries` names them for the `LightningModule`.
        every: Measure so many batches apart; accumulation windows apart between microbatches.
        between: `"examples"`: one pass per batch, of all ranks of DDP together; or `"microbatches"`: those of gradient
            accumulation or of the ranks, or both, for losses that couple the examples of a batch.
        window: How many measured steps an average is worth at most; infinity averages over all.
        confidence: Of the intervals.
        layers: Whether to log the noise scale of every layer.
        charges: Whether to log the charges of the symmetries.
        reduction: What `training_step` returns: the `"mean"` of the losses of the examples, or their `"sum"`.
        inputs: From a batch of the data loader to what goes into the model, if that is not the batch; its first tensor
            has an entry per example.

    Attributes:
        watch: The `NoiseScale` of the run, from the start of training on; None before. It starts afresh when an epoch
            begins in which other parameters are trained.

    Raises:
        SettingsError: If reduction is neither `"mean"` nor `"sum"`; at the start of training if a setting is out of
            range, the module optimizes by hand, or the strategy is neither that of a single device nor DDP.

    Examples:
        >>> import noetherflow as nf
        >>> from noetherflow.integrations.lightning import NoiseCallback
        >>> callback = NoiseCallback(every=50)  # Trainer(callbacks=[callback])
        >>> callback.watch is None
        True

    Source: McCandlish, Kaplan, Amodei et al. (2018), as `NoiseScale`.
    """

    def __init__(
        self,
        symmetries: Mapping[str, Symmetry] | None = None,
        *,
        every: int = 20,
        between: str = EXAMPLES,
        window: float = 100,
        confidence: float = 0.95,
        layers: bool = False,
        charges: bool = True,
        reduction: str = _MEAN,
        inputs: Callable[[Any], Batch] | None = None,
    ) -> None:
        if reduction not in (_MEAN, _SUM):
            raise SettingsError(f"reduction must be {_MEAN!r} or {_SUM!r}, got {reduction!r}")
        self._symmetries, self._every, self._between = symmetries, every, between
        self._window, self._confidence = window, confidence
        self._layers, self._charges, self._reduction, self._inputs = layers, charges, reduction, inputs
        self.watch: NoiseScale | None = None
        self._trained: list[str] = []
        self._saved: Mapping[str, Any] | None = None
        self._block: Block | None = None
        self._size = 0

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        return f"NoiseCallback[between={self._between}]"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: the state of the `NoiseScale`, of numbers and tensors."""
        if self.watch is None:
            return dict(self._saved or {})
        return self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the `NoiseScale`: from here on there is an optimizer."""
        _require_supported(trainer, pl_module)
        self._start(trainer, pl_module)
        if self._saved and self.watch is not None:
            self.watch.load_state_dict(self._saved)
        self._saved = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the block of a step, unless an accumulation window goes on."""
        if self._between == EXAMPLES:
            self._abandon()
        if self._block is None and batch_idx == 0 and self._trained != _trained(pl_module):
            self._start(trainer, pl_module)
        given = batch if self._inputs is None else self._inputs(batch)
        self._size = length_of(given)
        if self._block is None and self.watch is not None:
            due = self.watch.steps % self._every == 0
            with self._advice():
                if self._between == EXAMPLES:
                    weight = self._weight(trainer) / max(1, self._size)
                    self._block = Block(self.watch.step(given, weight=weight), due=due)
                else:
                    self._block = Block(self.watch.step(), due=due)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the block of a batch, or take what came from a microbatch."""
        if self._block is None:
            return
        if self._between == EXAMPLES:
            self._close(trainer, pl_module)
            return
        with self._advice():
            self._block.done(size=self._size, weight=self._weight(trainer))
        self._block.microbatches += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Leave the block of an accumulation window, before gradients are clipped and parameters move."""
        if self._block is None:
            return
        # The last window of an epoch may hold a single microbatch, and training_step may have returned None.
        several = self._block.microbatches > 1 or _ranks(trainer) is not None
        if self._between != EXAMPLES and (several or trainer.accumulate_grad_batches == 1 == self._block.microbatches):
            self._close(trainer, pl_module)
        else:
            self._abandon()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget a batch without a backward pass."""
        if self._between == EXAMPLES:
            self._abandon()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a step that was not finished."""
        self._abandon()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget a step that was not finished: nothing of it is left behind."""
        self._abandon()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a step that was not finished."""
        self._abandon()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = _trained(pl_module)
        try:
            self.watch = NoiseScale(
                pl_module,
                self._symmetries,
                trainer.optimizers[0],
                every=self._every,
                between=self._between,
                window=self._window,
                confidence=self._confidence,
                group=_ranks(trainer),
                scaler=getattr(trainer.precision_plugin, "scaler", None),
            )
        except (ParameterNameError, FrozenParameterError) as error:
            error.add_note(
                "NoiseCallback(symmetries=...) takes those of the LightningModule, by the names of its parameters: "
                "nf.find_symmetries(module, loss, batch)"
            )
            raise

    def _weight(self, trainer: Trainer) -> float:
        """The coefficient of the mean loss of a batch in the loss that Lightning differentiates."""
        return (self._size if self._reduction == _SUM else 1) / trainer.accumulate_grad_batches

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the block, and log what it says."""
        block, self._block = self._block, None
        if block is None or self.watch is None:
            return
        with self._advice():
            block.close()
        if not block.due:
            return
        metrics = self.watch.metrics(layers=self._layers)
        if not self._charges:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("charge/")}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        # Loggers have them already: from here they would go there only every log_every_n_steps steps.
        pl_module.log_dict(metrics, logger=False, on_step=True, on_epoch=False)

    def _abandon(self) -> None:
        """Leave the block without a measurement."""
        block, self._block = self._block, None
        if block is not None:
            block.abandon()

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Errors of a measurement say what to change here."""
        try:
            yield
        except NoetherflowError as error:
            if self._between != EXAMPLES:
                note = (
                    "Trainer(accumulate_grad_batches=k) with k of 2 or more makes microbatches, and so do several "
                    "devices; within a batch, NoiseCallback(between='examples') compares examples"
                )
            elif isinstance(error, CoupledExamplesError):
                note = (
                    "give NoiseCallback(between='microbatches') and Trainer(accumulate_grad_batches=k) with k of 2 or "
                    "more, or several devices"
                )
            else:
                note = (
                    "NoiseCallback(inputs=...) says which tensors of a batch go into the model, and "
                    "NoiseCallback(between='microbatches') compares batches, which needs no such tensors"
                )
            error.add_note(note)
            raise


def _trained(pl_module: LightningModule) -> list[str]:
    return [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]


def _ranks(trainer: Trainer) -> "dist.ProcessGroup | None":
    """The ranks of DDP, if there are several."""
    return dist.group.WORLD if trainer.world_size > 1 else None


def _require_supported(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise SettingsError(
            "NoiseCallback measures under automatic optimization, and this module optimizes by hand "
            "(automatic_optimization = False): put its forward pass and manual_backward into `with watch.step(batch)` "
            "of an nf.NoiseScale(self, optimizer=...) in training_step"
        )
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & _SUPPORTED or kinds & _REFUSED:
        raise SettingsError(
            f"NoiseCallback works on a single device and under DDP, and the strategy is "
            f"{type(trainer.strategy).__name__}: use Trainer(strategy='ddp'), or train without the callback"
        )

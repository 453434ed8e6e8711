"""The noise scale of a run with the Trainer of Hugging Face Transformers, or with a trainer of TRL.

The Trainer hands callbacks neither batches nor exceptions. So `attach` puts a method of the callback around two methods
of a trainer, which its documentation invites to override: `get_batch_samples`, which knows how many examples a step
has, and `training_step`, which runs forward and backward pass of a microbatch. The measured block lies inside
`training_step`, so that it is left when a step raises.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noetherflow._batch import length_of
from noetherflow._errors import SettingsError
from noetherflow._extras import require
from noetherflow._types import Batch
from noetherflow.symmetry import Symmetry
from noetherflow.watching import NoiseScale
from noetherflow.watching.checks import EXAMPLES, MICROBATCHES

require("transformers", "transformers", "accelerate", purpose="NoiseCallback of the Trainer")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402

# The entry in trainer_state.json. Under the name of the class, the Trainer could replace the callback by another.
_ENTRY = "noetherflow.NoiseCallback"


@final
class NoiseCallback(TrainerCallback):
    r"""Logs the gradient noise scale of a run with the Trainer of Hugging Face: `NoiseCallback().attach(trainer)`.

    One step of the optimizer in `every` is measured; the first is. Between examples, the first microbatch of such a
    step is measured, so that gradient accumulation makes the measurement cheaper. An example's gradient is that of its
    share of the loss of the step, times the number N of examples in the step: for a loss that is averaged over the
    tokens of the step, an example with more tokens than others counts accordingly. Gradients are seen before they are
    clipped. Batches of an evaluation are not measured.

    The numbers of `NoiseScale.metrics` go into every entry of the log that has a training loss: to all reporters of the
    Trainer, and to `trainer.state.log_history`. The averages are part of `trainer_state.json` in every checkpoint, and
    go on where they stood when training is resumed.

    Args:
        symmetries: Of which the charges are logged, by name; none by default.
        every: Measure one step of the optimizer in so many.
        between: `"examples"`, by default; or `"microbatches"`: those of gradient accumulation, or of several
            processes, for losses that couple the examples of a batch, and for sequences that are packed into a row.
        window: How many measured steps an average is worth at most; infinity averages over all.
        confidence: Of the intervals.
        layers: Whether the noise scale of every layer is logged, too.

    Examples:
        >>> import tempfile, torch, transformers
        >>> from noetherflow.integrations.transformers import NoiseCallback
        >>> sizes = dict(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
        >>> texts = [{"input_ids": row, "labels": row} for row in torch.randint(16, (64, 8))]
        >>> arguments = transformers.TrainingArguments(
        ...     per_device_train_batch_size=8, max_steps=4, logging_steps=2, save_strategy="no", report_to="none",
        ...     use_cpu=True, disable_tqdm=True, output_dir=tempfile.gettempdir(),
        ... )
        >>> trainer = transformers.Trainer(model, arguments, train_dataset=texts)
        >>> noise = NoiseCallback(every=2).attach(trainer)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ...}
        >>> noise.watch.estimate.steps, "noise/scale" in trainer.state.log_history[0]
        (2, True)

    Source: McCandlish, Kaplan, Amodei et al. (2018), An Empirical Model of Large-Batch Training.
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
    ) -> None:
        self._symmetries, self._between, self._layers = symmetries, between, layers
        self._options: dict[str, Any] = {"every": every, "window": window, "confidence": confidence}
        self._trainer: Trainer | None = None
        self._watch: NoiseScale | None = None
        self._group: dist.ProcessGroup | None = None
        # The microbatches of the present step: their examples, an example's coefficient in each, and which comes next.
        self._sizes: list[int] = []
        self._coefficients: list[float] = []
        self._next = 0
        self._block = ExitStack()
        self._done: Callable[..., None] | None = None

    def attach(self, trainer: Trainer) -> Self:
        """Watch what a trainer trains.

        The callback takes a place in front of the trainer's callbacks, so that reporters receive what it adds.

        Args:
            trainer: A Trainer, or an object of a subclass, such as `trl.SFTTrainer`.

        Returns:
            This callback.

        Raises:
            SettingsError: If this callback, or this trainer, is attached already.
        """
        others = list(trainer.callback_handler.callbacks)
        if self._trainer is not None or any(isinstance(c, NoiseCallback) and c is not self for c in others):
            raise SettingsError("a NoiseCallback watches one trainer, and a trainer has one NoiseCallback")
        self._trainer = trainer
        # Both are looked up on the trainer by its loop.
        trainer.get_batch_samples = partial(self._gather, trainer.get_batch_samples)  # type: ignore[method-assign]
        trainer.training_step = partial(self._run, trainer.training_step)  # type: ignore[method-assign]
        for callback in others:
            trainer.pop_callback(callback)
        for callback in (self, *(callback for callback in others if callback is not self)):
            trainer.add_callback(callback)
        return self

    @property
    def watch(self) -> NoiseScale:
        """What watches the present, or the last, training: estimates by group and layer, and a table if printed.

        Raises:
            SettingsError: Before training.
        """
        if self._watch is None:
            raise SettingsError("nothing is watched before trainer.train()")
        return self._watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the model from here, or go on with the averages of the checkpoint that is resumed.

        Raises:
            SettingsError: If the callback is not attached, or training cannot be measured in this way.
        """
        trainer = self._trainer
        if trainer is None:
            raise SettingsError(
                "NoiseCallback has to reach the trainer's steps and reporters: call NoiseCallback(...).attach(trainer) "
                "instead of giving it in `callbacks`"
            )
        self._leave()
        self._group = dist.group.WORLD if args.world_size > 1 else None
        _require_supported(trainer, several=self._between != MICROBATCHES or args.world_size > 1)
        self._watch = NoiseScale(
            kwargs["model"],
            self._symmetries,
            kwargs["optimizer"],
            between=self._between,
            group=self._group,
            scaler=trainer.accelerator.scaler,
            **self._options,
        )
        if state.global_step and _ENTRY in _states(state):
            self._watch.load_state_dict(_with_tensors(_states(state)[_ENTRY]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the averages where the next checkpoint takes them from, whoever requests that checkpoint."""
        _states(state)[_ENTRY] = _without_tensors(self.watch.state_dict())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to what is logged about training; not to the log of an evaluation."""
        if logs is None or "loss" not in logs:
            return
        metrics = self.watch.metrics(layers=self._layers)
        logs |= metrics
        state.log_history[-1] |= metrics  # a copy of the logs, made in front of this call

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the block of a step that was broken off."""
        self._leave()

    def _gather(self, gather: Any, *args: Any, **kwargs: Any) -> Any:
        """The microbatches of the next step, as the trainer gathers them; their sizes are kept."""
        batches, items = gather(*args, **kwargs)
        self._leave()
        self._sizes, self._next = [_examples(batch) for batch in batches], 0
        if self._trainer is not None and _is_mean_of_step(self._trainer, items):
            self._coefficients = [1 / max(1, sum(self._sizes))] * len(batches)
        else:
            self._coefficients = [1 / (len(batches) * max(1, size)) for size in self._sizes]
        return batches, items

    def _run(self, run: Any, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward pass of a microbatch, measured if its step is."""
        number, last = self._next, len(self._sizes) - 1
        self._next += 1
        # Nothing can be compared where the rest of an epoch is a single microbatch.
        lonely = self._between == MICROBATCHES and last == 0 and self._group is None
        if self._watch is None or number > last or lonely:
            return run(model, inputs, *args, **kwargs)
        size, coefficient = self._sizes[number], self._coefficients[number]
        if self._between != MICROBATCHES:
            if number:
                return run(model, inputs, *args, **kwargs)
            _require_several(size, self._watch)
            with self._watch.step(inputs, weight=coefficient):
                return run(model, inputs, *args, **kwargs)
        with self._block.pop_all() as block:
            if not number:
                self._done = block.enter_context(self._watch.step())
            loss = run(model, inputs, *args, **kwargs)
            if self._done is not None:
                self._done(size=size, weight=size * coefficient)
            if number < last:
                self._block = block.pop_all()
        return loss

    def _leave(self) -> None:
        """Leave the block of a step of which the last microbatch never came, without measuring it."""
        broken = SettingsError("the step was broken off")
        self._block.pop_all().__exit__(type(broken), broken, None)


def _states(state: TrainerState) -> dict[str, Any]:
    """What trainer_state.json keeps of callbacks, by name; its annotation is that of an argument of the constructor."""
    states: Any = state.stateful_callbacks
    return states


def _examples(batch: Batch) -> int:
    """How many examples a microbatch has: the length of its first tensor, or of a list without tensors."""
    return length_of(batch) or (len(batch) if isinstance(batch, list) else 0)


def _is_mean_of_step(trainer: Trainer, items: Any) -> bool:
    """Whether the loss is a mean over all microbatches of a step, as the Trainer decides it; else over each of them."""
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga)
    return trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and items is not None)


def _require_several(size: int, watch: NoiseScale) -> None:
    if size < 2 and not watch.steps:
        raise SettingsError(
            f"the first batch has {size} rows, and the noise between examples needs 2 or more: raise "
            f"per_device_train_batch_size. Of sequences that are packed into a row, between={MICROBATCHES!r} with "
            "gradient_accumulation_steps of 2 or more compares the rows"
        )


def _require_supported(trainer: Trainer, *, several: bool) -> None:
    """Raise where gradients are not those of the model's parameters, or there is nothing to compare."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise SettingsError(
            "NoiseCallback measures models on a single device and in DistributedDataParallel; this trainer divides "
            "parameters or sequences between devices (DeepSpeed, FSDP, or parallelism of tensors or sequences)"
        )
    if trainer.args.n_gpu > 1:
        raise SettingsError(
            f"DataParallel copies the model to {trainer.args.n_gpu} devices in every step, where gradients are not "
            "seen: start training with torchrun, or show the process a single device (CUDA_VISIBLE_DEVICES=0)"
        )
    if not several and trainer.args.gradient_accumulation_steps < 2:
        raise SettingsError(
            f"between={MICROBATCHES!r} compares the microbatches of a step, and gradient_accumulation_steps is 1: "
            f"raise it, start several processes with torchrun, or measure between={EXAMPLES!r}"
        )


def _without_tensors(value: Any) -> Any:
    """A state as JSON: a tensor becomes a list of numbers, which JSON keeps to the last bit."""
    if isinstance(value, Tensor):
        return {"tensor": value.tolist()}
    if isinstance(value, dict):
        return {key: _without_tensors(entry) for key, entry in value.items()}
    return [_without_tensors(entry) for entry in value] if isinstance(value, list) else value


def _with_tensors(value: Any) -> Any:
    """The state of which `_without_tensors` made JSON."""
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return torch.tensor(value["tensor"], dtype=torch.float64)
        return {key: _with_tensors(entry) for key, entry in value.items()}
    return [_with_tensors(entry) for entry in value] if isinstance(value, list) else value

"""Runs of Lightning's Trainer, and the same training as a plain loop around `nf.NoiseScale`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

import noetherflow as nf

Pair = tuple[Tensor, Tensor]
# 26 examples: seven batches, the last of two examples.
BATCH, EXAMPLES = 4, 26
QUIET = (
    "ignore:The '(train|val)_dataloader' does not have many workers",
    "ignore:The number of training batches .* is smaller than the logging interval",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:.training_step. returned .None.",
    "ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint need to be provided",
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def pairs(dtype: torch.dtype = torch.float64) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    y = x[:, :2] + torch.randn(EXAMPLES, 2, generator=generator, dtype=torch.float64)
    return list(zip(x.to(dtype).split(BATCH), y.to(dtype).split(BATCH), strict=True))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


class Regression(LightningModule):
    """A regression whose training step may do more than a training step does."""

    def __init__(
        self,
        net: nn.Module,
        *,
        optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
        reduction: str = "mean",
        before: Callable[["Regression", int], object] | None = None,
        after: Callable[["Regression", int, Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.make, self.reduction, self.before, self.after = net, optimizer, reduction, before, after

    def loss(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        losses = (self.net(x) - y).square().sum(1)
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.before is not None:
            self.before(self, batch_idx)
        loss = self.loss(batch)
        return loss if self.after is None else self.after(self, batch_idx, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make([parameter for parameter in self.parameters() if parameter.requires_grad])


@final
class Validated(Regression):
    """A regression with a validation that runs passes forward and backward: nothing of them is training."""

    validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1
        with torch.enable_grad(), torch.inference_mode(False):
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(self.net(x).sum(), x)


@final
class Kept(Logger):
    """A logger that keeps what comes."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """The batches as they are."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: LightningModule,
    callbacks: Sequence[Callback],
    batches: Sequence[Any] | None = None,
    *,
    epochs: int = 2,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train, and return the trainer."""
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = quiet | {"logger": False, "accelerator": "cpu", "devices": 1, "max_epochs": epochs} | settings
    validation = given.pop("validation", None)
    given_batches = None if given.pop("own_loader", False) else loader(pairs() if batches is None else batches)
    evaluated = None if validation is None else loader(validation)
    trainer = Trainer(callbacks=list(callbacks), **given)
    trainer.fit(module, given_batches, evaluated, ckpt_path=checkpoint)
    return trainer


@dataclass(frozen=True)
class Loop:
    """A plain loop with the settings that a trainer has."""

    k: int = 1
    every: int = 2
    between: str = "examples"
    clip: float | None = None
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    epochs: int = 2

    def run(self, module: Regression, symmetries: Any = None, batches: Sequence[Any] | None = None) -> nf.NoiseScale:
        """Train, and return the watch."""
        optimizer = module.configure_optimizers()
        watch = nf.NoiseScale(module, symmetries, optimizer, every=self.every, between=self.between, scaler=self.scaler)
        for _ in range(self.epochs):
            for window in windows(pairs() if batches is None else batches, self.k):
                optimizer.zero_grad()
                if self.between == "examples":
                    for batch in window:
                        with watch.step(batch, weight=1 / (self.k * size_of(batch))):
                            self.backward(module, batch)
                elif len(window) > 1:
                    with watch.step() as done:
                        for batch in window:
                            self.backward(module, batch)
                            done(size=size_of(batch), weight=1 / self.k)
                else:
                    watch.steps += 1
                    self.backward(module, window[0])
                self.move(module, optimizer)
        return watch

    def backward(self, module: Regression, batch: Any) -> None:
        with nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast, cache_enabled=False):
            loss = module.loss(batch) / self.k
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def move(self, module: Regression, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.clip)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


def size_of(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def windows(batches: Sequence[Any], k: int) -> list[Sequence[Any]]:
    return [batches[start : start + k] for start in range(0, len(batches), k)]


def half(scale: float) -> MixedPrecision:
    """What Lightning makes of 16-mixed on a GPU, on the CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))

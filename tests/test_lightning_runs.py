"""What else happens in a run of Lightning's Trainer: validation, checkpoints, loggers, interruptions, refusals."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import noetherflow as nf
from lightning_runs import QUIET, Kept, Loop, Pair, Regression, Validated, adamw, fit, network, pairs
from noetherflow.integrations.lightning import NoiseCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def metrics_of(callback: NoiseCallback) -> dict[str, float]:
    assert callback.watch is not None
    return callback.watch.metrics()


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize(("between", "k"), [("examples", 1), ("examples", 3), ("microbatches", 3)])
def test_training_does_not_notice(between: str, k: int, precision: Any) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    trained = []
    for callbacks in ([], [NoiseCallback(every=1, between=between)], [NoiseCallback(every=3, between=between)]):
        module = Regression(network().to(dtype))
        fit(module, callbacks, pairs(dtype), precision=precision, accumulate_grad_batches=k, gradient_clip_val=0.5)
        trained.append(weights(module))
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    assert not same(trained[0], weights(network().to(dtype)))


class Stop(Callback):
    """Ends training after so many batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.after -= 1
        if not self.after:
            trainer.should_stop = True


@pytest.mark.parametrize(("between", "k"), [("examples", 1), ("microbatches", 2)])
def test_a_run_that_is_continued_continues_the_curves(between: str, k: int, tmp_path: Path) -> None:
    def run(*more: Any, epochs: int, checkpoint: Path | None = None) -> tuple[NoiseCallback, Kept]:
        callback, kept = NoiseCallback(every=2, between=between), Kept()
        fit(
            Regression(network()),
            [callback, *more],
            epochs=epochs,
            checkpoint=checkpoint,
            logger=kept,
            enable_checkpointing=bool(more),
            accumulate_grad_batches=k,
        )
        return callback, kept

    through, straight = run(epochs=4)
    _, first = run(ModelCheckpoint(tmp_path, filename="half"), epochs=2)
    resumed, second = run(epochs=4, checkpoint=tmp_path / "half.ckpt")
    assert first.rows + second.rows == straight.rows
    assert len(second.rows) > 2
    assert metrics_of(resumed) == metrics_of(through)
    afresh, _ = run(epochs=2)
    assert metrics_of(afresh) != metrics_of(through)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(
        Regression(network()),
        [NoiseCallback(), ModelCheckpoint(tmp_path, filename="here")],
        enable_checkpointing=True,
    )
    state = torch.load(tmp_path / "here.ckpt")["callbacks"]["NoiseCallback[between=examples]"]
    callback = NoiseCallback()
    callback.load_state_dict(state)
    assert callback.state_dict() == state
    with pytest.raises(nf.SettingsError, match="the saved noise scale is that of 3 parts"):
        fit(Regression(nn.Sequential(nn.Linear(3, 2)).double()), [callback])


@pytest.mark.parametrize("k", [1, 2])
def test_metrics_go_to_every_logger_once_a_measured_step(k: int, tmp_path: Path) -> None:
    module, kept = Regression(network()), Kept()
    symmetries = symmetries_of(module)
    assert symmetries
    callback = NoiseCallback(symmetries, every=4, layers=True)
    trainer = fit(module, [callback], logger=[kept, CSVLogger(tmp_path)], accumulate_grad_batches=k)
    # Batches 0, 4, 8, 12 of two epochs of seven; the step is that of the optimizer, counted from 0.
    steps = {1: [0, 4, 8, 12], 2: [0, 2, 4, 6]}[k]
    assert [step for step, _ in kept.rows] == steps
    # Averages of the last measured step; charges move on.
    last, now = kept.rows[-1][1], metrics_of(callback)
    assert {name: value for name, value in last.items() if "charge" not in name} == {
        name: value for name, value in now.items() if "charge" not in name
    }
    assert {f"charge/{name}" for name in symmetries} < last.keys()
    assert "noise/scale/net.0" in last
    with open(tmp_path / "lightning_logs/version_0/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == steps
    assert [float(row["noise/scale"]) for row in rows] == [row["noise/scale"] for _, row in kept.rows]
    assert float(trainer.callback_metrics["noise/scale"]) == pytest.approx(last["noise/scale"], rel=1e-6)


def symmetries_of(module: Regression) -> dict[str, nf.Symmetry]:
    def losses(model: Any, batch: Any) -> Tensor:
        return (model.net(batch[0]) - batch[1]).square().sum(1)

    return nf.find_symmetries(module, losses, pairs()[0])


def test_layers_and_charges_can_be_left_out() -> None:
    kept = Kept()
    module = Regression(network())
    symmetries = symmetries_of(module)
    fit(module, [NoiseCallback(symmetries, charges=False)], logger=kept)
    assert sorted(kept.rows[0][1]) == [
        "grad/norm_sq_unbiased",
        "noise/scale",
        "noise/scale_high",
        "noise/scale_low",
        "noise/trace",
    ]


@pytest.mark.parametrize(("between", "k"), [("examples", 1), ("microbatches", 3)])
def test_validation_in_between_is_not_measured(between: str, k: int) -> None:
    without, beside = NoiseCallback(every=1, between=between), NoiseCallback(every=1, between=between)
    fit(Regression(network()), [without], accumulate_grad_batches=k)
    module = Validated(network())
    fit(module, [beside], accumulate_grad_batches=k, validation=pairs(), val_check_interval=2, num_sanity_val_steps=2)
    assert module.validated > 30
    assert metrics_of(without) == metrics_of(beside)
    assert without.watch is not None
    assert beside.watch is not None
    assert without.watch.steps == beside.watch.steps


def test_a_batch_without_a_loss_is_left_out() -> None:
    def none_at(*left_out: int) -> Regression:
        return Regression(network(), after=lambda module, index, loss: None if index in left_out else loss)

    callback = NoiseCallback(every=1)
    fit(none_at(1, 6), [callback])
    assert callback.watch is not None
    expected = Loop(every=1).run(Regression(network()), batches=[p for i, p in enumerate(pairs()) if i not in (1, 6)])
    assert callback.watch.metrics() == pytest.approx(expected.metrics(), rel=1e-12)

    callback = NoiseCallback(every=1, between="microbatches")
    fit(none_at(1, 2, 5), [callback], accumulate_grad_batches=3, epochs=1)
    # Three windows, of one, of two, and of one microbatch.
    assert callback.watch is not None
    assert (callback.watch.steps, callback.watch.estimate.steps) == (3, 1)


def measures(module: Regression, batch: Pair | None = None) -> bool:
    """Whether code of the meters runs in a pass forward and backward: modes and hooks that were left behind do."""
    files = set()
    sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
    try:
        module.loss(batch or pairs()[0]).backward()
    finally:
        sys.setprofile(None)
    return any("noetherflow/noise" in Path(file).as_posix() for file in files)


def test_a_meter_that_is_left_in_its_block_is_noticed() -> None:
    module = Regression(network())
    assert not measures(module)
    batch = pairs()[0]
    with nf.NoiseMeter(module, {}).step(batch):
        assert measures(module, batch)
    with nf.MicrobatchMeter(module, {}).step() as done:
        assert measures(module)
        done(size=4)
        assert measures(module)
        done(size=4)
    assert not measures(module)


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("between", "k"), [("examples", 1), ("examples", 2), ("microbatches", 2)])
def test_an_interruption_leaves_nothing_behind(cause: type[BaseException], between: str, k: int) -> None:
    def broken(module: Regression, batch_idx: int, loss: Tensor) -> Tensor:
        if module.current_epoch == 1 and batch_idx == 3:
            raise cause("no more")
        return loss

    module, callback = Regression(network(), after=broken), NoiseCallback(every=1, between=between)
    with pytest.raises(SystemExit if cause is KeyboardInterrupt else cause):
        fit(module, [callback], accumulate_grad_batches=k)
    assert not measures(module)
    assert metrics_of(callback)
    # The callback serves for another run, which starts afresh.
    fit(again := Regression(network()), [callback], accumulate_grad_batches=k)
    other = NoiseCallback(every=1, between=between)
    fit(Regression(network()), [other], accumulate_grad_batches=k)
    assert metrics_of(callback) == metrics_of(other)
    assert not measures(again)


def test_a_run_that_ends_inside_of_a_window_leaves_nothing_behind() -> None:
    module, callback = Regression(network()), NoiseCallback(every=1, between="microbatches")
    fit(module, [callback, Stop(4)], accumulate_grad_batches=3, min_epochs=0)
    assert callback.watch is not None
    assert callback.watch.estimate.steps == 1
    assert not measures(module)


def test_an_epoch_that_is_skipped_leaves_nothing_behind() -> None:
    class Skips(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    module, callback = Skips(network()), NoiseCallback(every=1)
    fit(module, [callback])
    assert callback.watch is not None
    assert callback.watch.estimate.steps == 4
    assert not measures(module)


def test_training_that_unfreezes_a_layer_starts_afresh() -> None:
    class Thawing(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for parameter in pl_module.net[0].parameters():  # type: ignore[index,operator]
                parameter.requires_grad_(trainer.current_epoch > 0)

    callback = NoiseCallback(every=1)
    module = Regression(network(), optimizer=lambda params: adamw(module.net.parameters()))
    module.net[0].requires_grad_(False)
    fit(module, [callback, Thawing()])
    assert callback.watch is not None
    assert callback.watch.estimate.steps == 7
    assert set(callback.watch.layers) == {"net.0", "net.2"}


def test_a_model_that_couples_its_examples_is_told_what_to_change() -> None:
    def coupled() -> Regression:
        torch.manual_seed(0)
        return Regression(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double())

    with pytest.raises(nf.CoupledExamplesError) as caught:
        fit(coupled(), [NoiseCallback()])
    assert any("NoiseCallback(between='microbatches') and Trainer(acc" in note for note in caught.value.__notes__)
    callback = NoiseCallback(every=1, between="microbatches")
    fit(coupled(), [callback], accumulate_grad_batches=2)
    assert metrics_of(callback)["noise/trace"] > 0


def test_a_batch_that_does_not_reach_the_model_is_told_what_to_change() -> None:
    with pytest.raises(nf.NoetherflowError) as caught:
        fit(Regression(network()), [NoiseCallback(inputs=lambda batch: batch[0].clone())])
    assert "NoiseCallback(inputs=...)" in caught.value.__notes__[-1]
    with pytest.raises(nf.EmptyDataError) as caught:
        fit(Regression(network()), [NoiseCallback(inputs=lambda batch: "text")])
    assert "NoiseCallback(inputs=...)" in caught.value.__notes__[-1]


def test_a_single_microbatch_is_told_what_to_change() -> None:
    with pytest.raises(nf.SettingsError, match="there were 1") as caught:
        fit(Regression(network()), [NoiseCallback(between="microbatches")])
    assert "Trainer(accumulate_grad_batches=k)" in caught.value.__notes__[-1]


def test_symmetries_of_another_module_are_told_what_to_change() -> None:
    symmetries = nf.find_symmetries(network(), lambda model, batch: model(batch[0]).square().sum(1), pairs()[0])
    with pytest.raises(nf.ParameterNameError) as caught:
        fit(Regression(network()), [NoiseCallback(symmetries)])
    assert "NoiseCallback(symmetries=...)" in caught.value.__notes__[-1]


def test_what_is_not_supported_is_refused() -> None:
    class ByHand(Regression):
        automatic_optimization = False

    with pytest.raises(nf.SettingsError, match=r"optimizes by hand .*manual_backward"):
        fit(ByHand(network()), [NoiseCallback()])
    with pytest.raises(nf.SettingsError, match="reduction must be 'mean' or 'sum', got 'max'"):
        NoiseCallback(reduction="max")
    with pytest.raises(nf.SettingsError, match="between must be"):
        fit(Regression(network()), [NoiseCallback(between="batches")])

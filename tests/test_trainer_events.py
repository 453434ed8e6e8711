"""The callback of the Trainer of Hugging Face: logs, checkpoints, evaluations, interruptions, and what is refused."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import pytest
import torch
import transformers
from torch import nn

import noetherflow as nf
import trainer_runs as runs
from noetherflow import _extras
from noetherflow._errors import CoupledExamplesError, EmptyDataError, SettingsError
from noetherflow.integrations.transformers import NoiseCallback
from noetherflow.noise.capture.mode import Capture

ROOT = Path(__file__).parents[1]


@final
class Reporter(transformers.TrainerCallback):
    """Takes what reporters take."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@final
class FullDisk(transformers.TrainerCallback):
    """Ends a run between two microbatches."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("full disk")


def next_token(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return runs.by_token(model(input_ids=tokens, use_cache=False).logits, tokens).mean(1)


def test_the_log_and_every_reporter_have_the_metrics_of_training_only(tmp_path: Path) -> None:
    # Reporters of the Trainer, such as TensorBoard's, come in front of what a user adds.
    reporter = Reporter()
    symmetries = nf.find_symmetries(runs.gpt2(), next_token, torch.stack([row["input_ids"] for row in runs.rows(8)]))
    options = {"callbacks": [reporter], "eval_strategy": "steps", "eval_steps": 3, "eval_dataset": runs.rows(16)}
    watched = {"symmetries": symmetries, "layers": True, "every": 2}
    run, noise = runs.watched_run(runs.gpt2(), tmp_path, watched=watched, **options)
    training = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(training) == 6
    assert len(run.state.log_history) == 9
    for entry in run.state.log_history:
        assert bool(runs.ours(entry)) == ("loss" in entry)
    assert [runs.ours(logs) for logs in reporter.logs] == [runs.ours(entry) for entry in run.state.log_history]
    assert runs.ours(training[-1]) == noise.watch.metrics()
    names = {"noise/scale", "noise/scale_low", "noise/scale_high", "noise/trace", "grad/norm_sq_unbiased"}
    names |= {f"charge/{name}" for name in symmetries} | {"noise/scale/transformer.h.0.mlp.c_fc"}
    assert names <= training[0].keys()
    plain, _ = runs.watched_run(runs.gpt2(), tmp_path, watched={"every": 2})
    # An evaluation changes nothing, and neither do symmetries, but for the order in which squares are added.
    for entry, other in zip(runs.logged(run), runs.logged(plain), strict=True):
        assert {key: entry[key] for key in other} == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_a_run_that_is_resumed_goes_on_as_if_nothing_had_happened(between: str, tmp_path: Path) -> None:
    # A checkpoint inside of an interval between two measured steps.
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    options |= {"watched": {"every": 2, "between": between, "window": 4}}
    whole_run, _ = runs.watched_run(runs.llama(), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        runs.watched_run(runs.llama(), tmp_path / "cut", callbacks=[Killed(4)], **options)
    state = tmp_path / "cut" / "checkpoint-3" / "trainer_state.json"
    resumed = runs.trainer(runs.llama(), tmp_path / "cut", gradient_accumulation_steps=2)
    NoiseCallback(**options["watched"]).attach(resumed)
    resumed.train(resume_from_checkpoint=str(state.parent))
    assert runs.logged(resumed) == runs.logged(whole_run)
    # Without the state of the callback the averages start afresh.
    content = json.loads(state.read_text("utf-8"))
    assert content["stateful_callbacks"].pop("noetherflow.NoiseCallback")
    state.write_text(json.dumps(content), "utf-8")
    fresh = runs.trainer(runs.llama(), tmp_path / "cut", gradient_accumulation_steps=2)
    NoiseCallback(**options["watched"]).attach(fresh)
    fresh.train(resume_from_checkpoint=str(state.parent))
    assert runs.logged(fresh)[-1] != pytest.approx(runs.logged(whole_run)[-1], rel=1e-2)


@final
class Killed(transformers.TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def test_a_run_that_stops_early_has_its_metrics(tmp_path: Path) -> None:
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": runs.rows(16)}
    options |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "callbacks": [stopping]}
    run, noise = runs.watched_run(runs.llama(), tmp_path, max_steps=12, **options)
    assert run.state.global_step == 4 == noise.watch.steps
    assert noise.watch.estimate.steps == 2


@pytest.mark.parametrize("between", ["examples", "microbatches"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_left_behind_when_a_step_raises(
    stop: BaseException, where: str, between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.trainer(runs.llama(), tmp_path, gradient_accumulation_steps=2)
    noise = NoiseCallback(every=1, between=between).attach(run)
    module = run.model.model.layers[0].mlp
    seen = 0

    def raises(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 6:  # the second microbatch of a step; the first, between examples
            raise stop

    register = module.register_forward_hook if where == "forward" else module.register_full_backward_hook
    handle = register(raises)
    if between == "examples":
        seen = 1
    with pytest.raises(type(stop)):
        run.train()
    handle.remove()
    assert noise.watch.estimate.steps == 2
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        raise AssertionError("a mode is active")

    monkeypatch.setattr(Capture, "__torch_function__", counted)
    before = copy.deepcopy(run.model)
    for model in (run.model, before):
        model.zero_grad()
        tokens = runs.rows(4)[0]["input_ids"][None]
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert not calls
    monkeypatch.undo()
    for parameter, other in zip(run.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    # The trainer trains again.
    run.train()
    assert noise.watch.estimate.steps == 6


def test_a_step_that_another_callback_breaks_off_is_left_at_the_next_training(tmp_path: Path) -> None:
    broken = FullDisk()
    run = runs.trainer(runs.llama(), tmp_path, gradient_accumulation_steps=2, callbacks=[broken])
    noise = NoiseCallback(every=1, between="microbatches").attach(run)
    with pytest.raises(RuntimeError, match="full disk"):
        run.train()
    assert noise.watch.estimate.steps == 2
    run.remove_callback(broken)
    run.train()
    expected, _ = runs.watched_run(
        run.model, tmp_path, watched={"every": 1, "between": "microbatches"}, gradient_accumulation_steps=2
    )
    assert noise.watch.estimate.steps == 6 == len(runs.logged(expected))


def refused(tmp_path: Path, data: runs.Rows | None = None, **options: Any) -> Iterator[str]:
    with pytest.raises(SettingsError) as caught:
        runs.watched_run(runs.llama(), tmp_path, data, **options)
    yield str(caught.value)


def test_what_cannot_be_compared_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (sentence,) = refused(tmp_path, watched={"between": "microbatches"})
    assert "gradient_accumulation_steps is 1" in sentence
    (sentence,) = refused(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert "packed" in sentence
    assert "per_device_train_batch_size" in sentence
    (sentence,) = refused(tmp_path, watched={"between": "rows"})
    assert "'rows'" in sentence
    run = runs.trainer(runs.llama(), tmp_path, callbacks=[noise := NoiseCallback()])
    with pytest.raises(SettingsError, match="attach"):
        run.train()
    with pytest.raises(SettingsError, match="before"):
        _ = noise.watch
    # Given in both ways it is there once.
    noise.attach(run)
    assert sum(callback is noise for callback in run.callback_handler.callbacks) == 1
    for other in (noise, NoiseCallback()):
        with pytest.raises(SettingsError, match="one"):
            other.attach(run)


@pytest.mark.parametrize(("name", "words"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharded_models_are_refused_in_a_sentence(name: str, words: str, tmp_path: Path) -> None:
    run = runs.trainer(runs.llama(), tmp_path)
    noise = NoiseCallback().attach(run)
    setattr(run, name, True)
    with pytest.raises(SettingsError, match=words):
        noise.on_train_begin(run.args, run.state, run.control, model=run.model, optimizer=run.create_optimizer())


def test_rows_of_packed_sequences_are_compared_between_microbatches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    # 5 windows of 4 rows, then a window of a single row, in which there is nothing to compare.
    watched = {"every": 1, "between": "microbatches"}
    run, noise = runs.watched_run(runs.llama(), tmp_path, runs.rows(21), watched=watched, **options)
    assert run.state.global_step == 6
    assert noise.watch.estimate.steps == 5 == noise.watch.steps


@final
class Coupled(nn.Module):
    """Its loss is a ratio of sums over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = runs.gpt2()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        scores = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": scores.square().mean().sqrt()}


def test_a_loss_that_couples_examples_is_measured_between_microbatches(tmp_path: Path) -> None:
    with pytest.raises(CoupledExamplesError) as caught:
        runs.watched_run(Coupled(), tmp_path)
    assert any("microbatches" in note for note in caught.value.__notes__)
    options = {"gradient_accumulation_steps": 2, "watched": {"between": "microbatches", "every": 2}}
    assert runs.watched_run(Coupled(), tmp_path, **options)[1].watch.estimate.steps == 3


def test_batches_without_tensors_are_refused_between_examples(tmp_path: Path) -> None:
    run = runs.trainer(runs.llama(), tmp_path)
    NoiseCallback().attach(run)
    run.data_collator = lambda texts: {"texts": texts[0]["input_ids"].tolist()}
    with pytest.raises((EmptyDataError, SettingsError)):
        run.train()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys\nsys.modules['transformers'] = None\nimport noetherflow.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert 'pip install "noetherflow[transformers]"' in done.stderr
    assert _extras.has("transformers", "accelerate")

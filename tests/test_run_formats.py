"""Metrics from the files of this package, of Lightning and of Hugging Face, and the command that shows them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow._cli import app
from noetherflow.record import names, read_run

OURS = ("noise/scale", "noise/scale_high", "charge/0 -> 2", "noise/scale/block/1", "distance/0 -> 2")


def history() -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics; the last two columns at every second step."""
    rows = []
    for k in range(8):
        row = {key: math.sin(k + 0.1 * place) for place, key in enumerate(OURS[:3])}
        row["noise/scale_high"] = math.inf if k == 3 else row["noise/scale_high"]
        rows.append((20 * k, row | ({key: 0.5 + k for key in OURS[3:]} if k % 2 else {})))
    return rows


def own(folder: Path) -> None:
    record = nf.RunRecord(folder)
    for step, row in history():
        record.append(step, row)


def halves(row: dict[str, float]) -> list[dict[str, float]]:
    """Two loggings of a step, each with a part of its metrics."""
    return [{key: value for key, value in row.items() if key.startswith("noise") == first} for first in (True, False)]


def lightning(folder: Path) -> None:
    """What CSVLogger itself writes; other metrics are logged between ours, also at the steps of ours."""
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(folder.parent, name="", version=folder.name)
    for step, row in history():
        logger.log_metrics({"train_loss": 1.0 / (step + 1), "epoch": step // 40}, step)
        for part in halves(row):
            logger.log_metrics(part, step)
        logger.log_metrics({"val_loss": 2.0}, step + 7)
    logger.save()


def trainer(folder: Path) -> None:
    """What the state of Trainer itself writes."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    log = []
    for step, row in history():
        log += [{**part, "step": step} for part in ({"loss": 0.5, "epoch": 1.0}, *halves(row))]
    transformers.TrainerState(log_history=log).save_to_json(str(folder / "trainer_state.json"))


@pytest.mark.parametrize("write", [own, lightning, trainer])
def test_each_format_gives_the_metrics_that_were_recorded(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.name == "run"
    assert run.steps.tolist() == [step for step, _ in history()]
    assert set(run.columns) == set(OURS)
    for key in OURS:
        np.testing.assert_array_equal(run.columns[key], [row.get(key, np.nan) for _, row in history()])


def test_a_training_resumed_into_its_csv_file_continues_the_curves(tmp_path: Path) -> None:
    rows = [(0, 1.0), (20, 2.0), (40, 3.0), (60, 4.0), (20, 2.5), (40, 3.5)]
    text = "".join(f"{value},{step}\n" for step, value in rows)
    (tmp_path / "metrics.csv").write_text("noise/scale,step\n" + text)
    run = read_run(tmp_path)
    assert run.steps.tolist() == [0, 20, 40]
    assert run.columns["noise/scale"].tolist() == [1.0, 2.5, 3.5]


def test_the_last_checkpoint_of_trainer_is_read(tmp_path: Path) -> None:
    for number in (90, 200, 1000):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        state = {"log_history": [{"step": number, "noise/scale": float(number)}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).steps.tolist() == [1000]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "holds none of metrics.jsonl, metrics.csv and trainer_state.json"),
        ("metrics.csv", "epoch,noise/scale\n1,2\n", "has no column 'step'"),
        ("metrics.csv", "", "has no column 'step'"),
        ("metrics.csv", "step,noise/scale\n1,many\n", r"line 2: expected an integer step and numbers: .*many"),
        ("metrics.csv", "step,noise/scale\n1.5,2\n", "line 2: expected an integer step"),
        ("metrics.csv", "step,train_loss\n1,2\n", "holds no metric of noetherflow, such as noise/scale"),
        ("metrics.csv", b"step,noise/scale\n1,\xff\n", "cannot be read"),
        ("trainer_state.json", "{", "cannot be read"),
        ("trainer_state.json", "[]", "has no list 'log_history'"),
        ("trainer_state.json", '{"log_history": [3]}', "has no list 'log_history'"),
        ("trainer_state.json", '{"log_history": [{"noise/scale": 1}]}', r"log_history\[0\]: expected an integer step"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": 1}]}', "holds no metric of noetherflow"),
        ("metrics.jsonl", "", "holds no metric of noetherflow"),
        ("metrics.jsonl", "{}\n{}\n", r"metrics.jsonl, line 1: expected a JSON object"),
        ("other/run/metrics.csv", "", r"give one of the folders below that do: .*other/run$"),
    ],
)
def test_a_bad_folder_is_a_sentence(tmp_path: Path, file: str | None, content: str | bytes, message: str) -> None:
    if file:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(nf.FileError, match=message):
        read_run(tmp_path)


def test_what_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(nf.FileError, match="does not exist: give the folder of a run"):
        read_run(tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(nf.FileError, match="is a file: give the folder of a run"):
        read_run(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("noise/scale", ("noise/scale", "")),
        ("noise/scale_low/a/b", ("noise/scale_low", "a/b")),
        ("noise/scale_preconditioned_high", ("noise/scale_preconditioned_high", "")),
        ("charge/0 -> 2", ("charge", "0 -> 2")),
        ("charge_decay/a", ("charge_decay", "a")),
        ("distance/distance/x", ("distance", "distance/x")),
        ("charge_between/a", ("charge_between", "a")),
        ("charge_change/a", ("charge_change", "a")),
        ("charge", None),
        ("charges/a", None),
        ("noise/scales", None),
        ("loss", None),
    ],
)
def test_names_are_taken_apart(key: str, parts: tuple[str, str] | None) -> None:
    assert names.split(key) == parts
    if parts:
        assert names.joined(*parts) == key


@pytest.mark.parametrize("write", [own, lightning, trainer])
def test_the_command_prints_a_table_and_writes_a_page(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "run")
    page = tmp_path / "pages" / "mine.html"
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run"), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "run: 8 recorded steps, from 0 to 140." in done.output
    # The last values: sin(7) of the scale, sin(7.2) of the charge, 7.5 of the distance.
    for what, value in (("noise scale", "0.657"), ("charge of 0 -> 2", "0.7937"), ("distance of 0 -> 2", "7.5")):
        line = next(line for line in done.output.splitlines() if line.startswith(what))
        assert value in line.removeprefix(what).split()
    assert f"Written: {page}" in done.output.replace("\n", "")
    assert page.read_text().startswith("<!DOCTYPE html>")
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run")])
    assert done.exit_code == 0
    assert (tmp_path / "run" / "watch.html").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert done.exit_code == 2
    assert "FileError" in done.output
    assert "holds none of metrics.jsonl" in done.output
    own(tmp_path)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["watch", str(tmp_path), "--out", str(tmp_path / "file" / "x.html")])
    assert done.exit_code == 2
    assert "cannot be written" in done.output

"""The record of a run: what is written is read, a kill loses nothing, and a resumed training continues the curves."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import noetherflow as nf

# Numbers whose shortest text is long, large, small, or negative zero.
HARD = (0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3, 123456789.123456789)


def metrics(step: int) -> dict[str, float]:
    return {"noise/scale": math.exp(step / 7), "charge/0 -> 2": -step / 3}


def filled(folder: Path, steps: range) -> nf.RunRecord:
    record = nf.RunRecord(folder)
    for step in steps:
        record.append(step, metrics(step))
    return record


def test_numbers_are_read_back_with_their_bits(tmp_path: Path) -> None:
    record = nf.RunRecord(tmp_path / "new" / "run")
    for step, value in enumerate(HARD):
        record.append(step, {"a": value, "b": torch.tensor(value, dtype=torch.float64), "c": np.float64(value)})
    steps, columns = record.read()
    assert steps.dtype == np.int64
    assert steps.tolist() == list(range(len(HARD)))
    for values in columns.values():
        assert values.tobytes() == np.array(HARD).tobytes()


def test_every_json_reader_can_read_nan_and_infinities(tmp_path: Path) -> None:
    record = nf.RunRecord(tmp_path)
    record.append(0, {"a": math.inf, "b": -math.inf, "c": math.nan, "half \ud800 \n": 1.0})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    (line,) = record.path.read_text("ascii").splitlines()
    written = json.loads(line, parse_constant=refuse)
    assert written == {"step": 0, "a": "Infinity", "b": "-Infinity", "c": None, "half \ud800 \n": 1.0}
    _, columns = record.read()
    assert columns["a"][0] == math.inf
    assert columns["b"][0] == -math.inf
    assert np.isnan(columns["c"][0])
    with pytest.raises(AssertionError, match="Infinity is no JSON"):  # The twin: what json.dumps writes by default.
        json.loads(json.dumps({"a": math.inf}), parse_constant=refuse)


def test_a_missing_metric_is_nan(tmp_path: Path) -> None:
    record = nf.RunRecord(tmp_path)
    record.append(3, {"a": 1.0})
    record.append(5, {"b": 2.0})
    steps, columns = record.read()
    assert steps.tolist() == [3, 5]
    np.testing.assert_array_equal(columns["a"], [1.0, np.nan])
    np.testing.assert_array_equal(columns["b"], [np.nan, 2.0])


@pytest.mark.parametrize("resumed", [0, 4, 7, 9])
@pytest.mark.parametrize("reopened", [True, False])
def test_a_resumed_training_continues_as_if_nothing_had_happened(tmp_path: Path, resumed: int, reopened: bool) -> None:
    through = filled(tmp_path / "through", range(15))
    record = filled(tmp_path / "resumed", range(10))
    if reopened:
        record = nf.RunRecord(tmp_path / "resumed")
    record.append(resumed, metrics(resumed))
    # Right after the first append, nothing of the training that was given up is left.
    assert record.read()[0].tolist() == list(range(resumed + 1))
    for step in range(resumed + 1, 15):
        record.append(step, metrics(step))
    assert record.path.read_bytes() == through.path.read_bytes()
    assert sorted(path.name for path in record.path.parent.iterdir()) == ["metrics.jsonl"]


def test_a_last_line_cut_at_any_byte_is_ignored_and_repaired(tmp_path: Path) -> None:
    record = filled(tmp_path / "run", range(3))
    complete = record.path.read_bytes()
    lines = complete.splitlines(keepends=True)
    for cut in range(len(lines[2])):
        record.path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert nf.RunRecord(tmp_path / "run").read()[0].tolist() == [0, 1]
        nf.RunRecord(tmp_path / "run").append(2, metrics(2))
        assert record.path.read_bytes() == complete
        # The recorder that wrote the line notices, too, that the file is not what it left.
        record.append(2, metrics(2))
        record.path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        record.append(3, metrics(3))
        assert record.read()[0].tolist() == [0, 1, 3]
    record.path.unlink()
    record.append(4, metrics(4))
    assert record.read()[0].tolist() == [4]
    record.path.write_bytes(complete)
    # Zeros, which a file system may leave after a loss of power.
    record.path.write_bytes(b"".join(lines[:2]) + b"\0" * 50)
    assert record.read()[0].tolist() == [0, 1]


def test_a_damaged_line_in_the_middle_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    record = filled(tmp_path, range(4))
    lines = record.path.read_bytes().splitlines(keepends=True)
    for wrong in (b'{"step": 1, "noise/sc\n', b'{"noise/scale": 2}\n', b"[1]\n", b'{"step": 1, "a": "x"}\n', b"\n"):
        damaged = b"".join((lines[0], wrong, *lines[2:]))
        record.path.write_bytes(damaged)
        with pytest.raises(nf.FileError, match=r"metrics\.jsonl, line 2: expected a JSON object .* remove that line"):
            record.read()
        with pytest.raises(nf.FileError, match="line 2"):
            nf.RunRecord(tmp_path).append(9, {})
        assert record.path.read_bytes() == damaged


WRITER = """
import sys, math, itertools
import noetherflow as nf
record = nf.RunRecord(sys.argv[1])
for step in itertools.count(int(sys.argv[2])):
    record.append(step, {f"charge/{k}": math.sin(step + k) for k in range(200)})
"""


def test_a_process_that_is_killed_leaves_a_record_that_continues(tmp_path: Path) -> None:
    """A real kill, twice, beside a reader: every read is a beginning of what an undisturbed run writes."""
    record = nf.RunRecord(tmp_path)
    start, seen = 0, 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start)])
        try:
            end = time.monotonic() + 300
            while seen < start + 30:
                assert time.monotonic() < end
                assert process.poll() is None
                if record.path.exists():
                    steps, _ = record.read()
                    assert steps.tolist() == list(range(len(steps)))
                    seen = len(steps)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        steps, columns = record.read()
        for k in (0, 199):
            assert columns[f"charge/{k}"].tolist() == [math.sin(step + k) for step in steps.tolist()]
        start = len(steps) - 10
        seen = 0


def test_a_reader_beside_a_writer_that_resumes_sees_complete_lines(tmp_path: Path) -> None:
    record, wrong, done = nf.RunRecord(tmp_path), [], threading.Event()
    record.append(0, metrics(0))

    def read() -> None:
        while not done.is_set():
            steps, columns = nf.RunRecord(tmp_path).read()
            expected = [metrics(step)["noise/scale"] for step in steps.tolist()]
            if steps.tolist() != list(range(len(steps))) or columns["noise/scale"].tolist() != expected:
                wrong.append(steps)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for step in range(1, 20):
            record.append(step, metrics(step))
    done.set()
    reader.join()
    assert not wrong


@pytest.mark.parametrize("step", [-1, 1.5, "1", None])
def test_a_step_that_is_no_count_is_refused(tmp_path: Path, step: object) -> None:
    with pytest.raises(nf.SettingsError, match="a step must be an integer of at least 0, got"):
        nf.RunRecord(tmp_path).append(step, {})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["much", None, torch.zeros(2), [1.0]])
def test_a_metric_that_is_no_number_is_refused(tmp_path: Path, value: object) -> None:
    record = filled(tmp_path, range(2))
    before = record.path.read_bytes()
    with pytest.raises(nf.SettingsError, match="metric 'a' must be a single number, got"):
        record.append(5, {"a": value})  # type: ignore[dict-item]
    with pytest.raises(nf.SettingsError, match="may not be named 'step'"):
        record.append(5, {"step": 1.0})
    assert record.path.read_bytes() == before


def test_numpy_steps_are_steps(tmp_path: Path) -> None:
    record = nf.RunRecord(tmp_path)
    for step in np.arange(3):
        record.append(step, {"a": 1.0})
    assert record.read()[0].tolist() == [0, 1, 2]


def test_files_that_cannot_be_read_or_written_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(nf.FileError, match=r"cannot be read: .*check the path"):
        nf.RunRecord(tmp_path / "nothing").read()
    (tmp_path / "file").write_text("")
    with pytest.raises(nf.FileError, match=r"cannot be written: .*check the path"):
        nf.RunRecord(tmp_path / "file").append(0, {})


def test_appending_reads_the_file_at_the_start_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run would otherwise take a time that grows with its square."""
    record = filled(tmp_path, range(3))

    def fail(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(Path, "read_bytes", fail)
    record.append(3, metrics(3))
    with pytest.raises(AssertionError, match="was read"):  # The twin: a new recorder has to look.
        nf.RunRecord(tmp_path).append(4, metrics(4))


def test_metrics_of_a_step_may_come_one_after_another(tmp_path: Path) -> None:
    """Such as those of a NoiseScale, and those of a ChargeLedger; a number that comes again is replaced."""
    record = nf.RunRecord(tmp_path)
    for step in (0, 10):
        record.append(step, {"noise/scale": 3.0 + step, "loss": 1.0})
        record.append(step, {"charge/a": 5.0 + step})
        record.append(step, {"loss": 2.0})
    steps, columns = record.read()
    assert steps.tolist() == [0, 10]
    assert {name: column.tolist() for name, column in columns.items()} == {
        "noise/scale": [3.0, 13.0],
        "charge/a": [5.0, 15.0],
        "loss": [2.0, 2.0],
    }
    nf.RunRecord(tmp_path).append(10, {"loss": 4.0})  # resumed: nothing of the step that was given up is left
    assert nf.RunRecord(tmp_path).read()[1]["charge/a"].tolist()[1:] != [15.0]

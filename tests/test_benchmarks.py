"""Benchmarks run at a tiny size, and the page shows the numbers of the file that a benchmark wrote."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "equilibrium.json"
PAGE = ROOT / "docs" / "benchmarks.md"
COMPARED = {"seconds", "operations", "examples"}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the modules of benchmarks/ importable."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def numbers(content: Any) -> list[float]:
    """All numbers of a JSON document."""
    if isinstance(content, dict):
        return numbers(list(content.values()))
    if isinstance(content, list):
        return [number for part in content for number in numbers(part)]
    return [content] if isinstance(content, int | float) else []


@pytest.mark.usefixtures("scripts")
def test_the_benchmark_of_the_equilibrium_writes_every_field(tmp_path: Path) -> None:
    equilibrium = importlib.import_module("equilibrium")
    threads = torch.get_num_threads()
    try:
        equilibrium.main(["--rounds", "1", "--share", "0.0001", "--models", "F2", "--out", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    tiny, kept = (json.loads(path.read_text("utf-8")) for path in (tmp_path / "out.json", RESULT))
    assert tiny.keys() == kept.keys()
    assert {"versions", "processor", "processors", "threads"} <= tiny["environment"].keys()
    assert [row["state"] for row in tiny["rows"]] == ["as built", "trained"]
    for row in tiny["rows"]:
        ours, theirs = row["equilibrate"], row["SGD"]
        for other in kept["rows"]:
            assert row.keys() == other.keys()
            assert ours.keys() == other["equilibrate"].keys()
            assert theirs.keys() == other["SGD"].keys()
        assert all(math.isfinite(number) for number in numbers(row))
        assert ours["drift after"]["largest"] < 1e-9 < ours["drift before"]["largest"]
        assert sum(ours["share of time"].values()) == pytest.approx(1)
        # Two layers of 4 x 32 and 28 x 4 on 32 examples: forward, and backward without the gradient of the input.
        assert theirs["operations"] / theirs["steps"] == 2 * 32 * (2 * 128 + 3 * 112)
        assert theirs["examples"] == 32 * theirs["steps"]
        assert theirs["course"][-1][0] == theirs["steps"]
        assert not theirs["reached"]
        assert row["SGD over equilibrate"].keys() == COMPARED


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("target", "reached", "seconds"), [(0.3, 20, 10.0), (0.25, 30, 15.0), (0.2, 30, 15.0), (0.1, None, None)]
)
def test_the_summary_says_when_sgd_first_reached_the_drift(
    target: float, reached: int | None, seconds: float | None
) -> None:
    measure = importlib.import_module("at_rest.measure")
    course = [[0, 1.0, 1.0], [10, 0.4, 0.3], [20, 0.3, 0.2], [30, 0.2, 0.2], [40, 0.25, 0.2]]
    said = measure.summary(course, target, 0.5)
    assert (said["reached"], said["steps until reached"], said["seconds until reached"]) == (
        reached is not None,
        reached,
        seconds,
    )
    assert (said["best drift"], said["steps until best"], said["last drift"]) == (0.2, 30, 0.25)
    assert said["steps until share of start"] == {"0.5": 10, "0.1": None, "0.01": None}


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([1.0] * 21, True),
        ([1.0] * 20, False),  # too few epochs
        ([1.0] + [0.98**epoch for epoch in range(20)], False),
        ([1.0] + [0.9995**epoch for epoch in range(20)], True),
        ([1.0] + [0.98**epoch for epoch in range(19)] + [1.0], False),  # a single epoch that went badly
    ],
)
def test_training_ends_when_the_loss_is_flat(losses: list[float], flat: bool) -> None:
    assert importlib.import_module("at_rest.cases").is_flat(losses) is flat


@pytest.mark.usefixtures("scripts")
def test_rows_of_other_settings_are_dropped(tmp_path: Path) -> None:
    save, path = importlib.import_module("equilibrium").save, tmp_path / "out.json"
    save(path, {"rounds": 1}, {"model": "GPT-2", "state": "trained"})
    save(path, {"rounds": 1}, {"model": "F2", "state": "trained"})
    assert [row["model"] for row in json.loads(path.read_text("utf-8"))["rows"]] == ["F2", "GPT-2"]
    save(path, {"rounds": 2}, {"model": "GPT-2", "state": "trained"})
    assert [row["model"] for row in json.loads(path.read_text("utf-8"))["rows"]] == ["GPT-2"]


@pytest.mark.usefixtures("scripts")
def test_the_page_shows_the_numbers_of_the_file() -> None:
    show = importlib.import_module("at_rest.show")
    result, page = json.loads(RESULT.read_text("utf-8")), PAGE.read_text("utf-8")
    assert show.tables(result) in page
    result["rows"][0]["SGD"]["best drift"] *= 1.1
    assert show.tables(result) not in page


@pytest.mark.usefixtures("scripts")
def test_the_benchmark_for_gpus_runs_at_a_tiny_size_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model and method: right numbers, or absent packages; and the file is written after every method."""
    noise_gpu = importlib.import_module("noise_gpu")
    written: list[int] = []
    write = noise_gpu._files.write_json

    def counted(path: Path, content: Any) -> None:
        write(path, content)
        written.append(sum(len(model["rows"]) for model in json.loads(path.read_text("utf-8"))["models"].values()))

    monkeypatch.setattr(noise_gpu._files, "write_json", counted)
    noise_gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    assert written == [*range(1, len(noise_gpu.MODELS) * len(noise_gpu.METHODS) + 1), written[-1]]
    result = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert {"versions", "processor", "TF32"} <= result["environment"].keys()
    assert result["models"].keys() == noise_gpu.MODELS.keys()
    for model in result["models"].values():
        assert model["rows"].keys() == noise_gpu.METHODS.keys()
        bound = 1e-5 if model["precision"] == "float32" else 0.03
        for name, row in model["rows"].items():
            if name == "Opacus" and row.keys() & {"absent", "wrong"}:
                continue  # it is no package of the tests, and is wrong where position ids are not those of an example
            assert "wrong" not in row, (name, row)
            assert row["rounds"] >= 1
            assert row["ratio"] > 0
            assert row["error"] < bound
            assert row.get("error of Grams", 0.0) < bound
        assert "error of Grams" in model["rows"]["with Grams"]


@pytest.mark.usefixtures("scripts")
def test_a_method_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_gpu = importlib.import_module("noise_gpu")
    methods = importlib.import_module("noise_on_gpu.methods")
    right = methods.vectorised

    def wrong(built: Any) -> Any:
        method = right(built)
        return methods.Method(method.step, lambda: 1.01 * method.trace())

    def failing(built: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(methods.METHODS, "torch.func", wrong)
    monkeypatch.setitem(methods.METHODS, "loop", failing)
    arguments = ["--quick", "--device", "cpu", "--models", "MLP", "--methods", "torch.func", "loop", "measure only"]
    noise_gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["models"]["MLP"]["rows"]
    assert "off by 0.01" in rows["torch.func"]["wrong"]
    assert "ratio" not in rows["torch.func"]
    assert "out of memory" in rows["loop"]["wrong"]
    assert rows["measure only"]["ratio"] > 0
    # Without time, nothing is measured, and the file says so.
    noise_gpu.main([*arguments, "--seconds", "0", "--out", str(tmp_path / "none.json")])
    rows = json.loads((tmp_path / "none.json").read_text("utf-8"))["models"]["MLP"]["rows"]
    assert all("no time" in row["absent"] for row in rows.values())


@pytest.mark.usefixtures("scripts")
def test_the_benchmark_of_a_million_neurons_runs_at_a_tiny_size_and_is_on_the_page(tmp_path: Path) -> None:
    million = importlib.import_module("million_neurons")
    threads = torch.get_num_threads()
    try:
        million.main(["--rounds", "1", "--count", "800", "--out", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    tiny, kept = (json.loads(path.read_text("utf-8")) for path in (tmp_path / "out.json", million.OUT))
    for result in (tiny, kept):
        assert {"versions", "processor", "threads"} <= result["environment"].keys()
        assert [row["model"] for row in result["rows"]] == [
            "gated",
            "gated",
            "depthwise",
            "depthwise",
            "dense",
            "dense",
        ]
        assert {row["status"] for row in result["rows"]} == {"CONVERGED"}
        assert all(row["drift over its start"] < 1e-10 for row in result["rows"])
        assert all(math.isfinite(number) for number in numbers(result))
    assert {row["coordinates"] for row in kept["rows"] if row["model"] != "dense"} == {1_000_000}
    page = PAGE.read_text("utf-8")
    assert million.table(kept) in page
    kept["rows"][0]["seconds"] += 0.1
    assert million.table(kept) not in page

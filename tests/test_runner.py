"""The runner: stored results are reused, stale results are computed again, and a failure affects no other result."""

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import noetherflow as nf
from fake_experiments import Config, Fake, install
from noetherflow import _fingerprint
from noetherflow.paper import experiment, page, results, runner
from noetherflow.paper.claim import Claim
from noetherflow.paper.curves import MAX_CURVES, Curve, label_html, panels_of, thinned_indices

SMALL = ["f1.steps=60", "f1.replicas=2", "kicks=50", "identity_steps=5"]
SMALL_F2 = ["f2.steps=300", "cool_steps=50", "fit_steps=50", "f2.replicas=2"]
PAPER = Path(runner.__file__).parent


def run(out: Path, names: tuple[str, ...] = (), *, jobs: int = 1, force: bool = False, overrides: Any = ()) -> Any:
    """Run experiments with reduced sizes; the endings by figure."""
    configs = experiment.configure(experiment.choose(names), quick=True, seed=None, overrides=overrides)
    return {ending.name: ending for ending in runner.run(configs, out, quick=True, jobs=jobs, force=force)}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Two experiments: f1 has a curve of infinity and NaN, f2 has a claim that fails."""
    experiments = {
        "f1": Fake(draw=lambda figure: figure.subplots().plot([1.0, 2.0], [math.inf, math.nan])),
        "f2": Fake(extra=(Claim("out of reach", math.inf, math.nan, low=0.0),)),
    }
    install(monkeypatch, **experiments)
    monkeypatch.setattr(page, "plotly", lambda: "")
    return experiments


def test_a_stored_result_equals_the_computed_result(fakes: dict[str, Fake], tmp_path: Path) -> None:
    fresh = run(tmp_path, ("f1",))
    assert not fresh["f1"].cached
    again = run(tmp_path)
    assert (again["f1"].cached, again["f2"].cached) == (True, False)
    assert (fakes["f1"].runs, fakes["f2"].runs) == (1, 1)
    last = run(tmp_path)
    assert last["f1"].result == dataclasses.replace(fresh["f1"].result, seconds=last["f1"].result.seconds)
    # JSON has no infinity and no NaN: both survive the file.
    unreachable = last["f2"].result.claims[1]
    assert (unreachable.predicted, unreachable.holds) == (math.inf, False)
    assert math.isnan(unreachable.measured)
    written = json.loads((tmp_path / "f1.json").read_text(), parse_constant=pytest.fail)
    assert written["panels"][0]["curves"][0]["y"] == [None, None]


def test_an_experiment_runs_on_one_thread(fakes: dict[str, Fake], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        run(tmp_path, ("f1",))
        assert (fakes["f1"].threads, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(1)


def test_force_ignores_stored_results(fakes: dict[str, Fake], tmp_path: Path) -> None:
    run(tmp_path)
    assert not run(tmp_path, force=True)["f1"].cached
    assert fakes["f1"].runs == 2


def test_a_change_of_settings_computes_a_new_result(fakes: dict[str, Fake], tmp_path: Path) -> None:
    run(tmp_path, ("f1",))
    assert not run(tmp_path, ("f1",), overrides=["sizes=3,4"])["f1"].cached
    assert not run(tmp_path, ("f1",))["f1"].cached
    assert fakes["f1"].runs == 3


def test_a_result_of_other_code_is_computed_again_and_not_shown_until_then(
    fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    assert (tmp_path / "report.html").read_text().count("twice the value</span>") == 2
    monkeypatch.setattr(results, "code_version", lambda name: "other")
    pending = runner.run(experiment.configure(["f1"], quick=True, seed=None, overrides=[]), tmp_path, quick=True)
    assert not next(pending).cached
    pending.close()
    # f2 is not in this run, but its stored verdict is out of date, too.
    shown = (tmp_path / "report.html").read_text()
    assert shown.count("twice the value</span>") == 1
    assert "out of date" in shown
    fakes["f1"].error = ValueError("broken since")
    failed = run(tmp_path, ("f1",), force=True)
    assert failed["f1"].result is None
    shown = (tmp_path / "report.html").read_text()
    assert "twice the value</span>" not in shown
    assert "broken since" in shown


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(path.read_text()[:300]),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(path.read_text().replace('"measured": 1.0', '"measured": 9.0')),
        lambda path: path.write_text(path.read_text().replace('"figure": "f1"', '"figure": "f2"')),
        lambda path: path.with_suffix(".svg").unlink(),
    ],
)
def test_a_damaged_result_is_computed_again(
    damage: Callable[[Path], object], fakes: dict[str, Fake], tmp_path: Path
) -> None:
    run(tmp_path, ("f1",))
    damage(tmp_path / "f1.json")
    assert not run(tmp_path, ("f1",))["f1"].cached
    assert run(tmp_path, ("f1",))["f1"].cached


def test_an_experiment_that_raises_does_not_lose_other_results(fakes: dict[str, Fake], tmp_path: Path) -> None:
    fakes["f1"].error = ZeroDivisionError("by nothing")
    endings = run(tmp_path)
    assert endings["f1"].error == "ZeroDivisionError: by nothing"
    assert "fake_experiments.py" in endings["f1"].trace
    assert endings["f2"].result is not None
    assert {path.name for path in tmp_path.iterdir()} == {"f2.json", "f2.png", "f2.svg", "report.html"}
    assert "by nothing" in (tmp_path / "report.html").read_text()


def test_verdicts_on_the_page_are_those_of_the_claims(fakes: dict[str, Fake], tmp_path: Path) -> None:
    """Read without a browser: a row per claim, its numbers, and nothing that a text can turn into markup."""
    fakes["f1"].extra = (Claim("<b>bold</b> & high", predicted=0.25, measured=0.75, low=0.5, high=0.6, error=0.05),)
    run(tmp_path)
    shown = (tmp_path / "report.html").read_text()
    rows = re.findall(r'<tr class="(holds|fails)">(.*?)</tr>', shown, flags=re.DOTALL)
    assert [verdict for verdict, _ in rows] == ["holds", "fails", "holds", "fails"]
    cells = re.findall(r'<td data-label="(.*?)" data-sort="(.*?)"><span>(.*?)</span></td>', rows[1][1])
    assert [label for label, _, _ in cells] == ["figure", "claim", "theory", "measured", "band", "verdict"]
    assert [sort for _, sort, _ in cells][2:4] == ["0.25", "0.75"]
    assert [text for _, _, text in cells][1:5] == [
        "&lt;b&gt;bold&lt;/b&gt; &amp; high",
        "0.25",
        "0.75 ± 0.05",
        "[0.5, 0.6]",
    ]
    assert "<strong>FAILS</strong> with 0.75" in cells[5][2]
    assert "<b>" not in shown
    assert "2 of 4 claims FAIL:" in shown
    assert [sort for _, sort, _ in re.findall(r'data-label="(.*?)" data-sort="(.*?)"><span>(.*?)<', rows[3][1])][
        2:4
    ] == [
        "Infinity",
        "NaN",
    ]


def test_the_page_is_written_after_every_experiment(fakes: dict[str, Fake], tmp_path: Path) -> None:
    configs = experiment.configure(["f1", "f2"], quick=True, seed=None, overrides=[])
    waiting = [
        (tmp_path / "report.html").read_text().count("not finished yet")
        for _ in runner.run(configs, tmp_path, quick=True)
    ]
    assert waiting == [1, 0]


def test_an_interrupt_propagates_and_stored_results_remain(fakes: dict[str, Fake], tmp_path: Path) -> None:
    fakes["f2"].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    fakes["f2"].error = None
    assert [ending.cached for ending in run(tmp_path).values()] == [True, False]


def test_a_result_records_settings_versions_and_a_command_that_repeats_the_run(
    fakes: dict[str, Fake], tmp_path: Path
) -> None:
    overrides = ["value=0.1", "sizes=3,4", "centred=false", "seed=7"]
    run(tmp_path / "a b", ("f1",), overrides=overrides)
    written = json.loads((tmp_path / "a b" / "f1.json").read_text())
    assert written["settings"] == {"value": 0.1, "sizes": [3, 4], "centred": False, "seed": 7}
    assert written["versions"]["torch"]
    assert written["wall_seconds"] >= 0
    assert written["holds"] is False
    words = shlex.split(written["command"])
    assert words[:3] == ["noetherflow", "reproduce", "f1"]
    assert words[-1] == str(tmp_path / "a b")
    assert words[words.index("--seed") + 1] == "7"
    repeated = [setting for option, setting in itertools.pairwise(words) if option == "--set"]
    config = experiment.configure(["f1"], quick="--quick" in words, seed=7, overrides=repeated)["f1"]
    assert config == Config(0.1, (3, 4), False, 7)


def test_the_key_depends_on_figure_settings_and_code() -> None:
    keys = {
        results.key_of("f1", {"lr": 0.1}, "a"),
        results.key_of("f2", {"lr": 0.1}, "a"),
        results.key_of("f1", {"lr": 0.2}, "a"),
        results.key_of("f1", {"lr": 0.1}, "b"),
    }
    assert len(keys) == 4
    assert results.key_of("f1", {"a": (1, 2), "b": 0}, "a") == results.key_of("f1", {"b": 0, "a": [1, 2]}, "a")


def test_the_code_version_excludes_other_figures_and_display_files(tmp_path: Path) -> None:
    def version(excluded: frozenset[str] = frozenset({"cli.py"})) -> str:
        _fingerprint.of_code.cache_clear()
        return _fingerprint.of_code(tmp_path, excluded)

    for name in ("cli.py", "drift.py"):
        (tmp_path / name).write_text("one = 1\n")
    before = version()
    (tmp_path / "cli.py").write_text("one = 2\n")
    assert version() == before
    (tmp_path / "drift.py").write_text("one = 2\n")
    assert version() != before
    _fingerprint.of_code.cache_clear()
    assert len({results.code_version(name) for name in experiment.FIGURES}) == len(experiment.FIGURES)
    assert all((PAPER.parent / name).is_file() for name in results.DISPLAY_FILES)


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("f2_problem.py", {"f2"}),
        ("f3_theory.py", {"f3", "f12"}),
        ("claim.py", set(experiment.FIGURES)),
        ("page.py", set()),
    ],
)
def test_a_change_of_a_file_makes_the_results_stale_that_depend_on_it(
    file: str, stale: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def versions() -> dict[str, str]:
        _fingerprint.of_code.cache_clear()
        return {name: results.code_version(name) for name in experiment.FIGURES}

    before, read = versions(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == PAPER / file))
    after = versions()
    _fingerprint.of_code.cache_clear()
    assert {name for name in before if before[name] != after[name]} == stale


def test_a_figure_imports_only_figures_that_it_is_built_on() -> None:
    """The code version of a figure f2 covers, among the files of figures, the files f2_* and those it is built on."""
    files = sorted(PAPER.glob("f[0-9]*_*.py"))
    assert {f"{module}.py" for module in experiment.FIGURES.values()} <= {path.name for path in files}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            figure = path.name.split("_")[0]
            related = tuple(f"{name}_" for name in (figure, *results.BUILT_ON.get(figure, ())))
            for other in (file for file in files if not file.name.startswith(related)):
                assert other.stem not in [*names, *names_in(source, *names)], f"{path.name} imports {other.name}"


def names_in(*dotted: str) -> list[str]:
    return [part for name in dotted for part in name.split(".")]


def test_curves_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(nf.ParameterShapeError, match="2 values of x, 1 of y"):
        Curve("short", [1.0, 2.0], [1.0])


def test_a_long_record_is_thinned_and_keeps_both_ends() -> None:
    assert thinned_indices(3).tolist() == [0, 1, 2]
    assert thinned_indices(1).tolist() == [0]
    assert thinned_indices(10_001, 3).tolist() == [0, 5000, 10_000]


def test_a_matplotlib_figure_becomes_panels() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], torch.rand(2, MAX_CURVES + 3), color="red", label=["SGD"] + [None] * (MAX_CURVES + 2))
    axes.set_yscale("log")
    axes.axhline(0.5, color="black", linestyle="--", label="theory")
    axes.errorbar([0.2, 0.4], [0.1, 0.2], [0.01, 0.03], fmt="o", capsize=2, label="late")
    axes.set(xlim=(-1, 3), xticks=[0, 1], xticklabels=["first", "last"], ylabel=r"$|\theta_{ij}|^2$")
    (panel,) = panels_of(figure)
    assert [curve.group for curve in panel.curves] == ["SGD"] * MAX_CURVES + ["theory", "late"]
    *_, theory, late = panel.curves
    assert (theory.kind, list(theory.x), list(theory.y)) == ("prediction", [-1.0, 3.0], [0.5, 0.5])
    assert (late.kind, late.spread) == ("points", pytest.approx([0.01, 0.03]))
    assert panel.ticks == [(0.0, "first"), (1.0, "last")]
    assert (panel.log_x, panel.log_y) == (False, True)
    assert panel.y_label == "|θ<sub>ij</sub>|<sup>2</sup>"
    axes.imshow([[0.0]], extent=(0, 1, 0.1, 1))
    assert panels_of(figure) == []


def test_latex_labels_become_html_and_unknown_commands_stay() -> None:
    assert label_html(r"$e^{-\kappa t}$, $\unheard$") == r"e<sup>-κt</sup>, \unheard"


def written(folder: Path) -> dict[str, Any]:
    """All results of a folder, without wall times and commands."""
    contents = {path.name: json.loads(path.read_text()) for path in folder.glob("f*.json")}
    for content in contents.values():
        del content["wall_seconds"], content["command"]
    return contents


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    serial = run(tmp_path / "one", ("f1", "f2"), overrides=SMALL + SMALL_F2)
    assert all(ending.result is not None for ending in serial.values()), serial
    pooled = run(tmp_path / "two", ("f1", "f2"), jobs=2, overrides=SMALL + SMALL_F2)
    assert all(ending.result is not None for ending in pooled.values()), pooled
    assert written(tmp_path / "one") == written(tmp_path / "two")
    assert (tmp_path / "one" / "f2.svg").stat().st_size == (tmp_path / "two" / "f2.svg").stat().st_size


class Deadly:
    """An object that ends the process which unpickles the object."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_process_that_raises_or_dies_does_not_lose_other_results(tmp_path: Path) -> None:
    configs = experiment.configure(["f1", "f2"], quick=True, seed=None, overrides=[*SMALL, "f2.lr=-1"])
    good, bad = (runner.Task(name, config, tmp_path, True, "code") for name, config in configs.items())
    deadly = runner.Task("f3", Deadly(), tmp_path, True, "code")
    endings = {ending.name: ending for ending in runner._pooled([deadly, good, bad], 2)}
    assert "died" in endings["f3"].error
    assert endings["f1"].result is not None
    assert endings["f2"].error.startswith("SettingsError: lr")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "noetherflow", "reproduce", *map(str, arguments)]


def test_after_a_kill_every_file_is_readable_and_the_next_run_completes(tmp_path: Path) -> None:
    sizes = [word for setting in SMALL for word in ("--set", setting)]
    arguments = ("f1", "--quick", *sizes, "--out", tmp_path)
    moments = random.Random(1)
    for _ in range(3):
        # `--force` computes the result again, so that every kill interrupts a run.
        process = subprocess.Popen(command(*arguments, "--force"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(1.0, 4.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.glob("f*.json"):
            assert json.loads(path.read_text())["figure"] == "f1"
            assert results.read("f1", tmp_path) is not None
        for path in tmp_path.glob("report.html"):
            assert path.read_text().endswith("</html>\n")
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert results.read("f1", tmp_path) is not None
    (tmp_path / "f1.json").touch()
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert "kept from an earlier run" in done.stderr


@contextlib.contextmanager
def long_run(out: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Start a run of two experiments in two processes; yields the run and the process ids of its workers."""
    children = Path("/proc/self/task")
    if not children.is_dir():
        pytest.skip("the test reads the children of a process from /proc, which this system does not have")
    # A shell ignores SIGINT in background jobs, and a child process inherits that: restore the handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command("f1", "f2", "--jobs", 2, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    try:
        workers: list[int] = []
        until = time.monotonic() + 30
        while len(workers) < 2 and time.monotonic() < until:
            time.sleep(0.1)
            listed = [
                pid
                for task in Path(f"/proc/{process.pid}/task").iterdir()
                for pid in (task / "children").read_text().split()
            ]
            workers = [int(pid) for pid in listed if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(workers) == 2
        time.sleep(3)  # both workers import the package or run an experiment
        yield process, workers
    finally:
        process.kill()
        process.communicate()


def gone(pid: int) -> bool:
    """Whether a process ended; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids: list[int]) -> bool:
    until = time.monotonic() + 20
    while not all(map(gone, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return all(map(gone, pids))


def test_an_interrupt_ends_all_processes_and_reports_finished_experiments(tmp_path: Path) -> None:
    with long_run(tmp_path) as (process, workers):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 130
        assert "Stopped. 0 of 2 are finished" in errors
        assert "Traceback" not in errors
        assert all_gone(workers)


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    with long_run(tmp_path) as (process, workers):
        process.kill()
        assert all_gone(workers)

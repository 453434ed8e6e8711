"""Run experiments: reuse stored results, and report an experiment that raises without losing the remaining results."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from noetherflow import _files, _versions
from noetherflow._errors import NoetherflowError
from noetherflow.paper import curves, experiment, page, results
from noetherflow.paper.results import Result
from noetherflow.report.figure import write


@final
@dataclass(frozen=True)
class Task:
    """An experiment to run.

    Args:
        name: Name of the figure.
        config: Settings.
        out: Folder for the results.
        quick: Whether the defaults of the settings were the reduced sizes.
        code: `results.code_version` when the run was planned. Code that changes during the run makes the result stale.
    """

    name: str
    config: Any
    out: Path
    quick: bool
    code: str


@final
@dataclass(frozen=True)
class Ending:
    """The end of an experiment: a result or an error.

    Args:
        name: Name of the figure.
        result: The result; None after an error.
        cached: Whether the result was read from the folder instead of computed.
        error: Type and message of the error; empty for a result.
        trace: Traceback of an unexpected error; empty for a result or a `NoetherflowError`.
    """

    name: str
    result: Result | None = None
    cached: bool = False
    error: str = ""
    trace: str = ""


def run(
    configs: Mapping[str, Any], out: Path, *, quick: bool, force: bool = False, jobs: int = 1
) -> Generator[Ending, None, None]:
    """Run experiments without a valid stored result, and update the report page after each experiment.

    Args:
        configs: Settings of each figure.
        out: Folder for the results and the page.
        quick: Whether the defaults of the settings were the reduced sizes.
        force: Whether to run every experiment, with or without a stored result.
        jobs: Number of processes. With 1, the experiments run in this process. The numbers do not depend on `jobs`.

    Yields:
        An ending for each figure: first the stored results, then each experiment when it ends.
    """
    tasks = [Task(name, config, out, quick, results.code_version(name)) for name, config in configs.items()]
    endings: dict[str, Ending] = {}
    if not force:
        stored = {task.name: results.read(task.name, out) for task in tasks}
        endings = {
            task.name: Ending(task.name, result, cached=True)
            for task in tasks
            if (result := stored[task.name]) is not None and result.key == _key(task)
        }
    todo = [task for task in tasks if task.name not in endings]
    # Before the first experiment: a page of an earlier run may show verdicts of older code.
    _write_page(out, configs, endings)
    yield from endings.values()
    # `closing` ends the worker processes after an error or an interrupt, too.
    with contextlib.closing(_pooled(todo, jobs) if min(jobs, len(todo)) > 1 else run_serially(todo)) as pending:
        for ending in pending:
            endings[ending.name] = ending
            _write_page(out, configs, endings)
            yield ending


def run_serially(tasks: Sequence[Task]) -> Generator[Ending, None, None]:
    """Run tasks in sequence in this process.

    Args:
        tasks: The experiments.

    Yields:
        An ending for each task.
    """
    for task in tasks:
        yield attempt(task)


def attempt(task: Task) -> Ending:
    """Run an experiment; an exception becomes an ending with an error."""
    try:
        return Ending(task.name, execute(task))
    except NoetherflowError as error:
        return Ending(task.name, error=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Ending(task.name, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def execute(task: Task) -> Result:
    """Run an experiment and write its PNG, SVG and JSON files, each atomically."""
    module, name = experiment.load(task.name), task.name
    start = time.perf_counter()
    # One thread: the order of summation depends on the number of threads, and changes the last digit of a sum.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcome = module.run(task.config)
        claims = tuple(module.claims(task.config, outcome))
        seconds = time.perf_counter() - start
        figure = module.plot(task.config, outcome)
        panels = curves.panels_of(figure)
    finally:
        torch.set_num_threads(threads)
    result = Result(
        name=name,
        title=module.TITLE,
        quick=task.quick,
        settings=_files.finite(dataclasses.asdict(task.config)),
        command=experiment.command(name, task.config, task.out, quick=task.quick),
        claims=claims,
        panels=tuple(panel.to_json() for panel in panels),
        seconds=seconds,
        versions=_versions.versions(),
        code=task.code,
        key=_key(task),
    )
    # Remove the JSON file first and write it last: a JSON file guarantees that the pictures belong to the same run.
    (task.out / f"{name}.json").unlink(missing_ok=True)
    for suffix in results.PICTURES:
        write(figure, task.out / f"{name}{suffix}")
    results.write(result, task.out)
    return result


def _pooled(tasks: Sequence[Task], jobs: int) -> Generator[Ending, None, None]:
    """Run tasks in worker processes; yields an ending when a task ends."""
    # Spawn instead of fork: a forked copy of a process whose threads hold locks can hang.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker)
    unfinished = []
    try:
        waiting = {pool.submit(attempt, task): task for task in tasks}
        for future in as_completed(waiting):
            try:
                yield future.result()
            except BrokenProcessPool:
                unfinished.append(waiting[future])
        pool.shutdown()
    finally:
        # After success no process is left. After an interrupt or an error, end the workers instead of waiting for them.
        pool.shutdown(wait=False, cancel_futures=True)
        left = set(multiprocessing.active_children()) - before
        for process in left:
            process.terminate()
        for process in left:
            process.join(5)
            process.kill()
    if len(tasks) == 1 and unfinished:
        yield Ending(tasks[0].name, error="the worker process died: it was killed, or out of memory")
        return
    # A process that dies breaks the pool, which does not report the task that died: run each task in a separate pool.
    for task in unfinished:
        yield from _pooled([task], 1)


def _start_worker() -> None:
    """Ignore SIGINT, which the parent handles, and exit when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _key(task: Task) -> str:
    """`results.key_of` for a task."""
    return results.key_of(task.name, dataclasses.asdict(task.config), task.code)


def _write_page(out: Path, configs: Mapping[str, Any], endings: Mapping[str, Ending]) -> None:
    """Write the page: each result of the folder with the current code version, and a note for each other figure."""
    shown: list[Result] = []
    notes: dict[str, str] = {}
    for name in experiment.FIGURES:
        ending = endings.get(name)
        result = ending.result if ending else results.read(name, out) if name not in configs else None
        if result is not None and result.code == results.code_version(name):
            shown.append(result)
        elif result is not None:
            notes[name] = f"out of date: the code has changed since the run. Run {result.command}"
        elif ending is not None:
            notes[name] = ending.error
        else:
            notes[name] = "not finished yet" if name in configs else f"not run yet: noetherflow reproduce {name}"
    page.write(out / "report.html", shown, notes)

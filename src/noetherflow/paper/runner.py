"""Running experiments: what is finished is kept, and one that raises does not take the others with it."""

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


@final
@dataclass(frozen=True)
class Task:
    """One experiment to run, with the code version it was planned under: code that changes since makes it stale."""

    name: str
    config: Any
    out: Path
    quick: bool
    code: str


@final
@dataclass(frozen=True)
class Ending:
    """How one experiment ended: with a result, kept from before or new, or with an error and where it was raised."""

    name: str
    result: Result | None = None
    kept: bool = False
    error: str = ""
    trace: str = ""


def run(
    configs: Mapping[str, Any], out: Path, *, quick: bool, force: bool = False, jobs: int = 1
) -> Generator[Ending, None, None]:
    """Run experiments, or keep what is in the folder already, and keep the page in that folder up to date.

    Args:
        configs: Settings of each figure.
        out: Folder for the results.
        quick: Whether the settings started from the reduced ones.
        force: Whether to run also what is finished.
        jobs: How many processes; with one, everything runs in this process. The numbers are the same.

    Yields:
        One ending per figure, as they come; those that were kept come first.
    """
    tasks = [Task(name, config, out, quick, results.code_version(name)) for name, config in configs.items()]
    endings: dict[str, Ending] = {}
    if not force:
        kept = {task.name: results.read(task.name, out) for task in tasks}
        endings = {
            task.name: Ending(task.name, result, kept=True)
            for task in tasks
            if (result := kept[task.name]) is not None and result.key == _key(task)
        }
    todo = [task for task in tasks if task.name not in endings]
    # At once, so that no page from before shows a verdict that no longer stands.
    _write_page(out, configs, endings)
    yield from endings.values()
    # Closed whichever way this ends, so that no process is left behind.
    with contextlib.closing(_pooled(todo, jobs) if min(jobs, len(todo)) > 1 else map_here(todo)) as coming:
        for ending in coming:
            endings[ending.name] = ending
            _write_page(out, configs, endings)
            yield ending


def map_here(tasks: Sequence[Task]) -> Generator[Ending, None, None]:
    """One after the other in this process.

    Yields:
        An ending per task.
    """
    for task in tasks:
        yield attempt(task)


def attempt(task: Task) -> Ending:
    """Run one experiment; an error it raises is its ending."""
    try:
        return Ending(task.name, execute(task))
    except NoetherflowError as error:
        return Ending(task.name, error=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Ending(task.name, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def execute(task: Task) -> Result:
    """Run one experiment and write its PNG, SVG and JSON, each whole or not at all."""
    module, name = experiment.load(task.name), task.name
    start = time.perf_counter()
    # One thread, always: sums in another order differ in the last digit, and the number of cores is no setting.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcome = module.run(task.config)
        found = tuple(module.claims(task.config, outcome))
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
        claims=found,
        panels=tuple(panel.to_json() for panel in panels),
        seconds=seconds,
        versions=_versions.versions(),
        code=task.code,
        key=_key(task),
    )
    # First out, last in: a JSON file says that the pictures beside it are its own.
    (task.out / f"{name}.json").unlink(missing_ok=True)
    for suffix in results.PICTURES:
        with _files.atomic(task.out / f"{name}{suffix}") as temporary:
            figure.savefig(temporary, dpi=160)
    results.write(result, task.out)
    return result


def _pooled(tasks: Sequence[Task], jobs: int) -> Generator[Ending, None, None]:
    """In some processes at a time, as they end."""
    # Not forked: a copy of a process whose threads hold locks hangs.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker)
    lost = []
    try:
        waiting = {pool.submit(attempt, task): task for task in tasks}
        for future in as_completed(waiting):
            try:
                yield future.result()
            except BrokenProcessPool:
                lost.append(waiting[future])
        pool.shutdown()
    finally:
        # Nothing is left to end where all went well. After an interrupt or an error here nobody waits for the rest.
        pool.shutdown(wait=False, cancel_futures=True)
        left = set(multiprocessing.active_children()) - before
        for process in left:
            process.terminate()
        for process in left:
            process.join(5)
            process.kill()
    if len(tasks) == 1 and lost:
        yield Ending(tasks[0].name, error="its process died: killed, or out of memory")
        return
    # A process that dies takes the pool with it, and does not say whose it was: each gets a pool of its own.
    for task in lost:
        yield from _pooled([task], 1)


def _start_worker() -> None:
    """An interrupt is the parent's affair, and where the parent is killed its workers do not wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _key(task: Task) -> str:
    return results.key_of(task.name, dataclasses.asdict(task.config), task.code)


def _write_page(out: Path, configs: Mapping[str, Any], endings: Mapping[str, Ending]) -> None:
    """All figures of the folder, whether asked for this time or before, as far as they still stand."""
    shown: list[Result] = []
    notes: dict[str, str] = {}
    for name in experiment.FIGURES:
        ending = endings.get(name)
        result = ending.result if ending else results.read(name, out) if name not in configs else None
        if result is not None and result.code == results.code_version(name):
            shown.append(result)
        elif result is not None:
            notes[name] = f"out of date: the code has changed since. Run {result.command}"
        elif ending is not None:
            notes[name] = ending.error
        else:
            notes[name] = "not finished yet" if name in configs else f"not run yet: noetherflow reproduce {name}"
    page.write(out / "report.html", shown, notes)

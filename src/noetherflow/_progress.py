"""One progress display for every long job, with a bar for each job inside another."""

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
# The display on the screen, if there is one: a second would write over it.
_shown: list[Progress] = []


def track(items: Iterable[T], description: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Iterate with a progress bar on standard error; silent where that is not a terminal, and in worker processes."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal) or multiprocessing.parent_process() is not None:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as stack:
        if not _shown:
            _shown.append(stack.enter_context(Progress(*columns, console=console, transient=True)))
            stack.callback(_shown.clear)
        progress = _shown[0]
        bar = progress.add_task(description, total=total)
        stack.callback(progress.remove_task, bar)
        yield from progress.track(items, total=total, task_id=bar)

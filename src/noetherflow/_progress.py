"""One progress display for every long job, with a bar for each job inside another."""

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
# The display on the screen, if there is one: a second would write over it.
_shown: list[Any] = []


def track(items: Iterable[T], description: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Iterate with a progress bar on standard error.

    Silent where standard error is not a terminal, in worker processes, and where rich is not installed.

    Yields:
        The items, as they come.
    """
    display = _display() if shown and multiprocessing.parent_process() is None else None
    if display is None:
        yield from items
        return
    with contextlib.ExitStack() as stack:
        if not _shown:
            _shown.append(stack.enter_context(display))
            stack.callback(_shown.clear)
        progress = _shown[0]
        bar = progress.add_task(description, total=total)
        stack.callback(progress.remove_task, bar)
        yield from progress.track(items, total=total, task_id=bar)


def _display() -> Any:
    """A display that draws nothing yet; None where there is no terminal, or nothing to draw with."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True) if console.is_terminal else None

"""Progress bars of long loops; nested loops share one display on the terminal."""

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
# The display on the terminal, or nothing. A second display would write over the first.
_shown: list[Any] = []


def track(items: Iterable[T], description: str, *, total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Iterate over items with a progress bar on standard error.

    There is no bar where standard error is not a terminal, in worker processes, and without the package rich.

    Args:
        items: The items.
        description: Text in front of the bar.
        total: Number of items; None if it is unknown.
        shown: False for no bar.

    Yields:
        The items.
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
    """A display without bars; None if standard error is not a terminal, or if rich is not installed."""
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

"""The block of a step, entered in a hook of a trainer and left in another."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import final


@final
class Block:
    """The block of a step that is entered in a hook of the trainer and left in another.

    Args:
        context: What `NoiseScale.step` gives.
        due: Whether this step is measured.
    """

    def __init__(self, context: AbstractContextManager[Callable[..., None]], *, due: bool) -> None:
        self._context, self.due = context, due
        self.done = context.__enter__()
        self.microbatches = 0

    def close(self) -> None:
        """Leave the block, and measure."""
        self._context.__exit__(None, None, None)

    def abandon(self) -> None:
        """Leave the block as an exception does, which measures nothing."""
        unfinished = _Unfinished()
        self._context.__exit__(_Unfinished, unfinished, None)


@final
class _Unfinished(Exception):
    """A step ended without a backward pass."""

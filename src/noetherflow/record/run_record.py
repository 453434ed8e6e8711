"""The record of a run: a line of JSON per step, which survives a kill and continues where training continues."""

import json
import math
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

from noetherflow import _files
from noetherflow._errors import FileError, SettingsError
from noetherflow.record.rows import Columns, Row, Steps, columns_of

FILE = "metrics.jsonl"
_STEP = "step"
# JSON has no infinities. The words are those that `float` of Python and `Number` of JavaScript read.
_WORDS = {math.inf: "Infinity", -math.inf: "-Infinity"}


@final
class RunRecord:
    r"""The metrics of a training run in a file, a line per step, to be shown by `noetherflow watch`.

    The file is `folder/metrics.jsonl`. Each line is a JSON object with the step and the metrics of that step. NaN is
    written as `null` and infinities as the strings `"Infinity"` and `"-Infinity"`, so that every JSON reader can read
    the file; a finite number is read back with the same bits.

    A training that resumes from a checkpoint appends a step that the file already has. Lines from that step on belong
    to the training that was given up, and are dropped, so that curves continue as if nothing had happened. A last line
    that is incomplete, because the process was killed while writing, is ignored by `read` and dropped by `append`.
    While a process appends, other processes may read. Only a single process may append.

    Args:
        folder: The folder of the run. `append` creates it.

    Examples:
        >>> import tempfile
        >>> import noetherflow as nf
        >>> folder = tempfile.mkdtemp()
        >>> record = nf.RunRecord(folder)
        >>> for step in (0, 20, 40):
        ...     record.append(step, {"noise/scale": 100.0 + step, "noise/scale_high": float("inf")})
        >>> record = nf.RunRecord(folder)  # resumed from a checkpoint of step 20
        >>> record.append(20, {"noise/scale": 125.0})
        >>> steps, columns = record.read()
        >>> steps.tolist(), columns["noise/scale"].tolist()
        ([0, 20], [100.0, 125.0])
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / FILE
        # Size and inode of the file after the last append, and its last step: what was not written here is read again.
        self._known: tuple[int, int] | None = None
        self._last: int | None = None
        self._metrics: dict[str, float] = {}

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, all in a single call, and flush them.

        Args:
            step: The step of training, 0 or larger. If the file has it already, lines from this step on are replaced;
                metrics of the step that was appended last by this object are kept beside the new metrics. So count
                steps alike for all metrics: a smaller number, such as that of an epoch, takes a run back.
            metrics: Metrics by name: floats, or what `float` converts. NaN and infinities are allowed.

        Raises:
            SettingsError: If the step is no integer of at least 0, or if a metric is no number or is named `step`.
            FileError: If the file cannot be written, or if an earlier line of it is damaged.
        """
        further = self._known is not None and step == self._last
        metrics = (self._metrics if further else {}) | dict(metrics)
        line = _line(step, metrics)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._known is None or self._known != _identity(self._path):
                self._known = None
                self._take_over(step, line)
            elif self._last is not None and step <= self._last:
                self._take_over(step, line)
            else:
                with self._path.open("ab", buffering=0) as file:
                    file.write(line)
            self._known, self._last, self._metrics = _identity(self._path), int(step), metrics
        except OSError as error:
            raise FileError(
                f"{self._path} cannot be written: {error}; check the path, its permissions and the free space"
            ) from error

    def read(self) -> tuple[Steps, Columns]:
        """Read what was recorded.

        Returns:
            Steps of shape (N,), int64 in ascending order, and for every metric a column of shape (N,), float64, with
            NaN where a step has no such metric.

        Raises:
            FileError: If there is no such file, or if a line other than the last is damaged.
        """
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise FileError(f"{self._path} cannot be read: {error}; check the path and its permissions") from error
        return columns_of(row for row, _ in _rows(content, self._path))

    def _take_over(self, step: int, line: bytes) -> None:
        """Keep the complete lines of smaller steps, and add a line, completely or not at all."""
        content = self._path.read_bytes() if self._path.exists() else b""
        kept = b"".join(text for (earlier, _), text in _rows(content, self._path) if earlier < step)
        with _files.atomic(self._path) as temporary:
            temporary.write_bytes(kept + line)


def _identity(path: Path) -> tuple[int, int] | None:
    """Size and inode of a file; None if there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_size, state.st_ino


def _line(step: int, metrics: Mapping[str, float]) -> bytes:
    """The line of a step."""
    try:
        step = operator.index(step)
    except TypeError as error:
        raise SettingsError(f"a step must be an integer of at least 0, got {step!r}") from error
    if step < 0:
        raise SettingsError(f"a step must be an integer of at least 0, got {step!r}")
    if _STEP in metrics:
        raise SettingsError(f"a metric may not be named {_STEP!r}: the step of training has this name; rename it")
    values: dict[str, object] = {_STEP: step}
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingsError(f"metric {name!r} must be a single number, got {value!r}: {error}") from error
        values[str(name)] = None if math.isnan(number) else _WORDS.get(number, number)
    return json.dumps(values, allow_nan=False).encode("ascii") + b"\n"


def _rows(content: bytes, path: Path) -> Iterator[tuple[Row, bytes]]:
    """The rows of a file with their lines, without a damaged last line."""
    lines = content.splitlines(keepends=True)
    for index, text in enumerate(lines):
        row = _row(text) if text.endswith(b"\n") else None
        if row is not None:
            yield row, text
        elif index + 1 < len(lines):
            raise FileError(
                f"{path}, line {index + 1}: expected a JSON object with an integer {_STEP!r} and numbers, "
                f"got {text[:60]!r}; remove that line"
            )


def _row(text: bytes) -> Row | None:
    """The step and the metrics of a line; None if the line is damaged."""
    try:
        values = json.loads(text)
        step = values.pop(_STEP)
        metrics = {name: math.nan if value is None else float(value) for name, value in values.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return (step, metrics) if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None

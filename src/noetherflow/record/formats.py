"""The metrics of a run, from the record of this package or from the files of other trainers.

| file | who writes it | which metrics are read |
|---|---|---|
| `metrics.jsonl` | `RunRecord` | all |
| `metrics.csv` | `CSVLogger` of Lightning | those that `names` lists |
| `trainer_state.json`, also in the last `checkpoint-N` | `Trainer` of Hugging Face | those that `names` lists |
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from noetherflow._errors import FileError
from noetherflow.record import names
from noetherflow.record.rows import Columns, Row, Steps, columns_of
from noetherflow.record.run_record import FILE, RunRecord

_CSV, _STATE = "metrics.csv", "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NAMED = 5


@final
@dataclass(frozen=True)
class Run:
    """The metrics of a run.

    Args:
        name: The name of the folder.
        source: The file.
        steps: Steps (N,), in ascending order.
        columns: By metric, a column (N,) with NaN where a step has no such metric.
    """

    name: str
    source: Path
    steps: Steps
    columns: Columns


def read_run(folder: str | Path) -> Run:
    """Read the metrics of a run.

    Args:
        folder: A folder with one of the files of the table above.

    Returns:
        The run.

    Raises:
        FileError: If the folder has none of the files, or if a file is damaged or holds no metric of this package.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileError(f"{folder} {what}: give the folder of a run, which holds {FILE}, {_CSV} or {_STATE}")
    if (folder / FILE).exists():
        source = folder / FILE
        steps, columns = RunRecord(folder).read()
    else:
        source, rows = _foreign(folder)
        steps, columns = columns_of(rows(source))
    if not columns:
        raise FileError(
            f"{source} holds no metric of noetherflow, such as noise/scale or charge/SYMMETRY: "
            f"record them with nf.RunRecord, or let the logger of the trainer record them"
        )
    return Run(folder.resolve().name, source, steps, columns)


def _foreign(folder: Path) -> tuple[Path, Callable[[Path], Iterator[Row]]]:
    """The file of another trainer in a folder, and the function that reads it."""
    if (folder / _CSV).exists():
        return folder / _CSV, _rows_of_csv
    if (folder / _STATE).exists():
        return folder / _STATE, _rows_of_state
    states = {
        int(match[1]): path for path in folder.glob(f"*/{_STATE}") if (match := _CHECKPOINT.fullmatch(path.parent.name))
    }
    if states:
        return states[max(states)], _rows_of_state
    below = sorted({str(path.parent) for name in (FILE, _CSV, _STATE) for path in folder.glob(f"*/**/{name}")})
    more = f" and {len(below) - _NAMED} more" if len(below) > _NAMED else ""
    hint = (
        f"give one of the folders below that do: {', '.join(below[:_NAMED])}{more}" if below else "give another folder"
    )
    raise FileError(f"{folder} holds none of {FILE}, {_CSV} and {_STATE}: {hint}")


def _rows_of_csv(path: Path) -> Iterator[Row]:
    """The rows of `CSVLogger`: empty cells where a row has no such metric, often several rows for a step."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if "step" not in (table.fieldnames or ()):
                raise FileError(f"{path} has no column 'step': expected the file of CSVLogger of Lightning")
            for row in table:
                # A last line that is being written may lack cells, whose value is then None.
                chosen = {key: row[key] for key in row if key and row[key] and names.split(key)}
                if chosen:
                    yield _row(row["step"], chosen, f"{path}, line {table.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _rows_of_state(path: Path) -> Iterator[Row]:
    """The entries of the log of `Trainer`."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise FileError(f"{path} has no list 'log_history' of objects: expected the file of Trainer of Hugging Face")
    for index, entry in enumerate(history):
        chosen = {key: value for key, value in entry.items() if names.split(key) and value is not None}
        if chosen:
            yield _row(entry.get("step"), chosen, f"{path}, log_history[{index}]")


def _row(step: object, metrics: Mapping[str, object], where: str) -> Row:
    """A row from texts or numbers."""
    try:
        number = float(str(step))
        if not number.is_integer():
            raise ValueError(f"the step is {step}")
        return int(number), {key: float(str(value)) for key, value in metrics.items()}
    except ValueError as error:
        raise FileError(f"{where}: expected an integer step and numbers: {error}; remove that row") from error


def _unreadable(path: Path, error: Exception) -> FileError:
    return FileError(f"{path} cannot be read: {error}; check that the file is complete and that you may read it")

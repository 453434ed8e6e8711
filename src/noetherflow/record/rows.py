"""Rows of metrics, each with its step, as columns over the steps."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Steps = NDArray[np.int64]
Columns = dict[str, NDArray[np.float64]]
Row = tuple[int, Mapping[str, float]]


def columns_of(rows: Iterable[Row]) -> tuple[Steps, Columns]:
    """Steps in ascending order, and for each metric a column over them.

    Args:
        rows: Rows in the order in which they were written. Rows of equal steps are joined. A step that is smaller than
            the step before begins a resumed run: rows from that step on are dropped.

    Returns:
        Steps (N,), and columns (N,) with NaN where a row has no such metric, in the order in which metrics occur.
    """
    joined: dict[int, dict[str, float]] = {}
    last = None
    for step, metrics in rows:
        if last is not None and step < last:
            joined = {kept: values for kept, values in joined.items() if kept < step}
        joined.setdefault(step, {}).update(metrics)
        last = step
    keys = dict.fromkeys(key for metrics in joined.values() for key in metrics)
    columns = {key: np.full(len(joined), np.nan) for key in keys}
    for index, metrics in enumerate(joined.values()):
        for key, value in metrics.items():
            columns[key][index] = value
    return np.fromiter(joined, np.int64, len(joined)), columns

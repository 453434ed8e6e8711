"""Metrics of a training run: written a line per step, and read from the files of several trainers."""

from noetherflow.record.formats import Run, read_run
from noetherflow.record.run_record import RunRecord

__all__ = ["Run", "RunRecord", "read_run"]

"""Finding the symmetries of any model."""

from noetherflow.detect.explanation import AxisNote, Explanation, Finding
from noetherflow.detect.find import explain, find_symmetries

__all__ = ["AxisNote", "Explanation", "Finding", "explain", "find_symmetries"]

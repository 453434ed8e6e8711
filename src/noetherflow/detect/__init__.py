"""Finding the symmetries of any model."""

from noetherflow.detect.explanation import AxisNote, Explanation, Finding
from noetherflow.detect.exponents import ScalingExponents
from noetherflow.detect.find import find_symmetries
from noetherflow.detect.operation import Operation
from noetherflow.detect.rules import exponent_rule

__all__ = [
    "AxisNote",
    "Explanation",
    "Finding",
    "Operation",
    "ScalingExponents",
    "exponent_rule",
    "find_symmetries",
]

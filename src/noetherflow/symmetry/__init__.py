"""What a symmetry is: groups that act on named parameters."""

from noetherflow.symmetry.axes import AxisSymmetry, along_axes
from noetherflow.symmetry.axis import Axis
from noetherflow.symmetry.base import Action, Grams, Symmetry
from noetherflow.symmetry.dense import DenseSymmetry
from noetherflow.symmetry.diagonal import DiagonalSymmetry
from noetherflow.symmetry.matrix import MatrixSymmetry
from noetherflow.symmetry.scalar import ScalarSymmetry

__all__ = [
    "Action",
    "Axis",
    "AxisSymmetry",
    "DenseSymmetry",
    "DiagonalSymmetry",
    "Grams",
    "MatrixSymmetry",
    "ScalarSymmetry",
    "Symmetry",
    "along_axes",
]

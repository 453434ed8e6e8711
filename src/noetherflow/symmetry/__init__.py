"""What a symmetry is: groups that act on named parameters."""

from noetherflow.symmetry.axis import Axis
from noetherflow.symmetry.base import Grams, Symmetry
from noetherflow.symmetry.dense import DenseSymmetry
from noetherflow.symmetry.diagonal import DiagonalSymmetry
from noetherflow.symmetry.matrix import MatrixSymmetry
from noetherflow.symmetry.scalar import ScalarSymmetry

__all__ = ["Axis", "DenseSymmetry", "DiagonalSymmetry", "Grams", "MatrixSymmetry", "ScalarSymmetry", "Symmetry"]

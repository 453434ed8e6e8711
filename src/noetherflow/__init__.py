"""noetherflow: parameter symmetry and gradient noise in deep learning."""

from noetherflow import linear
from noetherflow._analyze import Analysis, SymmetryReport, analyze
from noetherflow._drift import drift, expected_step
from noetherflow._errors import (
    CoupledExamplesError,
    EmptyDataError,
    EquilibriumError,
    FrozenParameterError,
    FunctionChangedError,
    LossError,
    NoetherflowError,
    NonFiniteError,
    NotASymmetryError,
    ParameterNameError,
    ParameterShapeError,
    SettingsError,
    TraceError,
    UserFileError,
)
from noetherflow._optimizers import SGD
from noetherflow._rebalance import rebalance_
from noetherflow._types import Batch, Loss, Params
from noetherflow._verify import Residual, verify_symmetry
from noetherflow.detect import AxisNote, Explanation, Finding, explain, find_symmetries
from noetherflow.discover import (
    Blocks,
    Completeness,
    Discovery,
    Rescalings,
    check_completeness,
    discover_blocks,
    discover_generators,
    discover_rescalings,
)
from noetherflow.equilibrium import Equilibrium, Outcome, Status, potential, solve_equilibrium
from noetherflow.noise import MicrobatchMeter, NoiseMeter, NoiseMoments, estimate_noise
from noetherflow.simulation import GradientDescent, GradientFlow, Langevin, NoetherFlow, Trajectory, simulate
from noetherflow.symmetry import Axis, DenseSymmetry, DiagonalSymmetry, Grams, MatrixSymmetry, ScalarSymmetry, Symmetry

__all__ = [
    "Analysis",
    "Axis",
    "AxisNote",
    "Batch",
    "Blocks",
    "Completeness",
    "CoupledExamplesError",
    "DenseSymmetry",
    "DiagonalSymmetry",
    "Discovery",
    "EmptyDataError",
    "Equilibrium",
    "EquilibriumError",
    "Explanation",
    "Finding",
    "FrozenParameterError",
    "FunctionChangedError",
    "GradientDescent",
    "GradientFlow",
    "Grams",
    "Langevin",
    "Loss",
    "LossError",
    "MatrixSymmetry",
    "MicrobatchMeter",
    "NoetherFlow",
    "NoetherflowError",
    "NoiseMeter",
    "NoiseMoments",
    "NonFiniteError",
    "NotASymmetryError",
    "Outcome",
    "ParameterNameError",
    "ParameterShapeError",
    "Params",
    "Rescalings",
    "Residual",
    "SGD",
    "ScalarSymmetry",
    "SettingsError",
    "Status",
    "Symmetry",
    "SymmetryReport",
    "TraceError",
    "Trajectory",
    "UserFileError",
    "analyze",
    "check_completeness",
    "discover_blocks",
    "discover_generators",
    "discover_rescalings",
    "drift",
    "estimate_noise",
    "expected_step",
    "explain",
    "find_symmetries",
    "linear",
    "potential",
    "rebalance_",
    "simulate",
    "solve_equilibrium",
    "verify_symmetry",
]

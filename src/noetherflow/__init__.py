"""noetherflow: parameter symmetry and gradient noise in deep learning."""

from noetherflow import linear
from noetherflow._analysis import Analysis, SymmetryReport
from noetherflow._analyze import analyze
from noetherflow._drift import drift, expected_step
from noetherflow._errors import (
    CoupledExamplesError,
    EmptyDataError,
    EquilibriumError,
    FileError,
    FrozenParameterError,
    FunctionChangedError,
    HiddenParameterError,
    LossError,
    MissingExtraError,
    NoetherflowError,
    NonFiniteError,
    NotASymmetryError,
    ParameterNameError,
    ParameterShapeError,
    RankError,
    SettingsError,
    TraceError,
    UserFileError,
)
from noetherflow._explain import explain
from noetherflow._rebalance import rebalance_
from noetherflow._second_moments import SecondMoments, second_moments
from noetherflow._types import Batch, Loss, Params
from noetherflow._undo import Rebalanced
from noetherflow._verify import Residual, verify_symmetry
from noetherflow._versions import __version__
from noetherflow.detect import (
    AxisNote,
    Explanation,
    Finding,
    Operation,
    ScalingExponents,
    exponent_rule,
    find_symmetries,
)
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
from noetherflow.equilibrium import Equilibrium, Imbalance, Outcome, Status, equilibrate, potential, solve_equilibrium
from noetherflow.forecasting import Forecast, forecast
from noetherflow.ledger import ChargeLedger, ChargeParts
from noetherflow.noise import MicrobatchMeter, NoiseMeter, NoiseMoments, StepNoise, estimate_noise, gradient_rule
from noetherflow.optimizers import SGD, AdamW
from noetherflow.record import RunRecord
from noetherflow.simulation import GradientDescent, GradientFlow, Langevin, NoetherFlow, Trajectory, simulate
from noetherflow.symmetry import (
    Action,
    Axis,
    AxisSymmetry,
    DenseSymmetry,
    DiagonalSymmetry,
    Grams,
    MatrixSymmetry,
    ScalarSymmetry,
    Symmetry,
)
from noetherflow.watching import NoiseScale, ScaleEstimate

__all__ = [
    "Action",
    "AdamW",
    "Analysis",
    "Axis",
    "AxisNote",
    "AxisSymmetry",
    "Batch",
    "Blocks",
    "ChargeLedger",
    "ChargeParts",
    "Completeness",
    "CoupledExamplesError",
    "DenseSymmetry",
    "DiagonalSymmetry",
    "Discovery",
    "EmptyDataError",
    "Equilibrium",
    "EquilibriumError",
    "Explanation",
    "FileError",
    "Finding",
    "Forecast",
    "FrozenParameterError",
    "FunctionChangedError",
    "GradientDescent",
    "GradientFlow",
    "Grams",
    "HiddenParameterError",
    "Imbalance",
    "Langevin",
    "Loss",
    "LossError",
    "MatrixSymmetry",
    "MicrobatchMeter",
    "MissingExtraError",
    "NoetherFlow",
    "NoetherflowError",
    "NoiseMeter",
    "NoiseMoments",
    "NoiseScale",
    "NonFiniteError",
    "NotASymmetryError",
    "Operation",
    "Outcome",
    "ParameterNameError",
    "ParameterShapeError",
    "Params",
    "RankError",
    "Rebalanced",
    "Rescalings",
    "Residual",
    "RunRecord",
    "SGD",
    "ScalarSymmetry",
    "ScaleEstimate",
    "ScalingExponents",
    "SecondMoments",
    "SettingsError",
    "Status",
    "StepNoise",
    "Symmetry",
    "SymmetryReport",
    "TraceError",
    "Trajectory",
    "UserFileError",
    "__version__",
    "analyze",
    "check_completeness",
    "discover_blocks",
    "discover_generators",
    "discover_rescalings",
    "drift",
    "equilibrate",
    "estimate_noise",
    "expected_step",
    "explain",
    "exponent_rule",
    "find_symmetries",
    "forecast",
    "gradient_rule",
    "linear",
    "potential",
    "rebalance_",
    "second_moments",
    "simulate",
    "solve_equilibrium",
    "verify_symmetry",
]

"""What can go wrong: a class per cause, so that callers can catch exactly what they mean."""


class NoetherflowError(Exception):
    """Any error raised on purpose by this package."""


class SettingsError(NoetherflowError, ValueError):
    """A setting (learning rate, batch size, ...) is outside the range where the theory means anything."""


class ParameterNameError(NoetherflowError, LookupError):
    """A symmetry or a set of tensors names parameters that are not there."""


class HiddenParameterError(NoetherflowError, RuntimeError):
    """The loss reaches a parameter by another road than the attribute of its module."""


class ParameterShapeError(NoetherflowError, ValueError):
    """A tensor does not have the shape, size or rank that was promised."""


class FrozenParameterError(NoetherflowError, ValueError):
    """A symmetry would move a parameter that does not require gradients."""


class NotASymmetryError(NoetherflowError, ValueError):
    """The declared transformation changes the loss of at least one example."""


class LossError(NoetherflowError, ValueError):
    """The loss does not return one differentiable floating-point number per example."""


class CoupledExamplesError(NoetherflowError, ValueError):
    """The loss of one example depends on the others in its batch, so it has no gradient of its own."""


class NonFiniteError(NoetherflowError, ArithmeticError):
    """A loss, a gradient or a parameter is NaN or infinite."""


class EmptyDataError(NoetherflowError, ValueError):
    """There was no example to measure."""


class RankError(NoetherflowError, RuntimeError):
    """A rank of a process group did not come to put together what each rank measured."""


class EquilibriumError(NoetherflowError, ArithmeticError):
    """The noise equilibrium does not exist, or the solver did not reach it."""


class FunctionChangedError(NoetherflowError, RuntimeError):
    """A move that should have left the function unchanged did not; the model was put back."""


class TraceError(NoetherflowError, RuntimeError):
    """The computation of a model cannot be written down as a graph."""


class MissingExtraError(NoetherflowError, ImportError):
    """A package that only some functions need is not installed."""


class UserFileError(NoetherflowError, ValueError):
    """A file given on the command line does not define what it should."""


class FileError(NoetherflowError, ValueError):
    """A file cannot be read or written, or does not hold the result that was expected."""

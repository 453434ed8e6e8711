"""The result of a solver, in values and in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, final

from torch import Tensor

from noetherflow.symmetry import Symmetry


@final
class Status(Enum):
    """How the search for an equilibrium ended; the value is the sentence to read. From best to worst.

    Examples:
        >>> import noetherflow as nf
        >>> print(nf.Status.AT_INFINITY.value)
        along some directions the equilibrium lies at infinity; these directions were left where they are
    """

    CONVERGED = "every drift is zero"
    SINGULAR = (
        "some directions have neither noise nor weight decay and rest at any point; they were left where they are"
    )
    AT_INFINITY = "along some directions the equilibrium lies at infinity; these directions were left where they are"
    NOT_CONVERGED = "the iteration stopped before every drift was zero"
    NON_FINITE = "the noise or the parameters hold NaN or infinity"

    @property
    def severity(self) -> int:
        """0 for converged, growing."""
        return list(Status).index(self)


@final
@dataclass(frozen=True)
class Outcome:
    """How the search ended for a symmetry.

    Args:
        status: The kind of ending.
        message: Which directions, why, and what to do; empty when all is well.
        directions: The rows (for a matrix symmetry, the number of directions) that were left where they are.

    Examples:
        >>> import noetherflow as nf
        >>> nf.Outcome(nf.Status.CONVERGED).status.name
        'CONVERGED'
    """

    status: Status
    message: str = ""
    directions: tuple[int, ...] = ()


class OrbitMinimum(NamedTuple):
    """The minimum of the potential on an orbit: everything by symmetry name; times in units of lr * steps."""

    coordinates: dict[str, Tensor]
    drift: dict[str, Tensor]
    relaxation: dict[str, Tensor]
    outcomes: dict[str, Outcome]
    iterations: int


@final
@dataclass(frozen=True)
class Equilibrium:
    """The noise equilibrium of a model: where SGD takes its charges, and how long that takes.

    Args:
        params: All parameters at the equilibrium, float64, by name.
        coordinates: Per symmetry, the group element that leads there: x for the action e^{+-x}.
        outcomes: Per symmetry, how the search ended.
        drift: Per symmetry, the drift that is left, in the units of `drift`.
        relaxation_steps: Per symmetry, the number of SGD steps in which a small departure of one coordinate shrinks by
            e, the others held; infinite for directions that were left alone. For a matrix, its slowest direction.
        potential_before: The potential 2 gamma |theta|^2 + sigma^2 Tr Sigma where the model is.
        potential_after: The potential at the equilibrium.
        trace_before: Tr Sigma, per example, where the model is.
        trace_after: Tr Sigma at the equilibrium.
        iterations: Newton steps taken, the most over all sets of symmetries that share tensors.
        symmetries: The symmetries, under canonical parameter names.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr=0.1, batch_size=8), net)
        >>> equilibrium.trace_after < equilibrium.trace_before
        True
    """

    params: dict[str, Tensor] = field(repr=False)
    coordinates: dict[str, Tensor] = field(repr=False)
    outcomes: dict[str, Outcome]
    drift: dict[str, Tensor] = field(repr=False)
    relaxation_steps: dict[str, Tensor] = field(repr=False)
    potential_before: float
    potential_after: float
    trace_before: float
    trace_after: float
    iterations: int
    symmetries: Mapping[str, Symmetry] = field(repr=False)

    @property
    def status(self) -> Status:
        """The worst ending over all symmetries."""
        return max((outcome.status for outcome in self.outcomes.values()), key=lambda status: status.severity)

    @property
    def message(self) -> str:
        """One line per symmetry whose search did not end well."""
        return "\n".join(f"{name}: {outcome.message}" for name, outcome in self.outcomes.items() if outcome.message)

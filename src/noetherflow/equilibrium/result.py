"""The result of a solver, in values and in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow import _store
from noetherflow._errors import ParameterShapeError
from noetherflow._table import Column, Table, html_of, known, starred, steps, text_of
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
    DEGENERATE = "parameters of a complete side of a symmetry are zero, so that it has no equilibrium yet"
    NO_CHARGE = "of some symmetries the optimizer conserves no charge; these symmetries were left where they are"
    NOT_CONVERGED = "the iteration stopped before every drift was zero"
    NON_FINITE = "the noise or the parameters hold NaN or infinity"

    @property
    def severity(self) -> int:
        """0 for converged, growing."""
        return list(Status).index(self)


# Without an equilibrium in any direction, so that no distance to it is known.
NOWHERE = frozenset({Status.DEGENERATE, Status.NO_CHARGE, Status.NON_FINITE})


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
    """The minimum of the potential on an orbit: everything by symmetry name; times in steps."""

    coordinates: dict[str, Tensor]
    drift: dict[str, Tensor]
    relaxation: dict[str, Tensor]
    outcomes: dict[str, Outcome]
    iterations: int


@final
class Imbalance(NamedTuple):
    r"""The relative drift of a symmetry, $|P - R| / |P + R|$, where the model is and at the equilibrium.

    P drives the charge up and R drives it down; norms are over the coordinates that have an equilibrium. 0 is rest, 1
    is a force without a counterforce.

    Examples:
        >>> import noetherflow as nf
        >>> nf.Imbalance(before=0.9, after=1e-12).before
        0.9
    """

    before: float
    after: float


@final
@dataclass(frozen=True)
class Equilibrium:
    """The noise equilibrium of a model: where the optimizer takes its charges, and how long that takes.

    Args:
        params: All parameters at the equilibrium, float64, by name.
        coordinates: Per symmetry, the group element that leads there: x for the action e^{+-x}.
        outcomes: Per symmetry, how the search ended.
        drift: Per symmetry, the drift that is left, in the units of `drift`.
        relaxation_steps: Per symmetry, the number of steps in which a small departure of one coordinate shrinks by e,
            the others and the step sizes held; infinite for directions that were left alone. For a matrix, its slowest
            direction.
        potential_before: The potential where the model is: for SGD 2 gamma |theta|^2 + sigma^2 Tr Sigma.
        potential_after: The potential at the equilibrium.
        trace_before: Tr Sigma, per example, where the model is; from `second_moments`, the sum of v.
        trace_after: Tr Sigma at the equilibrium.
        iterations: Newton steps taken, the most over all sets of symmetries that share tensors.
        symmetries: The symmetries, under canonical parameter names.
        passes: How often the noise was measured on the way; once if the noise at a single point determines the rest.
        standard_error: Per symmetry, how far the coordinates would fall from these for another sample of the data of
            this size: of the shape of the coordinates, NaN where nothing is known.
        imbalance: Per symmetry, the relative drift on the data that was used.
        holdout: Per symmetry, the relative drift on data that was held out; empty without such data.
        notes: What was left out or done in another way, in sentences.

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
    passes: int = 1
    standard_error: dict[str, Tensor] = field(default_factory=dict, repr=False)
    imbalance: dict[str, Imbalance] = field(default_factory=dict)
    holdout: dict[str, Imbalance] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst ending over all symmetries."""
        statuses = [outcome.status for outcome in self.outcomes.values()]
        return max(statuses, key=lambda status: status.severity, default=Status.CONVERGED)

    @property
    def message(self) -> str:
        """One line per symmetry whose search did not end well."""
        return "\n".join(f"{name}: {outcome.message}" for name, outcome in self.outcomes.items() if outcome.message)

    @property
    def distance(self) -> dict[str, float]:
        """Per symmetry, the root mean square of x over coordinates: weights are a factor e^{x} from the equilibrium."""
        return {name: root_mean_square(x) for name, x in self.coordinates.items()}

    @property
    def error(self) -> dict[str, float]:
        """Per symmetry, the root mean square of the standard error over coordinates: compare with `distance`."""
        return {name: root_mean_square(self.standard_error[name]) for name in self.coordinates}

    @property
    def at_rest(self) -> dict[str, bool]:
        """Per symmetry, whether the distance is below two standard errors: at rest within the error.

        Never where the search did not end well, or a direction has no equilibrium.
        """
        error, rests = self.error, (Status.CONVERGED, Status.SINGULAR)
        return {
            name: self.outcomes[name].status in rests and distance <= 2 * error[name]
            for name, distance in self.distance.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the equilibrium to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by custom `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Equilibrium":
        """Read an equilibrium that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The equilibrium, on the CPU.

        Raises:
            FileError: If the file is missing, damaged, or holds something else.
        """
        return _store.load(cls, path, require_consistent)

    def __str__(self) -> str:
        return text_of(_tables(self))

    def _repr_html_(self) -> str:
        return html_of(_tables(self))


def root_mean_square(coordinates: Tensor) -> float:
    """Root mean square over coordinates, or over the eigenvalues of a matrix."""
    rows = coordinates.shape[0] if coordinates.ndim else 1
    return float((coordinates.square().sum() / rows).sqrt())


def median_and_slowest(times: Tensor) -> tuple[float, float]:
    """The median and the largest of the finite relaxation times; infinity if none is finite."""
    finite = times[torch.isfinite(times)]
    return (float(finite.median()), float(finite.max())) if len(finite) else (float("inf"), float("inf"))


def ratio(after: float, before: float) -> float:
    """A quotient; NaN where there was nothing before."""
    return after / before if before else float("nan")


def totals(equilibrium: Equilibrium, examples: str = "") -> Table:
    """Noise and potential of all parameters, now and at the equilibrium; `examples` says what was measured."""
    measured = f"{equilibrium.passes} measurement{'s' if equilibrium.passes > 1 else ''}"
    title = f"All parameters ({', '.join(filter(None, (examples, measured)))})"
    pairs = (
        ("gradient noise, Tr Sigma per example", equilibrium.trace_before, equilibrium.trace_after),
        ("potential, decay and noise together", equilibrium.potential_before, equilibrium.potential_after),
    )
    columns = (Column("total", folds=True), *(Column(h, right=True) for h in ("now", "equilibrium", "ratio")))
    rows = ((n, f"{now:.6g}", f"{then:.6g}", known(ratio(then, now), ".4f")) for n, now, then in pairs)
    return Table(title, columns, tuple(rows))


def require_consistent(equilibrium: Equilibrium) -> None:
    """Raise unless the parts of an equilibrium, read from a file, belong together.

    Args:
        equilibrium: The equilibrium.

    Raises:
        ParameterShapeError: If an entry is missing, too many, or not float64 of the expected shape.
        ParameterNameError: If a symmetry names parameters that are not there.
    """
    names = equilibrium.symmetries.keys()
    for what in ("coordinates", "outcomes", "drift", "relaxation_steps", "standard_error", "imbalance"):
        if getattr(equilibrium, what).keys() != names:
            given = sorted(getattr(equilibrium, what))
            raise ParameterShapeError(f"{what} belongs to the symmetries {given}, expected {sorted(names)}")
    for name, symmetry in equilibrium.symmetries.items():
        symmetry.check(equilibrium.params)
        x = symmetry.identity(equilibrium.params)
        for what in ("coordinates", "drift", "standard_error"):
            tensor = getattr(equilibrium, what)[name]
            if tensor.shape != x.shape or tensor.dtype != torch.float64:
                raise ParameterShapeError(
                    f"{what}[{name!r}] has dtype {tensor.dtype}, shape {tuple(tensor.shape)}, expected float64, "
                    f"{tuple(x.shape)}"
                )


def _tables(equilibrium: Equilibrium) -> tuple[Table, ...]:
    """How the search ended for each symmetry, how far and how slow the way is; totals; what the columns mean."""
    legend = (
        ("dist", "distance, rms of x; weights are a factor e^x from the equilibrium"),
        ("error", "standard error of the distance, for another sample; - where it was not measured"),
        ("steps", "median relaxation time: steps in which a departure shrinks by e"),
        ("slowest", "the same for the slowest coordinate that has an equilibrium"),
    )
    rows = []
    notes = [*equilibrium.notes, *starred((name, outcome.message) for name, outcome in equilibrium.outcomes.items())]
    for name, outcome in equilibrium.outcomes.items():
        median, slowest = median_and_slowest(equilibrium.relaxation_steps[name])
        status = outcome.status.name.lower().replace("_", " ")
        # A star points to the note below.
        marked = name + "*" * bool(outcome.message)
        distance, error = (root_mean_square(x[name]) for x in (equilibrium.coordinates, equilibrium.standard_error))
        cells = known(distance, ".3f"), known(error, ".3f"), steps(median), steps(slowest)
        rows.append((marked, status, *(("-",) * len(cells) if outcome.status in NOWHERE else cells)))
    columns = Column("symmetry", folds=True), Column("status"), *(Column(h, right=True) for h, _ in legend)
    return (
        Table("Noise equilibrium", columns, tuple(rows), tuple(notes)),
        totals(equilibrium),
        Table("", (Column("", right=True), Column("", folds=True)), legend),
    )

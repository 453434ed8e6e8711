"""Finding the symmetries of a model: what its graph allows, proved by its numbers."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from noetherflow._errors import NoetherflowError, TraceError
from noetherflow._given import require_loss
from noetherflow._params import padding_rows
from noetherflow._per_example import own_randomness
from noetherflow._precision import TOLERANCES
from noetherflow._types import Batch, Loss
from noetherflow._verify import Residual
from noetherflow.detect.causes import cause_of
from noetherflow.detect.explanation import Explanation, Finding
from noetherflow.detect.families import candidates
from noetherflow.detect.names import named
from noetherflow.detect.proof import prove
from noetherflow.detect.reasons import axis_notes
from noetherflow.detect.solve import solve
from noetherflow.detect.trace import Graph, trace
from noetherflow.detect.walk import walk
from noetherflow.symmetry import Symmetry

# How far from exact a symmetry may be that is called approximate.
APPROXIMATE = 1e-2


def find_symmetries(
    model: nn.Module, loss: Loss, batch: Batch, *, approximate: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Symmetry]:
    r"""Every exponential symmetry of a model's architecture along the axes of its parameters, each one proved.

    The computation of the loss is written down once as a graph. Under a symmetry each tensor in it scales by
    $e^{x w}$, entry by entry, with exponents w that every operation relates to each other; the solutions of these
    linear equations are the symmetries, and those whose indices no operation tells apart act by whole matrices. Each is
    then tried on the numbers, and a candidate that changes a loss is left out with a warning.

    The model's mode counts: what dropout in train mode breaks is not found. Frozen parameters are never moved.

    Args:
        model: The model, in the mode (train or eval) in which it is asked about. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples; what they do not reach (a position, an expert) is not found.
        approximate: Also return symmetries that are exact only up to the `eps` of a normalisation, such as the scale of
            a residual stream; `explain` says how far they are.
        dtype: Precision of the proof; by default float64, or that of the model if it is very large.

    Returns:
        Symmetries by name, such as `{"0 -> 2": DiagonalSymmetry(...)}`, in the order in which the model uses them.

    Raises:
        TraceError: If the computation cannot be written down as a graph; symmetries can then be declared by hand.
        LossError: If the loss does not return one number per example.
        NonFiniteError: If a parameter or a loss is not finite.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batch = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> nf.find_symmetries(net, loss, batch)["0 -> 2"].minus
        (Axis(name='2.weight', dim=1, start=None, stop=None, repeat=1, within=None),)

    Source: Ziyin et al. (2024) for what an exponential symmetry is; the search is this package's own.
    """
    explanation = explain_axes(model, loss, batch, approximate=approximate, dtype=dtype)
    warn_of_rejected(explanation)
    return explanation.symmetries


def warn_of_rejected(explanation: Explanation) -> None:
    """A warning for every candidate that the graph allows and the numbers do not."""
    for finding in explanation.rejected:
        cause = cause_of(finding.residual)
        warnings.warn(
            f"{finding.name}: the graph allows this symmetry, the numbers do not (residual {finding.residual:.1e}); "
            f"it is left out{cause and ': '}{cause}",
            stacklevel=3,
        )


def explain_axes(
    model: nn.Module, loss: Loss, batch: Batch, *, approximate: bool = False, dtype: torch.dtype | None = None
) -> Explanation:
    """The symmetries along axes with their certificates, and for every other axis the reason why it has none.

    Args:
        model: The model.
        loss: `loss(model, batch)`, shape (B,).
        batch: The examples.
        approximate: Include symmetries that are exact only up to the `eps` of a normalisation.
        dtype: Precision of the proofs; None chooses it.

    Returns:
        The explanation, without generators off axes.

    Raises:
        TraceError: If the computation cannot be written down as a graph.
        LossError: If the loss does not return one number per example.
    """
    require_loss(model, loss, batch, "find_symmetries")
    graph = trace(model, loss, batch)
    parameters = dict(model.named_parameters())
    with own_randomness(next((parameter.device for parameter in parameters.values()), torch.device("cpu"))):
        demands = walk(graph, parameters, tolerant=approximate)
    solution = solve(demands)
    allowed = candidates(demands, solution, _order(graph, parameters))
    names = named(allowed)
    symmetries = [candidate.symmetry for candidate in allowed]
    residuals = _proved(symmetries, model, loss, batch, dtype) if allowed else []
    findings = [
        Finding(name, candidate.symmetry, residual, candidate.diagonal, candidate.small)
        for name, candidate, residual in zip(names, allowed, residuals, strict=True)
    ]
    proved = tuple(finding for finding in findings if _is_proved(finding))
    rejected = tuple(finding for finding in findings if not _is_proved(finding))
    padding = padding_rows(model)
    notes = axis_notes(parameters, graph.unreached, demands.unknowns.axes, solution, proved, rejected, padding)
    return Explanation(proved, rejected, tuple(notes))


def _proved(
    symmetries: Sequence[Symmetry], model: nn.Module, loss: Loss, batch: Batch, dtype: torch.dtype | None
) -> list[Residual]:
    """The residuals of symmetries; a loss without a derivative is refused."""
    try:
        return prove(symmetries, model, loss, batch, dtype=dtype)
    except NoetherflowError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise TraceError(
            "symmetries that the graph allows cannot be proved, because the loss of the batch, or its gradient, cannot "
            f"be computed at the parameters of the proof ({type(error).__name__}: {error})"
        ) from error


def _is_proved(finding: Finding) -> bool:
    limit = TOLERANCES[finding.residual.precision].proof
    return finding.residual <= (max(limit, APPROXIMATE) if finding.small else limit)


def _order(graph: Graph, parameters: Iterable[str]) -> dict[str, int]:
    """Parameters in the order in which they are first used."""
    used = [
        graph.parameters[source.name]
        for node in graph.module.graph.nodes
        for source in node.all_input_nodes
        if source.name in graph.parameters
    ]
    return {name: number for number, name in enumerate(dict.fromkeys([*used, *parameters]))}

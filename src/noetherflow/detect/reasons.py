"""For every axis of every parameter: the symmetries that act on the axis, or the operations that forbid any."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from noetherflow.detect.causes import verdict_on
from noetherflow.detect.explanation import AxisNote, Finding
from noetherflow.detect.solve import Solution
from noetherflow.detect.unknowns import AxisUnknowns

_UNREACHED = "not reached by the loss of this batch"
# More operations than these make a reason longer, not clearer.
_MOST = 3


def axis_notes(
    parameters: Mapping[str, nn.Parameter],
    unreached: Collection[str],
    axes: Iterable[AxisUnknowns],
    solution: Solution,
    proved: Sequence[Finding],
    rejected: Sequence[Finding],
    padding: Mapping[str, Sequence[int]],
) -> list[AxisNote]:
    """A note for every axis of every parameter.

    Args:
        parameters: The parameters of the model by canonical name.
        unreached: Parameters that the loss does not depend on.
        axes: The unknowns of the axes of parameters.
        solution: What the demands of the operations leave free.
        proved: The symmetries.
        rejected: Candidates that the numbers refute.
        padding: The padding rows of embeddings by canonical name.

    Returns:
        The notes, parameter by parameter.
    """
    acting, refuted = _by_axis(proved), _by_axis(rejected)
    by_name = {finding.name: finding for finding in rejected}
    unknowns: dict[tuple[str, int], list[int]] = {}
    for axis in axes:
        unknowns.setdefault((axis.parameter, axis.axis), []).extend(axis.ids.tolist())
    notes = []
    for name, parameter in parameters.items():
        for dim in range(max(1, parameter.ndim)):
            names, reason = acting.get((name, dim), []), ""
            if not parameter.requires_grad:
                reason = "frozen"
            elif name in unreached:
                reason = _UNREACHED
            elif not names and (name, dim) in refuted:
                reason = verdict_on([by_name[each] for each in refuted[name, dim]], parameters, padding)
            elif not names:
                reason = _operations(unknowns.get((name, dim), []), solution)
            notes.append(AxisNote(name, dim, tuple(names), reason))
    return notes


def _by_axis(findings: Iterable[Finding]) -> dict[tuple[str, int], list[str]]:
    """The names of the symmetries that act on each axis."""
    names: dict[tuple[str, int], list[str]] = {}
    for finding in findings:
        for axis in finding.symmetry.plus + finding.symmetry.minus:
            acting = names.setdefault((axis.name, axis.dim), [])
            if finding.name not in acting:
                acting.append(finding.name)
    return names


def _operations(unknowns: Sequence[int], solution: Solution) -> str:
    """The operations that make unknowns vanish; if there are none, those that tie them to other unknowns."""
    if not any(solution.used[unknown] for unknown in unknowns):
        return _UNREACHED
    roots = dict.fromkeys(int(solution.root[unknown]) for unknown in unknowns)
    for reasons in (solution.reasons, solution.ties):
        texts = list(dict.fromkeys(text for root in roots for text in reasons.get(root, ())))
        if texts:
            return "; ".join(texts[:_MOST])
    return _UNREACHED

"""Why the numbers refute a symmetry that the graph allows, as far as the residual tells."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from noetherflow._precision import TOLERANCES
from noetherflow._types import Params
from noetherflow._verify import Residual

if TYPE_CHECKING:
    from noetherflow.detect.explanation import Finding

# More names than these make a reason longer, not clearer.
_MOST = 3

_NOT_FINITE = (
    "{what} is NaN or infinite {where}, so that nothing is proved. Look for divisions by zero and for square roots and "
    "logarithms of zero, and keep their arguments from zero (clamp, eps)"
)
_NO_GRADIENT = (
    "finite transformations do not change the losses, but the gradients have a component along the symmetry: a part of "
    "the loss gets no gradient, such as a padding row (padding_idx) of an embedding that is not zero; training then "
    "does not see the symmetry. Set such a row to zero"
)


def cause_of(residual: Residual) -> str:
    r"""The cause of a residual that is more than rounding, as far as the residual tells.

    A loss or gradient that is not finite proves nothing, and refutes nothing. A part of the computation without a
    gradient, such as the padding row of an embedding, leaves the losses unchanged while $g \cdot Q\theta$ does not
    vanish.

    Args:
        residual: The residual of a rejected candidate.

    Returns:
        A sentence without its period; empty if the residual does not tell.
    """
    if not math.isfinite(residual):
        what = "a loss after a finite transformation" if math.isfinite(residual.gradient) else "the gradient of a loss"
        where = "at the parameters of the model" if residual.point == "given" else "at perturbed parameters"
        return _NOT_FINITE.format(what=what, where=where)
    proof = TOLERANCES[residual.precision].proof
    return _NO_GRADIENT if residual.loss <= proof < residual.gradient else ""


def verdict_on(findings: Sequence["Finding"], params: Params, padding: Mapping[str, Sequence[int]]) -> str:
    """What the numbers say of candidates that act on an axis: refuted, and by which padding row, or left open.

    Args:
        findings: The candidates, each rejected.
        params: The parameters by canonical name.
        padding: The padding rows of embeddings by name.

    Returns:
        The reason why no symmetry acts on the axis.
    """
    listed = ", ".join(finding.name for finding in findings[:_MOST])
    if not all(math.isfinite(finding.residual) for finding in findings):
        return f"the numbers are not finite and leave {listed} open"
    unseen = [finding.symmetry for finding in findings if cause_of(finding.residual) == _NO_GRADIENT]
    names = dict.fromkeys(name for symmetry in unseen for name in symmetry.names)
    rows = [f"{name}[{row}]" for name in names for row in padding.get(name, ()) if bool((params[name][row] != 0).any())]
    because = f": the padding row {', '.join(rows)} is not zero and gets no gradient" if rows else ""
    return f"the numbers refute {listed}{because}"

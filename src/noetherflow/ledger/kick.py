"""The kick of the gradient noise in a step, estimated from the gradients of that step."""

import math
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._params import canonical_names
from noetherflow._types import Params
from noetherflow.noise.statistics import requested_of
from noetherflow.noise.step import StepNoise
from noetherflow.symmetry import AxisSymmetry, Symmetry

# Relative difference between squared lengths of gradients that belong to a single multiple of what was measured. The
# gradients of a model in bfloat16 differ by 0.4 % from the sums that a meter forms.
_PARALLEL = 0.02
# Squared length, as a fraction of that of all gradients, of a gradient that may be rounding only.
_NEGLIGIBLE = 1e-4


@final
class NoiseKicks:
    """Estimates of the kick of the noise, for the symmetries whose statistics a meter measures.

    Args:
        model: The model whose parameters are named.
        symmetries: By name, with the canonical names of the model.
    """

    def __init__(self, model: nn.Module, symmetries: Mapping[str, Symmetry]) -> None:
        self._model, self._symmetries = model, symmetries
        self._known: tuple[object, _Measured] | None = None

    def of(
        self, step: StepNoise, rest: Params, gradients: Params, unmeasured: Collection[str] = ()
    ) -> dict[str, Tensor]:
        r"""The kick of the noise, $\mathrm{Tr}[A\hat\Sigma A\,Q]/N$, for every symmetry for which it is known.

        The gradient $g$ from which the optimizer made the step is a multiple $g = c\,\bar g$ of the mean $\bar g$ that
        was measured: it may have been clipped, and the loss may have been scaled. The step along it, of a parameter W,
        is $-a_W\,\bar g_W$ with $a_W = -c\,\langle r_W, g_W\rangle / |g_W|^2$. A multiplies the gradient of W by
        $a_W$. For SGD the step along the gradient is all of the step.

        Args:
            step: What the step measured.
            rest: The displacement without weight decay, float64.
            gradients: The gradients from which the optimizer made the step, as far as there are any.
            unmeasured: Parameters that the meter left out, by its names.

        Returns:
            Tensors of the shape of the charge, float64, on the CPU. A symmetry is missing if it does not act along
            axes, if its statistics were not measured, or if $a_W$ of a parameter is not known; all are missing if the
            gradient is no multiple of what was measured.
        """
        layout = step.scatter.model_layout
        if self._known is None or self._known[0] is not layout:
            self._known = layout, _Measured(step, self._model, self._symmetries)
        measured = self._known[1]
        factors = _factors(step, measured.canonical, rest, gradients, unmeasured)
        told = {
            name: symmetry
            for name, symmetry in measured.symmetries.items()
            if all(factors.get(parameter) is not None for parameter in symmetry.names)
        }
        like = {name: rest[measured.canonical[name]] for symmetry in told.values() for name in symmetry.names}
        scales = {name: factors.get(name) or 0.0 for name in step.names}
        grams = step.grams(told, like, scales)
        return {name: (s.charge_of(grams[name]) / step.examples).to(CPU) for name, s in told.items()}


@final
class _Measured:
    """The symmetries whose statistics are in the layout of a meter, with the names of that meter."""

    def __init__(self, step: StepNoise, model: nn.Module, symmetries: Mapping[str, Symmetry]) -> None:
        self.canonical = canonical_names(model, step.names, "the meter")
        theirs = {canonical: name for name, canonical in self.canonical.items()}
        params = {theirs[name]: p for name, p in model.named_parameters() if name in theirs}
        self.symmetries: dict[str, AxisSymmetry] = {}
        for name, symmetry in symmetries.items():
            if not isinstance(symmetry, AxisSymmetry) or not theirs.keys() >= set(symmetry.names):
                continue
            renamed = symmetry.rename(theirs)
            requests = requested_of(params, {name: renamed}, variances=False)
            layouts = step.scatter.model_layout.layouts
            if all(layouts[key].requested.covers(request) for key, request in requests.items()):
                self.symmetries[name] = renamed


def _factors(
    step: StepNoise, canonical: Mapping[str, str], rest: Params, gradients: Params, unmeasured: Collection[str]
) -> dict[str, float]:
    """By name in the meter, $a_W$ of the parameters on which symmetries act, where it is known."""
    traces = step.trace()
    means = step.norm_sq() + traces / step.examples
    scatter = dict(zip(step.names, traces.tolist(), strict=True))
    theirs = {
        name: mean
        for name, mean in zip(step.names, means.tolist(), strict=True)
        if canonical[name] in rest and name not in unmeasured
    }
    known = {name: gradients[canonical[name]] for name in theirs if canonical[name] in gradients}
    squares = {name: float(torch.linalg.vector_norm(gradient)) ** 2 for name, gradient in known.items()}
    ratio = _ratio(squares, theirs)
    factors = {}
    for name in theirs:
        moved = rest[canonical[name]]
        if not scatter[name] or not moved.any():
            factors[name] = 0.0  # no noise, or not moved by it
        elif ratio is not None and squares.get(name):
            along = float(torch.vdot(moved.flatten(), known[name].flatten()))
            factors[name] = -ratio * along / squares[name]
    return factors


def _ratio(squares: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """The length of the gradient over that of the measured mean; None unless it is equal for all parameters."""
    total, measured = sum(squares.values()), sum(theirs.values())
    if not (total > 0 and measured > 0):
        return None
    square = total / measured
    for name, mean in theirs.items():
        mine, expected = squares.get(name, 0.0), square * mean
        if abs(mine - expected) > _PARALLEL * expected and max(mine, expected) > _NEGLIGIBLE * total:
            return None
    return math.sqrt(square)

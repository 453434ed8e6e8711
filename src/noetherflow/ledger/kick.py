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

        A multiplies the gradient of each parameter W by $a_W$, the length of the step along the gradient over the
        length of the measured gradient. SGD moves W by $-a_W$ times the measured gradient exactly, whether or not the
        gradient was clipped or scaled.

        Args:
            step: What the step measured.
            rest: The displacement without weight decay, float64.
            gradients: The gradients from which the optimizer made the step, as far as there are any.
            unmeasured: Parameters that the meter left out, by its names.

        Returns:
            Tensors of the shape of the charge, float64, on the CPU. A symmetry is missing if it does not act along
            axes, if its statistics were not measured, or if $a_W$ of a parameter is not known.
        """
        layout = step.scatter.model_layout
        if self._known is None or self._known[0] is not layout:
            self._known = layout, _Measured(step, self._model, self._symmetries)
        measured = self._known[1]
        factors = _factors(step, measured.canonical, rest, gradients) | dict.fromkeys(unmeasured)
        told = {
            name: symmetry
            for name, symmetry in measured.symmetries.items()
            if all(factors[parameter] is not None for parameter in symmetry.names)
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


def _factors(step: StepNoise, canonical: Mapping[str, str], rest: Params, gradients: Params) -> dict[str, float | None]:
    """By name in the meter, the number $a_W$ of each parameter on which a symmetry acts; None if it is not known."""
    traces = step.trace()
    squares = step.norm_sq() + traces / step.examples
    factors: dict[str, float | None] = {}
    for name, trace, square in zip(step.names, traces.tolist(), squares.tolist(), strict=True):
        moved, gradient = rest.get(canonical[name]), gradients.get(canonical[name])
        if moved is None:
            continue
        if not trace or not moved.any():
            factors[name] = 0.0
            continue
        along = norm = 0.0
        if gradient is not None and square > 0:
            along = -float(torch.vdot(moved.flatten(), gradient.flatten()))
            norm = float(torch.linalg.vector_norm(gradient)) * math.sqrt(square)
        factors[name] = along / norm if norm else None
    return factors

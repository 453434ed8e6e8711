"""From a step of an optimizer to the parts of the change of each charge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._params import require_finite
from noetherflow.ledger.decay import DecayKind, decay_notes, decay_rates
from noetherflow.ledger.kick import NoiseKicks
from noetherflow.ledger.parts import ChargeParts, split
from noetherflow.ledger.tracked import Tracked, full
from noetherflow.noise.step import StepNoise
from noetherflow.optimizers.by_parameter import innermost


@final
@dataclass(frozen=True, eq=False)
class Before:
    """What has to be known before a step.

    Args:
        theta: Copies of the parameters.
        rates: By which fraction weight decay shrinks each of them.
        gradients: Their gradients: no copies.
    """

    theta: dict[str, Tensor]
    rates: dict[str, float]
    gradients: dict[str, Tensor]


@final
@dataclass(frozen=True, eq=False)
class Split:
    """A step, split.

    Args:
        start: The charges before the step.
        end: The charges after it.
        parts: The parts of the change of each charge in the step.
        moved: Whether a parameter moved.
        measured: Whether the noise of at least one symmetry is known.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    parts: dict[str, ChargeParts]
    moved: bool
    measured: bool


@final
class Splitter:
    """Splits the steps of optimizers.

    Args:
        model: The model.
        tracked: Its symmetries, and the parameters on which they act.
        optimizers: What moves them.
        kind: How weight decay acts, or None to tell by the class of the optimizer.

    Raises:
        SettingsError: If the optimizers hold none of the parameters, or if it is not known how weight decay acts.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Tracked,
        optimizers: Sequence[torch.optim.Optimizer],
        kind: DecayKind | None,
    ) -> None:
        if kind not in (None, "decoupled", "coupled"):
            raise SettingsError(f'decay must be "decoupled", "coupled" or None, got {kind!r}')
        self._tracked, self._kind = tracked, kind
        self._optimizers = [innermost(optimizer) for optimizer in optimizers]
        tracked.require_trained_by(self._optimizers)
        decay_rates(self._optimizers, tracked.params, kind)
        self._kicks = NoiseKicks(model, tracked.symmetries)

    @property
    def notes(self) -> list[str]:
        """What cannot be told apart, in sentences."""
        return decay_notes(self._optimizers, self._kind)

    def before(self) -> Before:
        """To be called before a step: learning rates are read here, since schedulers change them between steps."""
        rates = decay_rates(self._optimizers, self._tracked.params, self._kind)
        return Before(self._tracked.theta(), rates, self._tracked.gradients())

    def after(self, before: Before, measured: StepNoise | None, unmeasured: Mapping[str, str]) -> Split:
        """To be called after the step.

        Args:
            before: From before the step.
            measured: What a meter said of the gradients of the step; None if it said nothing, or several times, when
                it is not known what the gradient of each measurement counts in the sum.
            unmeasured: Parameters that the meter left out.

        Returns:
            The parts.

        Raises:
            NonFiniteError: If a parameter holds NaN or infinity.
        """
        theta = self._tracked.theta()
        require_finite(theta, "after the step, the parameter")
        start, end = self._tracked.charges(before.theta), self._tracked.charges(theta)
        step = {name: theta[name] - before.theta[name] for name in theta}
        # A scaler may skip a step, and optimizers pass over parameters without a gradient, weight decay included.
        still = {name for name, displacement in step.items() if not displacement.any()}
        if len(still) == len(step):
            return Split(start, end, {name: ChargeParts.zeros(end[name]) for name in end}, moved=False, measured=False)
        shrinkage = {n: t * (0.0 if n in still else -before.rates[n]) for n, t in before.theta.items()}
        rest = {name: displacement - shrinkage[name] for name, displacement in step.items()}
        noise: dict[str, Tensor] = {}
        if measured is not None:
            # A closure forms gradients in the block, and zero_grad() may remove them there.
            gradients = {name: full(g) for name, g in (before.gradients | self._tracked.gradients()).items()}
            noise = self._kicks.of(measured, rest, gradients, unmeasured)
        pieces = split(self._tracked.symmetries, before.theta, shrinkage, rest)
        parts = {name: _parts(end[name] - start[name], *piece, noise.get(name)) for name, piece in pieces.items()}
        return Split(start, end, parts, moved=True, measured=bool(noise))


def _parts(change: Tensor, decay: Tensor, broken: Tensor, kick: Tensor, noise: Tensor | None) -> ChargeParts:
    """The parts with the kick as noise and mean, or as it is if the noise is not known."""
    zero = torch.zeros_like(kick)
    told = (zero, zero, kick) if noise is None else (noise, kick - noise, zero)
    return ChargeParts(change, decay, *told, broken, zero)

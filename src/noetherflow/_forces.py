"""The forces on the charges, and whether an optimizer conserves a charge."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow._minibatch import Minibatches
from noetherflow._types import Params
from noetherflow.optimizers import SGD, Optimizer
from noetherflow.symmetry import Action, AxisSymmetry, Grams, Symmetry

# Largest relative commutator of a generator and the weight decay: the rounding of a generator in float32.
_COMMUTES = 1e-6


class Forces(NamedTuple):
    """The forces that drive a charge up (P) and down (R), both positive; the drift is P - R."""

    push: Tensor
    pull: Tensor


def forces(name: str, params: Params, gradients: Minibatches) -> Forces:
    r"""Both forces on a charge: noise on a side drives the charge to that side, weight decay away from it.

    Args:
        name: The symmetry.
        params: The parameters at which the gradients were measured.
        gradients: The second moments of minibatches.

    Returns:
        For SGD with one learning rate $P = 2\sigma^2 N_+ + 4\gamma C_-(\theta)$ and
        $R = 2\sigma^2 N_- + 4\gamma C_+(\theta)$, of the charge's shape. In general, the slopes of the terms of the
        potential.

    Raises:
        SettingsError: If the symmetry has no charge under these settings.
    """
    return _between(gradients.symmetries[name], *half_forces(name, params, gradients))


def forces_of_sgd(symmetry: Symmetry, params: Params, noise: Grams, sgd: SGD) -> Forces:
    r"""Both forces on a charge under SGD with a single learning rate, from the Grams $N_\pm$ of single examples."""
    heat = 2 * sgd.temperature
    return _between(symmetry, *_halves_of_sgd(symmetry, params, noise, (heat, heat), sgd))


def _between(symmetry: Symmetry, decay: Grams, noise: Grams) -> Forces:
    # The charge takes its minus half with a minus sign, which these take back.
    push = symmetry.charge_of(Grams(noise.plus, -decay.minus))
    pull = symmetry.charge_of(Grams(decay.plus, -noise.minus))
    return Forces(push, pull)


def half_forces(name: str, params: Params, gradients: Minibatches) -> tuple[Grams, Grams]:
    """The forces of weight decay and of noise, each on both sides; arguments and errors as of `forces`."""
    symmetry, optimizer = gradients.symmetries[name], gradients.optimizer
    steps = steps_of(symmetry, optimizer)
    if isinstance(optimizer, SGD) and steps is not None:
        return _halves_of_sgd(symmetry, params, gradients.grams(name), steps, optimizer)
    if symmetry.action is not Action.SCALES_ENTRIES:
        raise SettingsError(f"{name!r}: {no_charge(optimizer)}")
    terms = {parameter: gradients.terms(parameter, params[parameter]) for parameter in symmetry.names}
    decay = symmetry.grams({parameter: term.decay.sqrt() for parameter, term in terms.items()})
    noise = symmetry.grams({parameter: term.noise.sqrt() for parameter, term in terms.items()})
    exponents = optimizer.exponents
    return Grams(*(exponents.decay * side for side in decay)), Grams(*(exponents.noise * side for side in noise))


def _halves_of_sgd(
    symmetry: Symmetry, params: Params, noise: Grams, factors: tuple[float, float], sgd: SGD
) -> tuple[Grams, Grams]:
    """The forces of weight decay and of noise, from Grams of gradients and a factor for each side."""
    decay = Grams(*(4 * side for side in decayed(symmetry, params, sgd)))
    return decay, Grams(*(factor * side for factor, side in zip(factors, noise, strict=True)))


def has_charge(symmetry: Symmetry, optimizer: Optimizer) -> bool:
    """Whether the optimizer, without noise and weight decay, conserves a charge of the symmetry."""
    return symmetry.action is Action.SCALES_ENTRIES or steps_of(symmetry, optimizer) is not None


def no_charge(optimizer: Optimizer) -> str:
    """Why a symmetry that mixes entries has no charge, and what to do."""
    if isinstance(optimizer, SGD):
        return (
            "the symmetry mixes entries of parameters with different learning rates, so that the optimizer conserves "
            "no charge of it: give these parameters equal learning rates"
        )
    return (
        f"{type(optimizer).__name__} moves every entry by its own step size, and conserves no charge of a symmetry "
        "that mixes entries. The scalings in it keep theirs: declare an nf.DiagonalSymmetry along the same axes"
    )


def charge_weighted(symmetry: Symmetry, params: Params, gradients: Minibatches) -> Grams:
    """The squared sizes of both sides, each entry divided by its step size: the halves of the conserved charge."""
    optimizer = gradients.optimizer
    if isinstance(optimizer, SGD):
        return symmetry.grams({name: params[name] / optimizer.step_of(name) ** 0.5 for name in symmetry.names})
    return symmetry.grams({name: gradients.terms(name, params[name]).charge.sqrt() for name in symmetry.names})


class ConservedCharge(NamedTuple):
    """The charge that the optimizer conserves without noise, and the factor from `drift` to its change per step."""

    value: Tensor
    per_step: float


def conserved_charge(name: str, params: Params, gradients: Minibatches) -> ConservedCharge:
    """The charge of a symmetry in the units of tables: for a single learning rate, of squared weights.

    Args:
        name: The symmetry.
        params: The parameters.
        gradients: The second moments of minibatches.

    Returns:
        The charge; that of squared weights, if the optimizer conserves none.
    """
    symmetry, optimizer = gradients.symmetries[name], gradients.optimizer
    if isinstance(optimizer, SGD) and not isinstance(optimizer.lr, Mapping):
        return ConservedCharge(symmetry.charge(params), optimizer.effective_lr)
    if not has_charge(symmetry, optimizer):
        return ConservedCharge(symmetry.charge(params), math.nan)
    return ConservedCharge(symmetry.charge_of(charge_weighted(symmetry, params, gradients)), 1.0)


def steps_of(symmetry: Symmetry, optimizer: Optimizer) -> tuple[float, float] | None:
    """The learning rate of each side of a symmetry; None if there is no number that a side shares."""
    if not isinstance(optimizer, SGD):
        return None
    sides = [symmetry.names] * 2
    if isinstance(symmetry, AxisSymmetry):
        sides = [tuple(axis.name for axis in axes) for axes in (symmetry.plus, symmetry.minus)]
    shared = [{optimizer.step_of(name) for name in side} for side in sides]
    if any(len(steps) > 1 for steps in shared):
        return None
    plus, minus = (next(iter(steps), 1.0) for steps in shared)
    return plus, minus


def decayed(symmetry: Symmetry, params: Params, sgd: SGD) -> Grams:
    r"""The squared sizes of both sides, with each parameter weighted by its weight decay: $\gamma C_\pm(\theta)$.

    Returns:
        $C_\pm(\Gamma^{1/2}\theta)$ with the diagonal matrix $\Gamma$ of the $\gamma_p$. If the generators commute with
        $\Gamma$, this is $\theta^T Q_\pm\Gamma\,\theta$ at every point of the orbit.

    Raises:
        SettingsError: If a parameter has no weight decay, or if a generator mixes parameters of different weight decay.
    """
    gamma = {name: sgd.gamma_of(name) for name in symmetry.names}
    # A symmetry along axes multiplies the rows of each tensor separately, so its generators commute with the decay.
    if symmetry.action is Action.SCALES_EIGENSPACES and len(set(gamma.values())) > 1:
        _require_commuting(symmetry, params, gamma)
    return symmetry.grams({name: decay**0.5 * params[name] for name, decay in gamma.items()})


def _require_commuting(symmetry: Symmetry, params: Params, gamma: Mapping[str, float]) -> None:
    """Raise unless the generator commutes with the weight decay, by the commutator on a random vector."""
    numbers = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(params[name].shape, generator=numbers).to(params[name]) for name in gamma}
    x = torch.ones_like(symmetry.identity(draws))
    image = symmetry.generate(x, draws)
    after = symmetry.generate(x, {name: decay * draws[name] for name, decay in gamma.items()})
    size = max(gamma.values()) * max(tensor.abs().max() for tensor in image.values())
    if any(((after[name] - decay * image[name]).abs() > _COMMUTES * size).any() for name, decay in gamma.items()):
        raise SettingsError(
            f"a generator mixes entries of parameters with different weight decay, {dict(gamma)}: weight decay then "
            "moves the charge against the orbit, and there is no equilibrium in closed form. Give these parameters "
            "equal weight decay"
        )

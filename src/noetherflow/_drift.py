"""How fast the charges move: the Noether flow."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import SettingsError
from noetherflow._optimizers import SGD, require_settings
from noetherflow._params import snapshot
from noetherflow._types import Params
from noetherflow.noise import NoiseMoments
from noetherflow.symmetry import Action, Grams, Symmetry

# Largest relative commutator of a generator and the weight decay: the rounding of a generator in float32.
_COMMUTES = 1e-6


class Forces(NamedTuple):
    """The forces that drive a charge up (P) and down (R), both positive; the drift is P - R."""

    push: Tensor
    pull: Tensor


def forces(symmetry: Symmetry, params: Params, noise: Grams, sgd: SGD) -> Forces:
    r"""Both forces on a charge: noise on a side drives the charge to that side, weight decay away from it.

    Returns:
        $P = 2\sigma^2 N_+ + 4\gamma C_-(\theta)$ and $R = 2\sigma^2 N_- + 4\gamma C_+(\theta)$, of the charge's shape.
    """
    decay = decayed(symmetry, params, sgd)
    noisy = 2 * sgd.temperature
    # The charge takes its minus half with a minus sign, which these take back.
    push = symmetry.charge_of(Grams(noisy * noise.plus, -4 * decay.minus))
    pull = symmetry.charge_of(Grams(4 * decay.plus, -noisy * noise.minus))
    return Forces(push, pull)


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


def drift(noise: NoiseMoments, sgd: SGD, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The deterministic speed of every charge under SGD.

    $$\frac{dC}{dt} = -4\gamma C + 2\sigma^2 (N_+ - N_-) , \qquad t = \mathrm{lr} \times \text{steps}$$

    With weight decay by parameter, $\gamma C$ is the charge of $\sqrt{\gamma_p}\,\theta_p$.
    There is no random term: in this limit the noise drives a charge, but does not make it fluctuate.

    Args:
        noise: From `estimate_noise`, with the symmetries for which it was measured.
        sgd: The settings of the optimizer.
        params: The parameters at which the noise was measured, or the model that holds them.

    Returns:
        Per symmetry a tensor of the shape of its charge, float64, per unit of time: multiply by `sgd.effective_lr` for
        the drift per step.

    Raises:
        ParameterNameError: If a parameter on which a symmetry acts is missing.
        SettingsError: If a parameter on which a symmetry acts has no weight decay.
        EmptyDataError: If the noise holds no examples.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> nf.drift(noise, nf.SGD(lr=0.1, batch_size=8), net)["hidden"].shape
        torch.Size([3])

    Source: Ziyin et al. (2024), the Noether flow.
    """
    sgd = require_settings(sgd, params)
    noise.require_examples()
    theta = snapshot(params, device=CPU)
    rates, grams = {}, noise.grams
    for name, symmetry in noise.symmetries.items():
        symmetry.check(theta)
        push, pull = forces(symmetry, theta, grams[name], sgd)
        rates[name] = push - pull
    return rates


def expected_step(noise: NoiseMoments, sgd: SGD, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The exact mean change of every charge in a discrete step of plain SGD.

    $$E[C'] - C = -4\,\mathrm{lr}\,\gamma\, C + \mathrm{lr}^2
    \left(\frac{f}{S}\,\mathrm{Tr}[\Sigma Q] + C(\nabla L + 2\gamma\theta)\right)$$

    with f = 1, or (N - S)/(N - 1) without replacement. Without noise, only the last term is left of a finite step on
    the full batch, apart from weight decay. With weight decay by parameter, $\gamma C$ is the charge of
    $\sqrt{\gamma_p}\,\theta_p$; with a single weight decay, $C(\nabla L + 2\gamma\theta) = C(\nabla L) + 4\gamma^2 C$.

    Args:
        noise: From `estimate_noise`, over the full data set from which minibatches are drawn.
        sgd: The settings of the optimizer; momentum must be 0, since the identity needs the momentum buffer otherwise.
        params: The parameters at which the noise was measured, or the model that holds them.

    Returns:
        Per symmetry a tensor of the shape of its charge, float64, per step.

    Raises:
        SettingsError: If the settings have momentum, if the noise comes from a meter, which keeps no mean gradient, or
            if a parameter on which a symmetry acts has no weight decay.
        ParameterNameError: If a parameter on which a symmetry acts is missing.
        EmptyDataError: If the noise holds no examples.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> nf.expected_step(noise, nf.SGD(lr=0.1, batch_size=8), net)["hidden"].shape
        torch.Size([3])

    Source: expand the step; the cross term vanishes because gradients are orthogonal to the orbit.
    """
    sgd = require_settings(sgd, params)
    if sgd.momentum:
        raise SettingsError(
            f"the mean change in a step is exact for plain SGD only, got momentum={sgd.momentum}: use drift()"
        )
    noise.require_examples()
    if any(torch.isnan(mean).any() for mean in noise.mean.values()):
        raise SettingsError(
            "the mean change in a step needs the mean gradient, which a meter does not keep: measure with "
            "estimate_noise, over the full data set"
        )
    theta = snapshot(params, device=CPU)
    changes = {}
    for name, symmetry in noise.symmetries.items():
        symmetry.check(theta)
        noisy = sgd.sampling_factor / sgd.batch_size * symmetry.charge_of(noise.grams[name])
        shrink = -4 * sgd.lr * symmetry.charge_of(decayed(symmetry, theta, sgd))
        # Weight decay and mean gradient together: Q theta is orthogonal to the gradient, but Q Gamma theta is not.
        mean = {p: noise.mean[p] + 2 * sgd.gamma_of(p) * theta[p] for p in symmetry.names}
        changes[name] = shrink + sgd.lr**2 * (noisy + symmetry.charge(mean))
    return changes

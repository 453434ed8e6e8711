"""How fast the charges move: the Noether flow."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._optimizers import SGD
from noetherflow._params import snapshot
from noetherflow._types import Params
from noetherflow.noise import NoiseMoments
from noetherflow.symmetry import Grams, Symmetry


class Forces(NamedTuple):
    """The forces that drive a charge up (P) and down (R), both positive; the drift is P - R."""

    push: Tensor
    pull: Tensor


def forces(symmetry: Symmetry, params: Params, noise: Grams, sgd: SGD) -> Forces:
    r"""Both forces on a charge: noise on a side drives the charge to that side, weight decay away from it.

    Returns:
        $P = 2\sigma^2 N_+ + 4\gamma C_-(\theta)$ and $R = 2\sigma^2 N_- + 4\gamma C_+(\theta)$, of the charge's shape.
    """
    squares = symmetry.grams(params)
    noisy, decay = 2 * sgd.temperature, 4 * sgd.gamma
    # The charge takes its minus half with a minus sign, which these take back.
    push = symmetry.charge_of(Grams(noisy * noise.plus, -decay * squares.minus))
    pull = symmetry.charge_of(Grams(decay * squares.plus, -noisy * noise.minus))
    return Forces(push, pull)


def drift(noise: NoiseMoments, sgd: SGD, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The deterministic speed of every charge under SGD.

    $$\frac{dC}{dt} = -4\gamma C + 2\sigma^2 (N_+ - N_-) , \qquad t = \mathrm{lr} \times \text{steps}$$

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
    noise.require_examples()
    theta = snapshot(params)
    rates = {}
    for name, symmetry in noise.symmetries.items():
        symmetry.check(theta)
        push, pull = forces(symmetry, theta, noise.grams[name], sgd)
        rates[name] = push - pull
    return rates


def expected_step(noise: NoiseMoments, sgd: SGD, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The exact mean change of every charge in a discrete step of plain SGD.

    $$E[C'] - C = \big((1 - 2\,\mathrm{lr}\,\gamma)^2 - 1\big)\, C + \mathrm{lr}^2
    \left(\frac{f}{S}\,\mathrm{Tr}[\Sigma Q] + C(\nabla L)\right)$$

    with f = 1, or (N - S)/(N - 1) without replacement. Full-batch gradient descent with a finite step has the last term
    alone.

    Args:
        noise: From `estimate_noise`, over the full data set from which minibatches are drawn.
        sgd: The settings of the optimizer; momentum must be 0, since the identity needs the momentum buffer otherwise.
        params: The parameters at which the noise was measured, or the model that holds them.

    Returns:
        Per symmetry a tensor of the shape of its charge, float64, per step.

    Raises:
        SettingsError: If the settings have momentum, or the noise comes from a meter, which keeps no mean gradient.
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
    theta = snapshot(params)
    shrink = (1 - 2 * sgd.lr * sgd.gamma) ** 2 - 1
    changes = {}
    for name, symmetry in noise.symmetries.items():
        noisy = sgd.sampling_factor / sgd.batch_size * symmetry.charge_of(noise.grams[name])
        changes[name] = shrink * symmetry.charge(theta) + sgd.lr**2 * (noisy + symmetry.charge(noise.mean))
    return changes

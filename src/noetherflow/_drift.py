"""How fast the charges move: the Noether flow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import SettingsError
from noetherflow._forces import decayed, forces, has_charge, steps_of
from noetherflow._minibatch import Minibatches, minibatches
from noetherflow._params import snapshot
from noetherflow._second_moments import SecondMoments
from noetherflow._types import Params
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import SGD, AdamW, Optimizer, require_settings
from noetherflow.symmetry import Grams


def drift(noise: NoiseMoments | SecondMoments, settings: Optimizer, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The mean speed of every charge under an optimizer.

    For SGD with a single learning rate

    $$\frac{dC}{dt} = -4\gamma C + 2\sigma^2 (N_+ - N_-) , \qquad t = \mathrm{lr} \times \text{steps}$$

    With weight decay by parameter, $\gamma C$ is the charge of $\sqrt{\gamma_p}\,\theta_p$. In general, with the step
    size $\eta_p$ of entry p, the drift is the mean change per step of the charge that the optimizer conserves,
    $\sum_p q_p\theta_p^2 / \eta_p$; for a single learning rate both are equal. For AdamW it is
    $\sum_p q_p \sqrt{v_p}\,(\eta_p - 2\lambda_p\theta_p^2)$.

    There is no random term: in this limit the noise drives a charge, but does not make it fluctuate.

    Args:
        noise: From `estimate_noise`, with the symmetries for which it was measured; or, for AdamW, from
            `second_moments`.
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        params: The parameters at which the noise was measured, or the model that holds them.

    Returns:
        Per symmetry a tensor of the shape of its charge, float64; NaN for a symmetry of which the optimizer conserves
        no charge, such as one that mixes entries under AdamW.

    Raises:
        ParameterNameError: If a parameter on which a symmetry acts is missing.
        SettingsError: If the settings say nothing of a parameter on which a symmetry acts, or if AdamW has no
            `batch_size` and the noise is that of single examples.
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
    theta = snapshot(params, device=CPU)
    gradients = minibatches(noise, require_settings(settings, params))
    rates = {}
    for name, symmetry in noise.symmetries.items():
        symmetry.check(theta)
        if has_charge(symmetry, gradients.optimizer):
            push, pull = forces(name, theta, gradients)
            rates[name] = push - pull
        else:
            rates[name] = torch.full_like(symmetry.charge(theta), torch.nan)
    return rates


def expected_step(noise: NoiseMoments, settings: Optimizer, params: nn.Module | Params) -> dict[str, Tensor]:
    r"""The exact mean change of every charge in a discrete step of plain SGD, or of AdamW with fixed step sizes.

    For SGD with a single learning rate

    $$E[C'] - C = -4\,\mathrm{lr}\,\gamma\, C + \mathrm{lr}^2
    \left(\frac{f}{S}\,\mathrm{Tr}[\Sigma Q] + C(\nabla L + 2\gamma\theta)\right)$$

    with f = 1, or (N - S)/(N - 1) without replacement. Without noise, only the last term is left of a finite step on
    the full batch, apart from weight decay. With weight decay by parameter, $\gamma C$ is the charge of
    $\sqrt{\gamma_p}\,\theta_p$; with a single weight decay, $C(\nabla L + 2\gamma\theta) = C(\nabla L) + 4\gamma^2 C$.

    With learning rates by parameter, the charge is the one that is conserved without noise,
    $\sum_p q_p\theta_p^2 / \mathrm{lr}_p$. For AdamW it is $\sum_p q_p\theta_p^2 / p_p$ with the step sizes
    $p = \eta / (\sqrt{v} + \epsilon)$ at $v = E\,g_S^2$, and for a single learning rate and weight decay

    $$E[C'] - C = ((1 - \eta\lambda)^2 - 1)\,C + \sum_p q_p\,p_p\,E\,g_{S,p}^2 .$$

    Args:
        noise: From `estimate_noise`, over the full data set from which minibatches are drawn.
        settings: The settings of `SGD` or `AdamW`; the momentum of SGD must be 0, since the identity needs the momentum
            buffer otherwise, and the average of gradients of AdamW is left out.
        params: The parameters at which the noise was measured, or the model that holds them.

    Returns:
        Per symmetry a tensor of the shape of its charge, float64, per step; NaN for a symmetry of which the optimizer
        conserves no charge.

    Raises:
        SettingsError: If the settings have momentum or weight decay that is not decoupled, if the noise comes from a
            meter, which keeps no mean gradient, or if the settings say nothing of a parameter on which a symmetry acts.
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
    settings = require_settings(settings, params)
    if not isinstance(noise, NoiseMoments):
        raise SettingsError(
            f"the mean change in a step needs the noise of single examples, got {type(noise).__name__}: measure with "
            "estimate_noise, or use drift()"
        )
    if isinstance(settings, SGD) and settings.momentum:
        raise SettingsError(
            f"the mean change in a step is exact for plain SGD only, got momentum={settings.momentum}: use drift()"
        )
    if isinstance(settings, AdamW) and not settings.decoupled:
        raise SettingsError("the mean change in a step is known for decoupled weight decay only: use drift()")
    noise.require_examples()
    if any(torch.isnan(mean).any() for mean in noise.mean.values()):
        raise SettingsError(
            "the mean change in a step needs the mean gradient, which a meter does not keep: measure with "
            "estimate_noise, over the full data set"
        )
    theta, gradients = snapshot(params, device=CPU), minibatches(noise, settings)
    changes = {}
    for name, symmetry in noise.symmetries.items():
        symmetry.check(theta)
        if not has_charge(symmetry, settings):
            changes[name] = torch.full_like(symmetry.charge(theta), torch.nan)
        elif isinstance(settings, SGD):
            changes[name] = _step_of_sgd(name, theta, noise, gradients, settings)
        elif isinstance(settings, AdamW):
            changes[name] = _step_of_adamw(name, theta, noise, gradients, settings)
    return changes


def _step_of_sgd(name: str, theta: Params, noise: NoiseMoments, gradients: Minibatches, sgd: SGD) -> Tensor:
    """The exact mean change of the charge of a symmetry."""
    symmetry = noise.symmetries[name]
    steps = steps_of(symmetry, sgd)
    if steps is None:
        noisy = symmetry.charge({p: (sgd.step_of(p) * gradients.shares(p)).sqrt() for p in symmetry.names})
    else:
        sides = zip(steps, gradients.noise(name), strict=True)
        noisy = symmetry.charge_of(Grams(*(step * side for step, side in sides)))
    shrink = -4 * symmetry.charge_of(decayed(symmetry, theta, sgd))
    # Weight decay and mean gradient together: Q theta is orthogonal to the gradient, but Q Gamma theta is not.
    mean = {p: sgd.step_of(p) ** 0.5 * (noise.mean[p] + 2 * sgd.gamma_of(p) * theta[p]) for p in symmetry.names}
    change = shrink + sgd.share * noisy + symmetry.charge(mean)
    return change if isinstance(sgd.lr, Mapping) else sgd.lr * change


def _step_of_adamw(name: str, theta: Params, noise: NoiseMoments, gradients: Minibatches, adamw: AdamW) -> Tensor:
    """The exact mean change of the charge of a symmetry that scales entries, with v and its step sizes held."""
    symmetry = noise.symmetries[name]
    shrink, noisy, mean = {}, {}, {}
    for p in symmetry.names:
        v, decay = gradients.moment(p), adamw.lr_of(p) * adamw.decay_of(p)
        root = (adamw.lr_of(p) / (v.sqrt() + adamw.eps)).sqrt()
        # An entry without a gradient has no step size if eps is 0, and does not need one.
        pushed = torch.where(v > 0, root, 0.0)
        shrink[p] = (2 * decay) ** 0.5 * theta[p] / root
        noisy[p] = pushed * (v - noise.mean[p].square()).clamp_min(0).sqrt()
        # Weight decay and mean gradient together, as for SGD: they meet where the decay differs between parameters.
        mean[p] = decay * theta[p] / root + pushed * noise.mean[p]
    return symmetry.charge(noisy) + symmetry.charge(mean) - symmetry.charge(shrink)

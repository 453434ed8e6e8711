"""The noise equilibrium of a model: orbit by orbit, the symmetries of an orbit jointly."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import EquilibriumError
from noetherflow._minibatch import Minibatches, minibatches
from noetherflow._params import require_names, snapshot
from noetherflow._second_moments import SecondMoments
from noetherflow._types import Params
from noetherflow.equilibrium.blocks import Blocks, moved, potential_of
from noetherflow.equilibrium.result import Equilibrium, Imbalance, Status
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import Optimizer, require_settings


def potential(
    noise: NoiseMoments | SecondMoments,
    settings: Optimizer,
    params: nn.Module | Params,
    coordinates: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""The potential that the Noether flow descends, here or elsewhere on the orbit.

    For SGD with a single learning rate

    $$\Phi(x) = 2\gamma\,|\theta_x|^2 + \sigma^2\,\mathrm{Tr}\,\Sigma(\theta_x), \qquad \theta_x = e^{Q_x}\theta$$

    $\Phi$ is convex along every symmetry, and $d\Phi/dx$ is minus the drift of the charge. Without weight decay its
    minimum is the point of least gradient noise of the orbit; weight decay trades noise for smaller norms. The noise
    elsewhere on the orbit follows from the noise here, $\Sigma \to e^{-Q_x}\Sigma e^{-Q_x}$.

    For AdamW it is $\Psi(x) = \sum_p \eta\sqrt{v_p}\,e^{-s_p(x)} + 2\lambda\sqrt{v_p}\,\theta_p^2\,e^{s_p(x)}$ over the
    entries that the symmetries scale by $e^{s_p(x)}$; see `AdamW`.

    Args:
        noise: From `estimate_noise`; the symmetries for which it was measured span the orbit. For AdamW, from
            `second_moments` as well.
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        params: The parameters at which the noise was measured, or the model that holds them.
        coordinates: Per symmetry the coordinates x of the point; absent ones are zero.

    Returns:
        The potential, shape (), float64: over all trained parameters for SGD with a single learning rate, otherwise
        over those that the symmetries move.

    Raises:
        EquilibriumError: If symmetries share entries in a way that has no closed transport of the noise.
        SettingsError: If the settings say nothing of a parameter on which a symmetry acts.
        ParameterNameError: If parameters are missing.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise, sgd = nf.estimate_noise(net, loss, batches, symmetries), nf.SGD(lr=0.1, batch_size=8)
        >>> minimum = nf.solve_equilibrium(noise, sgd, net).coordinates
        >>> nf.potential(noise, sgd, net, minimum) < nf.potential(noise, sgd, net)
        tensor(True)

    Source: Ziyin et al. (2024), the proof that the equilibrium is unique; a Kempf-Ness function.
    """
    theta, gradients = _prepare(noise, settings, params)
    x = {name: torch.as_tensor(value, device=CPU) for name, value in (coordinates or {}).items()}
    require_names(noise.symmetries, x, "coordinates")
    blocks = _blocks(theta, gradients)
    return potential_of(theta, gradients, blocks) + _change("value", blocks, x)


def solve_equilibrium(
    noise: NoiseMoments | SecondMoments, settings: Optimizer, params: nn.Module | Params, *, throw: bool = False
) -> Equilibrium:
    r"""Find the point of the orbit at which every charge stands still.

    It is the unique minimum of `potential` up to rotations. A single symmetry has it in closed form. Under SGD
    $x = \tfrac14 \log(P/R)$ row by row, or $e^{2x} = R^{-1} \# P$ for a matrix, with $P = 4\gamma C_- + 2\sigma^2 N_+$
    and $R = 4\gamma C_+ + 2\sigma^2 N_-$. Under AdamW $x = \tfrac12 \log(P/R)$ with $P = \eta V_+ + 2\lambda T_-$ and
    $R = \eta V_- + 2\lambda T_+$, where V sums $\sqrt v$ and T sums $\sqrt v\,\theta^2$ over a side; a symmetry that
    mixes entries has no charge then, and stays where it is. Scalings and rescalings that share a tensor (neighbouring
    layers) are solved jointly by damped Newton, to rounding.

    Args:
        noise: From `estimate_noise`, or for AdamW from `second_moments`; the symmetries for which it was measured are
            brought to rest (`noise.select(...)` restricts them).
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        params: The parameters at which the noise was measured, or the model that holds them.
        throw: Raise unless every symmetry converged.

    Returns:
        The equilibrium. A direction that has none is left where it is, and `outcomes` says which and why.

    Raises:
        EquilibriumError: If `throw` is set and a symmetry did not converge; or if a matrix symmetry or a dense
            generator shares entries with another symmetry, for which the noise has to be measured along the way: see
            `equilibrate`.
        ParameterNameError: If parameters are missing.
        SettingsError: If the settings say nothing of a parameter on which a symmetry acts, or if AdamW has no
            `batch_size` and the noise is that of single examples.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> symmetries = {"hidden": nf.DiagonalSymmetry(into, out_of)}
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, symmetries)
        >>> nf.solve_equilibrium(noise, nf.SGD(lr=0.1, batch_size=8), net).coordinates["hidden"].shape
        torch.Size([3])

    Source: Ziyin et al. (2024), the noise equilibrium theorem; the joint solution is ours.
    """
    theta, gradients = _prepare(noise, settings, params)
    blocks = _blocks(theta, gradients)
    minimum = blocks.minimise()
    before, trace = potential_of(theta, gradients, blocks), gradients.trace()
    x = minimum.coordinates
    equilibrium = Equilibrium(
        params=moved(noise.symmetries, theta, x),
        coordinates=x,
        outcomes=minimum.outcomes,
        drift=minimum.drift,
        relaxation_steps=minimum.relaxation,
        potential_before=before.item(),
        potential_after=(before + _change("value", blocks, x)).item(),
        trace_before=trace.item(),
        trace_after=(trace + _change("trace", blocks, x)).item(),
        iterations=minimum.iterations,
        symmetries=noise.symmetries,
        standard_error={name: torch.full_like(t, torch.nan) for name, t in x.items()},
        notes=_notes(noise),
        imbalance={name: Imbalance(residual.imbalance, float("nan")) for name, residual in blocks.residuals().items()},
    )
    if throw and equilibrium.status is not Status.CONVERGED:
        raise EquilibriumError(f"{equilibrium.status.value}:\n{equilibrium.message}")
    return equilibrium


def _notes(noise: NoiseMoments | SecondMoments) -> tuple[str, ...]:
    """What a reader of the table has to know of the statistics."""
    if isinstance(noise, NoiseMoments):
        return ()
    return (
        "The gradient noise below is the sum of v, the second moments of the gradients of minibatches, not Tr Sigma.",
        *noise.notes,
    )


def _prepare(
    noise: NoiseMoments | SecondMoments, settings: Optimizer, params: nn.Module | Params
) -> tuple[dict[str, Tensor], Minibatches]:
    """The parameters in float64, and the second moments, after a check that they have what an equilibrium needs."""
    if not noise.symmetries:
        raise EquilibriumError("there is no symmetry to bring to rest: the noise was measured for none")
    settings = require_settings(settings, params)
    if isinstance(noise, NoiseMoments):
        noise.require_variances()
    theta, gradients = snapshot(params, device=CPU), minibatches(noise, settings)
    for symmetry in noise.symmetries.values():
        symmetry.check(theta)
    require_names(theta, gradients.names, "the noise")
    return theta, gradients


def _blocks(theta: Params, gradients: Minibatches) -> Blocks:
    """The symmetries in blocks, after a check that the noise at these parameters determines the joint equilibrium."""
    blocks = Blocks.of(theta, gradients)
    if blocks.coupled:
        kinds = ", ".join(f"{name!r} ({type(gradients.symmetries[name]).__name__})" for name in blocks.coupled)
        raise EquilibriumError(
            "these symmetries share entries of a tensor, and the noise at a single point does not determine their "
            f"joint equilibrium: {kinds}. Use equilibrate(model, loss, loader, settings): it measures the noise on the "
            "way"
        )
    return blocks


def _change(what: Literal["value", "trace"], blocks: Blocks, x: Mapping[str, Tensor]) -> Tensor:
    """How potential or noise change from here to a point of the orbit, which no two blocks do together."""
    changes = (getattr(orbit, what)(x) - getattr(orbit, what)({}) for orbit in blocks.orbits)
    return sum(changes, torch.zeros((), dtype=torch.float64))

"""The noise equilibrium of a model: orbit by orbit, the symmetries of an orbit jointly."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from noetherflow._device import CPU
from noetherflow._errors import EquilibriumError
from noetherflow._optimizers import SGD, require_settings
from noetherflow._params import require_names, snapshot
from noetherflow._types import Params
from noetherflow.equilibrium.blocks import Blocks, moved, potential_of
from noetherflow.equilibrium.result import Equilibrium, Imbalance, Status
from noetherflow.noise import NoiseMoments


def potential(
    noise: NoiseMoments,
    sgd: SGD,
    params: nn.Module | Params,
    coordinates: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""The potential that the Noether flow descends, here or elsewhere on the orbit.

    $$\Phi(x) = 2\gamma\,|\theta_x|^2 + \sigma^2\,\mathrm{Tr}\,\Sigma(\theta_x), \qquad \theta_x = e^{Q_x}\theta$$

    $\Phi$ is convex along every symmetry, and $d\Phi/dx$ is minus the drift of the charge. Without weight decay its
    minimum is the point of least gradient noise of the orbit; weight decay trades noise for smaller norms. The noise
    elsewhere on the orbit follows from the noise here, $\Sigma \to e^{-Q_x}\Sigma e^{-Q_x}$.

    Args:
        noise: From `estimate_noise`; the symmetries for which it was measured span the orbit.
        sgd: The settings of the optimizer.
        params: The parameters at which the noise was measured, or the model that holds them.
        coordinates: Per symmetry the coordinates x of the point; absent ones are zero.

    Returns:
        The potential over all trained parameters, shape (), float64.

    Raises:
        EquilibriumError: If symmetries share entries in a way that has no closed transport of the noise.
        SettingsError: If a parameter on which a symmetry acts has no weight decay.
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
    sgd = require_settings(sgd, params)
    theta = _prepare(noise, params)
    x = {name: torch.as_tensor(value, device=CPU) for name, value in (coordinates or {}).items()}
    require_names(noise.symmetries, x, "coordinates")
    return _potential(theta, noise, sgd, _blocks(theta, noise, sgd), x)[0]


def solve_equilibrium(noise: NoiseMoments, sgd: SGD, params: nn.Module | Params, *, throw: bool = False) -> Equilibrium:
    r"""Find the point of the orbit at which every charge stands still.

    It is the unique minimum of `potential` up to rotations. A single symmetry has it in closed form:
    $x = \tfrac14 \log(P/R)$ row by row, or $e^{2x} = R^{-1} \# P$ for a matrix, with $P = 4\gamma C_- + 2\sigma^2 N_+$
    and $R = 4\gamma C_+ + 2\sigma^2 N_-$. Scalings and rescalings that share a tensor (neighbouring layers) are solved
    jointly by damped Newton, to rounding.

    Args:
        noise: From `estimate_noise`; the symmetries for which it was measured are brought to rest
            (`noise.select(...)` restricts them).
        sgd: The settings of the optimizer.
        params: The parameters at which the noise was measured, or the model that holds them.
        throw: Raise unless every symmetry converged.

    Returns:
        The equilibrium. A direction that has none is left where it is, and `outcomes` says which and why.

    Raises:
        EquilibriumError: If `throw` is set and a symmetry did not converge; or if a matrix symmetry or a dense
            generator shares entries with another symmetry, for which the noise has to be measured along the way: see
            `equilibrate`.
        ParameterNameError: If parameters are missing.
        SettingsError: If a parameter on which a symmetry acts has no weight decay.

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
    sgd = require_settings(sgd, params)
    theta = _prepare(noise, params)
    blocks = _blocks(theta, noise, sgd)
    minimum = blocks.minimise()
    before, trace_before = _potential(theta, noise, sgd, blocks, {})
    after, trace_after = _potential(theta, noise, sgd, blocks, minimum.coordinates)
    equilibrium = Equilibrium(
        params=moved(noise.symmetries, theta, minimum.coordinates),
        coordinates=minimum.coordinates,
        outcomes=minimum.outcomes,
        drift=minimum.drift,
        relaxation_steps={name: time / sgd.effective_lr for name, time in minimum.relaxation.items()},
        potential_before=before.item(),
        potential_after=after.item(),
        trace_before=trace_before.item(),
        trace_after=trace_after.item(),
        iterations=minimum.iterations,
        symmetries=noise.symmetries,
        standard_error={name: torch.full_like(x, torch.nan) for name, x in minimum.coordinates.items()},
        imbalance={name: Imbalance(residual.imbalance, float("nan")) for name, residual in blocks.residuals().items()},
    )
    if throw and equilibrium.status is not Status.CONVERGED:
        raise EquilibriumError(f"{equilibrium.status.value}:\n{equilibrium.message}")
    return equilibrium


def _prepare(noise: NoiseMoments, params: nn.Module | Params) -> dict[str, Tensor]:
    """The parameters in float64, after a check that the noise has what an equilibrium needs of them."""
    if not noise.symmetries:
        raise EquilibriumError("there is no symmetry to bring to rest: the noise was measured for none")
    noise.require_examples()
    theta = snapshot(params, device=CPU)
    for symmetry in noise.symmetries.values():
        symmetry.check(theta)
    require_names(theta, noise.mean, "the noise")
    noise.require_variances()
    return theta


def _blocks(theta: Params, noise: NoiseMoments, sgd: SGD) -> Blocks:
    """The symmetries in blocks, after a check that the noise at these parameters determines the joint equilibrium."""
    blocks = Blocks.of(theta, noise, sgd)
    if blocks.coupled:
        kinds = ", ".join(f"{name!r} ({type(noise.symmetries[name]).__name__})" for name in blocks.coupled)
        raise EquilibriumError(
            "these symmetries share entries of a tensor, and the noise at a single point does not determine their "
            f"joint equilibrium: {kinds}. Use equilibrate(model, loss, loader, sgd): it measures the noise on the way"
        )
    return blocks


def _potential(
    theta: Params, noise: NoiseMoments, sgd: SGD, blocks: Blocks, x: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The potential and Tr Sigma at a point of the orbit."""
    there = moved(noise.symmetries, theta, x)
    trace = noise.trace + sum(orbit.trace(x) - orbit.trace({}) for orbit in blocks.orbits)
    return potential_of(there, trace, noise, sgd), trace

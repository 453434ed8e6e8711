"""The noise equilibrium of a model: orbit by orbit, the symmetries of an orbit jointly."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from noetherflow._errors import EquilibriumError
from noetherflow._optimizers import SGD
from noetherflow._params import require_names, snapshot
from noetherflow._residual import entangled
from noetherflow._types import Params
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.dense import DenseOrbit
from noetherflow.equilibrium.matrix import MatrixOrbit
from noetherflow.equilibrium.orbit import Orbit
from noetherflow.equilibrium.result import Equilibrium, OrbitMinimum, Status
from noetherflow.noise import NoiseMoments
from noetherflow.symmetry import Action, Symmetry, along_axes


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
    theta = _prepare(noise, params)
    x = {name: torch.as_tensor(value) for name, value in (coordinates or {}).items()}
    require_names(noise.symmetries, x, "coordinates")
    return _potential(theta, noise, sgd, _orbits(theta, noise, sgd), x)[0]


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
            generator shares entries with another symmetry, for which there is no solver.
        ParameterNameError: If parameters are missing.

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
    theta = _prepare(noise, params)
    orbits = _orbits(theta, noise, sgd)
    minima = [orbit.minimise() for orbit in orbits]
    merged = _merge(minima, list(noise.symmetries))
    before, trace_before = _potential(theta, noise, sgd, orbits, {})
    after, trace_after = _potential(theta, noise, sgd, orbits, merged.coordinates)
    equilibrium = Equilibrium(
        params=_move(noise.symmetries, theta, merged.coordinates),
        coordinates=merged.coordinates,
        outcomes=merged.outcomes,
        drift=merged.drift,
        relaxation_steps={name: time / sgd.effective_lr for name, time in merged.relaxation.items()},
        potential_before=before.item(),
        potential_after=after.item(),
        trace_before=trace_before.item(),
        trace_after=trace_after.item(),
        iterations=merged.iterations,
        symmetries=noise.symmetries,
    )
    if throw and equilibrium.status is not Status.CONVERGED:
        raise EquilibriumError(f"{equilibrium.status.value}:\n{equilibrium.message}")
    return equilibrium


def _prepare(noise: NoiseMoments, params: nn.Module | Params) -> dict[str, Tensor]:
    """The parameters in float64, after a check that the noise has what an equilibrium needs of them."""
    if not noise.symmetries:
        raise EquilibriumError("there is no symmetry to bring to rest: the noise was measured for none")
    noise.require_examples()
    theta = snapshot(params)
    for symmetry in noise.symmetries.values():
        symmetry.check(theta)
    require_names(theta, noise.mean, "the noise")
    noise.require_variances()
    return theta


def _orbits(theta: Params, noise: NoiseMoments, sgd: SGD) -> list[Orbit]:
    symmetries = noise.symmetries
    groups, doubled = entangled(symmetries, theta)
    grams, variance = noise.grams, noise.variance
    orbits: list[Orbit] = []
    for group in groups:
        members = {name: symmetries[name] for name in group}
        actions = {symmetry.action for symmetry in members.values()}
        name, symmetry = next(iter(members.items()))
        if actions == {Action.SCALES_ENTRIES}:
            orbits.append(CommutingOrbit(along_axes(members), theta, variance, sgd))
        elif len(members) == 1 and actions == {Action.MIXES_ROWS} and name not in doubled:
            orbits.append(MatrixOrbit(name, symmetry, theta, grams[name], sgd))
        elif len(members) == 1 and actions == {Action.SCALES_EIGENSPACES}:
            orbits.append(DenseOrbit(name, symmetry, theta, grams[name], sgd))
        else:
            kinds = ", ".join(f"{n!r} ({type(s).__name__})" for n, s in members.items())
            raise EquilibriumError(
                "these symmetries act on the same entries of a tensor and do not commute, so they have no joint "
                f"solution here: {kinds}. Solve them one at a time, measuring the noise again in between, until "
                "nothing moves"
            )
    return orbits


def _potential(
    theta: Params, noise: NoiseMoments, sgd: SGD, orbits: list[Orbit], x: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The potential and Tr Sigma at a point of the orbit."""
    moved = _move(noise.symmetries, theta, x)
    norm = torch.stack([moved[name].square().sum() for name in noise.mean]).sum()
    trace = noise.trace + sum(orbit.trace(x) - orbit.trace({}) for orbit in orbits)
    return 2 * sgd.gamma * norm + sgd.temperature * trace, trace


def _move(symmetries: Mapping[str, Symmetry], theta: Params, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    moved = dict(theta)
    for name, coordinate in x.items():
        moved = symmetries[name].act(coordinate, moved)
    return moved


def _merge(minima: list[OrbitMinimum], order: list[str]) -> OrbitMinimum:
    """The results of all orbits, by symmetry name in the given order."""
    columns = []
    for column in ("coordinates", "drift", "relaxation", "outcomes"):
        values = {name: value for minimum in minima for name, value in getattr(minimum, column).items()}
        columns.append({name: values[name] for name in order})
    coordinates, drift, relaxation, outcomes = columns
    return OrbitMinimum(coordinates, drift, relaxation, outcomes, max(minimum.iterations for minimum in minima))

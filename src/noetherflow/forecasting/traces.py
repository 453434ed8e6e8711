r"""Traces of the Hessian by block, now and at the equilibrium.

Along an orbit $\theta\to e^{Q}\theta$ the Hessian follows, $H\to e^{-Q} H e^{-Q}$. Where all symmetries scale entries,
the entry p by $e^{s_p}$, the trace of a block at the equilibrium is $\sum_p e^{-2 s_p} H_{pp}$.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.equilibrium import Equilibrium
from noetherflow.forecasting.estimate import Change, Estimate, ratio_of
from noetherflow.forecasting.exact import Exact
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.symmetry import Action, Grams, Symmetry

# Diagonals that are kept, each from a part of the random vectors: what is not linear in H gets its error from these.
GROUPS = 4


@final
@dataclass(frozen=True)
class Traces:
    """Estimates of the trace of each block.

    Args:
        now: By block, shape (batches, vectors).
        then: The same at the equilibrium.
        weights: The share of each batch.
        diagonals: Estimates of the diagonal of H now by block, each from a part of the random vectors.
        exact: Whether the diagonal is exact on every batch.
    """

    now: dict[str, Tensor]
    then: dict[str, Tensor]
    weights: Tensor
    diagonals: list[dict[str, Tensor]]
    exact: bool

    def blocks(self) -> dict[str, Change]:
        """The trace of each block."""
        return {name: ratio_of(self.now[name], self.then[name], self.weights) for name in self.now}

    def total(self) -> Change:
        """The trace of H."""
        now, then = (torch.stack([*part.values()]).sum(0) for part in (self.now, self.then))
        return ratio_of(now, then, self.weights)


def scales_entries(equilibrium: Equilibrium) -> bool:
    """Whether every symmetry that moves scales entries."""
    moving = (s for name, s in equilibrium.symmetries.items() if bool(equilibrium.coordinates[name].any()))
    return all(symmetry.action is Action.SCALES_ENTRIES for symmetry in moving)


def carried(equilibrium: Equilibrium, coordinates: Mapping[str, Tensor], v: Params) -> dict[str, Tensor]:
    r"""The diagonal $e^{-2 s_p} H_{pp}$ at a point of an orbit that scales entries, from the diagonal at its start."""
    result = dict(v)
    for name, x in coordinates.items():
        if bool(x.any()):
            result = equilibrium.symmetries[name].act(-2 * x, result)
    return result


def moved(equilibrium: Equilibrium, coordinates: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    """The parameters at a point of the orbit."""
    result = dict(params)
    for name, symmetry in equilibrium.symmetries.items():
        if bool(coordinates[name].any()):
            result = symmetry.act(coordinates[name], result)
    return result


def measure(
    mean_loss: MeanLoss, exact: Exact | None, equilibrium: Equilibrium, there: Params, vectors: int, seed: int
) -> Traces:
    """The traces now and at the equilibrium.

    Args:
        mean_loss: The mean loss.
        exact: The exact diagonal, if the model has it; None for random vectors.
        equilibrium: The equilibrium.
        there: The parameters at the equilibrium.
        vectors: The number of random vectors.
        seed: Their seed.

    Returns:
        The traces. If the symmetries scale entries, the trace at the equilibrium is carried there; if not, it is
        measured there with the same random vectors.

    Raises:
        NoDoubleBackwardError: If an operation has no second derivative.
    """
    columns = 1 if exact else vectors
    shape = (len(mean_loss.batches), columns)
    now, then = ({n: torch.zeros(shape, dtype=torch.float64) for n in mean_loss.names} for _ in range(2))
    groups = min(GROUPS, max(shape) if exact else columns)
    diagonals = [{n: torch.zeros_like(t) for n, t in mean_loss.params.items()} for _ in range(groups)]
    parts = [0.0] * groups
    weights = mean_loss.weights
    carry = scales_entries(equilibrium)
    factors = carried(equilibrium, equilibrium.coordinates, _units(mean_loss)) if carry else {}
    for batch, number, entries in _entries(mean_loss, exact, mean_loss.params, vectors, seed):
        group = (batch if exact else number) % groups
        weight = float(weights[batch])
        parts[group] += weight
        for name, entry in entries.items():
            now[name][batch, number] = entry.double().sum()
            diagonals[group][name] += weight * entry
            if carry:
                then[name][batch, number] = (factors[name].to(entry.device) * entry).double().sum()
    if not carry:
        for batch, number, entries in _entries(mean_loss, exact, there, vectors, seed):
            for name, entry in entries.items():
                then[name][batch, number] = entry.double().sum()
    for part, diagonal in zip(parts, diagonals, strict=True):
        for tensor in diagonal.values():
            tensor /= part
    return Traces(now, then, weights, diagonals, exact is not None)


def trace_at(mean_loss: MeanLoss, exact: Exact | None, params: Params, vectors: int, seed: int) -> float:
    """The trace of H at given parameters."""
    return float((mean_loss.weights @ by_batch(mean_loss, exact, params, vectors, seed)).mean())


def by_batch(mean_loss: MeanLoss, exact: Exact | None, params: Params, vectors: int, seed: int) -> Tensor:
    """The trace of H of every batch at given parameters, shape (batches, vectors), or (batches, 1) if it is exact."""
    result = torch.zeros(len(mean_loss.batches), 1 if exact else vectors, dtype=torch.float64)
    for batch, number, entries in _entries(mean_loss, exact, params, vectors, seed):
        result[batch, number] = sum(float(entry.double().sum()) for entry in entries.values())
    return result


def curvature_grams(
    mean_loss: MeanLoss, symmetries: Mapping[str, Symmetry], vectors: int, seed: int
) -> list[dict[str, Grams]]:
    r"""Estimates of the Grams of H, $K_{ij} = \sum_m H_{(i,m),(j,m)}$ over rows i, j of both sides of each symmetry.

    With a random vector z of signs, the Gram of z and H z has the mean K. Grams at two arguments are differences of
    Grams at a single argument, $\tfrac14(G(z + Hz) - G(z - Hz))$.

    Args:
        mean_loss: The mean loss.
        symmetries: Symmetries that mix rows.
        vectors: The number of random vectors.
        seed: Their seed.

    Returns:
        By symmetry, from each of a few parts of the vectors.
    """
    groups = min(GROUPS, vectors)
    sums: list[dict[str, Grams]] = [{} for _ in range(groups)]
    names = {name for symmetry in symmetries.values() for name in symmetry.names}
    for made in mean_loss.products(mean_loss.params, vectors, seed):
        weight = float(mean_loss.weights[made.batch]) * groups / vectors / 4
        sides = []
        for sign in (1, -1):
            at = {n: (made.vector[n] + sign * made.product[n]).double().cpu() for n in names & made.vector.keys()}
            full = mean_loss.function.params
            sides.append(at | {n: torch.zeros(full[n].shape, dtype=torch.float64) for n in names - at.keys()})
        part = sums[made.number % groups]
        for name, symmetry in symmetries.items():
            here = [weight * (a - b) for a, b in zip(*(symmetry.grams(v) for v in sides), strict=True)]
            part[name] = (
                Grams(*(old + new for old, new in zip(part[name], here, strict=True))) if name in part else Grams(*here)
            )
    return sums


def equilibrium_errors(equilibrium: Equilibrium, diagonal: Params) -> tuple[float, dict[str, float]]:
    r"""The errors of Tr H and of its blocks at the equilibrium that come from the errors of the coordinates.

    $\partial\,\mathrm{Tr}H/\partial x_i = -2\sum_p q_{ip}\,e^{-2 s_p} H_{pp}$, which is -2 times the form of the charge
    with the squares replaced by the diagonal. Coordinates without an error are left out; errors are taken as
    independent.

    Returns:
        The error of the trace, and by block.
    """
    there = {
        name: part.cpu().double() for name, part in carried(equilibrium, equilibrium.coordinates, diagonal).items()
    }
    total, blocks = 0.0, dict.fromkeys(there, 0.0)
    for name, symmetry in equilibrium.symmetries.items():
        known = [block for block in symmetry.names if block in there]
        if symmetry.action is not Action.SCALES_ENTRIES or len(known) < len(symmetry.names):
            continue
        zeros = {block: torch.zeros_like(there[block]) for block in known}
        slopes = {}
        for block in known:
            plus, minus = ({**zeros, block: (sign * there[block]).clamp_min(0).sqrt()} for sign in (1, -1))
            slopes[block] = -2 * (symmetry.charge(plus) - symmetry.charge(minus))
            blocks[block] += float((slopes[block] * equilibrium.standard_error[name]).nan_to_num(0.0).square().sum())
        slope = torch.stack([*slopes.values()]).sum(0)
        total += float((slope * equilibrium.standard_error[name]).nan_to_num(0.0).square().sum())
    return total**0.5, {block: variance**0.5 for block, variance in blocks.items()}


def with_error(change: Change, error: float) -> Change:
    """A change with a further error of the number at the equilibrium, in quadrature."""
    then = _wider(change.then, error)
    return change._replace(then=then, ratio=_wider(change.ratio, abs(error / change.now.value)))


def _wider(estimate: Estimate, error: float) -> Estimate:
    known = 0.0 if math.isnan(estimate.sampling) else estimate.sampling
    return estimate._replace(sampling=math.hypot(known, error))


def _entries(
    mean_loss: MeanLoss, exact: Exact | None, params: Params, vectors: int, seed: int
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The numbers of batch and vector, and an estimate of the diagonal of the Hessian of that batch."""
    if exact is not None:
        for batch in range(len(mean_loss.batches)):
            yield batch, 0, exact.diagonal(params, batch)
        return
    for made in mean_loss.products(params, vectors, seed):
        yield made.batch, made.number, {name: made.vector[name] * part for name, part in made.product.items()}


def _units(mean_loss: MeanLoss) -> dict[str, Tensor]:
    return {n: torch.ones_like(t, dtype=torch.float64, device="cpu") for n, t in mean_loss.function.params.items()}

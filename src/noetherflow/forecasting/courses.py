"""Which symmetries move each other, and their joint way to the equilibrium."""

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow._forces import has_charge
from noetherflow._minibatch import minibatches
from noetherflow._residual import entangled
from noetherflow._second_moments import SecondMoments
from noetherflow.equilibrium import Equilibrium, Status
from noetherflow.forecasting.coupled import Course, Mover, Rotating, Scaling, course_of
from noetherflow.forecasting.mean_loss import MeanLoss
from noetherflow.noise.measurement import Measurement
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Action, Symmetry

# Entries of parameters that move together, at most; the way takes a hundred products with these.
_ENTRIES = 2e7
# The end of a way lies within this share of the distance from the equilibrium, or the noise is that of other data.
_APART = 0.01
# Start and end of a way, in units of the shortest and the longest relaxation time.
_SHORTEST, _LONGEST = 1e-3, 60.0
# Memory that stacked gradients of examples may take, in bytes.
_STACKS = 2**28


@final
class Groups(NamedTuple):
    """The symmetries that move, by what carries the noise on their orbit.

    Args:
        scaling: Symmetries that scale entries and share tensors, group by group.
        rotating: Double rotations that share no entry with another symmetry.
        mixed: Symmetries that share entries with a double rotation: the noise at a point does not determine that on
            their joint orbit.
    """

    scaling: list[list[str]]
    rotating: list[str]
    mixed: list[str]

    @classmethod
    def of(cls, equilibrium: Equilibrium, settings: Optimizer) -> "Groups":
        """The groups of the symmetries of an equilibrium."""
        moving = {
            name: symmetry
            for name, symmetry in equilibrium.symmetries.items()
            if has_charge(symmetry, settings) and bool(equilibrium.coordinates[name].any())
        }
        groups = cls([], [], [])
        sharing, doubled = entangled(moving, equilibrium.params)
        for group in sharing:
            alone = len(group) == 1 and group[0] not in doubled
            if all(moving[name].action is Action.SCALES_ENTRIES for name in group):
                if not alone:
                    groups.scaling.append(group)
            elif not alone:
                groups.mixed.extend(group)
            elif moving[group[0]].action is Action.MIXES_ROWS:
                groups.rotating.append(group[0])
        return groups


@final
class Courses(NamedTuple):
    """Joint ways by symmetry, and the symmetries that move each other without a joint way."""

    by_name: dict[str, Course]
    apart: tuple[str, ...]


def courses_of(
    mean_loss: MeanLoss,
    equilibrium: Equilibrium,
    settings: Optimizer,
    *,
    microbatches: bool,
    moments: SecondMoments | None = None,
) -> Courses:
    """The ways of all symmetries that move each other.

    Args:
        mean_loss: The mean loss.
        equilibrium: The equilibrium.
        settings: The settings of the optimizer.
        microbatches: As for `equilibrate`.
        moments: The second moments that Adam keeps, where the noise is not measured.

    Returns:
        The ways.
    """
    groups = Groups.of(equilibrium, settings)
    joint = [group for group in groups.scaling if _entries(equilibrium, group) <= _ENTRIES]
    joint += [[name] for name in groups.rotating if equilibrium.outcomes[name].status is Status.CONVERGED]
    everything = {name for group in (*groups.scaling, groups.rotating, groups.mixed) for name in group}
    if not joint or (moments is None and settings.share is None):
        return Courses({}, tuple(sorted(everything)))
    symmetries = {name: equilibrium.symmetries[name] for group in joint for name in group}
    params = {name: tensor.double().cpu() for name, tensor in mean_loss.function.params.items()}
    if moments is None:
        measurement = Measurement(
            mean_loss.model,
            mean_loss.loss,
            mean_loss.batches,
            symmetries,
            dtype=mean_loss.dtype,
            microbatches=microbatches,
            max_bytes=_STACKS,
        )
        gradients = minibatches(measurement.at(params), settings)
    else:
        gradients = minibatches(moments.for_symmetries(symmetries), settings)
    by_name: dict[str, Course] = {}
    for group in joint:
        times = {name: equilibrium.relaxation_steps[name] for name in group}
        finite = torch.cat([time[torch.isfinite(time)].flatten() for time in times.values()])
        ends = {name: equilibrium.coordinates[name] for name in group}
        distance = max(float(end.abs().max()) for end in ends.values())
        if not len(finite):
            continue
        mover: Mover
        if group[0] in groups.rotating:
            mover = Rotating(group[0], params, gradients)
        else:
            chosen: dict[str, Symmetry] = {name: symmetries[name] for name in group}
            free = {name: torch.isfinite(time).double() for name, time in times.items()}
            mover = Scaling(chosen, params, gradients, free)
        course = course_of(mover, _SHORTEST * float(finite.min()), _LONGEST * float(finite.max()), distance)
        if _arrives(course, ends, distance):
            by_name |= dict.fromkeys(group, course)
    return Courses(by_name, tuple(sorted(everything - by_name.keys())))


def _entries(equilibrium: Equilibrium, group: list[str]) -> int:
    names = {name for key in group for name in equilibrium.symmetries[key].names}
    return sum(equilibrium.params[name].numel() for name in names)


def _arrives(course: Course, ends: Mapping[str, Tensor], distance: float) -> bool:
    """Whether a way ends at the equilibrium."""
    last = {name: course.coordinates[name][-1] for name in ends}
    return all(float((last[name] - end).abs().max()) <= _APART * distance for name, end in ends.items())

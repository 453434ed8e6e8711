"""Records of a simulation: at which steps they are made, and what they hold."""

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.func import vmap

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.simulation.trajectory import Trajectory
from noetherflow.symmetry import Symmetry


@final
class State(dict[str, Tensor]):
    """The parameters of a replica by name, and the second moments that its optimizer keeps.

    Args:
        params: Parameters by name.
        second_moments: Bias-corrected averages of squares of gradients by name; empty unless the optimizer is AdamW.
    """

    def __init__(self, params: Params, second_moments: Params) -> None:
        super().__init__(params)
        self.second_moments = dict(second_moments)


# A function of the state of one replica.
Observable = Callable[[State], Tensor]

# Number of records if the user names none, roughly.
_RECORDS = 200


@final
class Recorder:
    """Collects losses, charges and observables of all replicas along a simulation.

    Args:
        symmetries: The symmetries whose charges are recorded.
        observables: Further functions of the state of one replica, which return a tensor.
    """

    def __init__(self, symmetries: Mapping[str, Symmetry], observables: Mapping[str, Observable]) -> None:
        charges: dict[str, Observable] = {f"charges/{name}": symmetry.charge for name, symmetry in symmetries.items()}
        self._quantities = charges | {f"observables/{name}": function for name, function in observables.items()}
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {key: [] for key in self._quantities}

    def add_state(self, step: int, stacks: Params, second_moments: Params) -> None:
        """Record charges and observables at stacked tensors, shape (R, *parameter) by name, before a step."""
        self._steps.append(step)
        for key, quantity in self._quantities.items():
            self._values[key].append(_over_replicas(quantity, stacks, second_moments).detach().clone())

    def add_losses(self, losses: Tensor) -> None:
        """Record the mean losses, shape (R,), of the step last recorded."""
        self._losses.append(losses)

    def trajectory(self, final: Params, second_moments: Params) -> Trajectory:
        """All records, and the parameters and second moments at the end, on the CPU."""
        groups: dict[str, dict[str, Tensor]] = {"charges": {}, "observables": {}}
        for key, values in self._values.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = torch.stack(values).cpu()
        for kind, stacks in (("params", final), ("second_moments", second_moments)):
            groups[kind] = {name: stack.detach().clone().cpu() for name, stack in stacks.items()}
        return Trajectory(torch.tensor(self._steps), torch.stack(self._losses).cpu(), **groups)


def recorded_steps(steps: int, record: int | Sequence[int] | None) -> set[int]:
    """The steps at which records are made, besides the end.

    Args:
        steps: Number of steps of the simulation.
        record: An interval in steps, the steps themselves, or None for about 200 records.

    Returns:
        The steps; 0 is always among them.

    Raises:
        SettingsError: If the number of steps or the interval is below 1, or if a step is outside the simulation.
    """
    if not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"steps must be a whole number, 1 or more, got {steps!r}")
    if record is None:
        record = max(1, steps // _RECORDS)
    if isinstance(record, int):
        if record < 1:
            raise SettingsError(f"record must be 1 or more, or a sequence of steps, got {record}")
        return {0, *range(0, steps, record)}
    outside = [step for step in record if not 0 <= step <= steps]
    if outside:
        raise SettingsError(f"record names steps outside 0 .. {steps}: {outside[:5]}")
    return {0, *record}


def _over_replicas(quantity: Observable, stacks: Params, second_moments: Params) -> Tensor:
    """A quantity of every replica, shape (R, *quantity)."""

    def of_replica(params: Params, moments: Params) -> Tensor:
        return quantity(State(params, moments))

    try:
        return vmap(of_replica)(dict(stacks), dict(second_moments))
    except Exception:
        # vmap refuses .item() and branches on values, which an observable may use. A mistake in the observable is
        # raised again by the loop.
        count = len(next(iter(stacks.values())))
        replicas = (
            [{name: stack[index] for name, stack in given.items()} for given in (stacks, second_moments)]
            for index in range(count)
        )
        return torch.stack([torch.as_tensor(of_replica(*replica)) for replica in replicas])

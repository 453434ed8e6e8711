"""The parts of a model of which the noise scale is told: all of it, parameter groups, layers."""

from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError

# Parameters of the model itself, and not of a module in it.
_TOP = "(model)"
# What torch.compile puts in front of the names of the parameters of a module.
_COMPILED = "_orig_mod."


@final
class Parts:
    """Which parameters belong to which part; a parameter is in the total, in a parameter group and in a layer.

    Args:
        names: The measured parameters, by canonical name.
        model: The model.
        optimizer: Its parameter groups are parts, if there are several.
    """

    def __init__(self, names: Sequence[str], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        layers: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            # A run may be resumed without torch.compile, and curves keep their names.
            layers.setdefault(name.replace(_COMPILED, "").rpartition(".")[0] or _TOP, []).append(index)
        groups = {} if optimizer is None else _groups(names, model, optimizer, layers)
        self.groups = list(groups)
        self.layers = list(layers)
        members = [list(range(len(names))), *groups.values(), *layers.values()]
        self._sums = torch.zeros(len(members), len(names), dtype=torch.float64)
        for row, indices in zip(self._sums, members, strict=True):
            row[indices] = 1.0

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def keys(self) -> list[str]:
        """A name for each part, such as `group 0` or the path of a module; the total has the empty name."""
        return ["", *self.groups, *self.layers]

    def sums(self, by_parameter: Tensor) -> Tensor:
        """Numbers of the parameters, shape (P, ...), summed over each part."""
        return self._sums @ by_parameter


def _groups(
    names: Sequence[str], model: nn.Module, optimizer: torch.optim.Optimizer, taken: Collection[str]
) -> dict[str, list[int]]:
    """The parameters of each parameter group, if there are several, under names that are not taken."""
    places = {name: index for index, name in enumerate(names)}
    position = {id(parameter): places[name] for name, parameter in model.named_parameters() if name in places}
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        indices = [position[id(parameter)] for parameter in group["params"] if id(parameter) in position]
        name = f"group {group.get('name', number)}"
        while name in taken or name in groups:
            name += f" ({number})"
        if indices:
            groups[name] = indices
    if not groups:
        raise SettingsError(
            f"the {type(optimizer).__name__} holds none of the model's trained parameters: give the optimizer that "
            "trains this model, made from model.parameters()"
        )
    return groups if len(groups) > 1 else {}

"""The second moments of the gradients of minibatches that Adam keeps: no data is needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from noetherflow import _store
from noetherflow._device import CPU
from noetherflow._errors import ParameterNameError, ParameterShapeError, SettingsError
from noetherflow.noise.exact import resolve
from noetherflow.symmetry import Symmetry


@final
@dataclass(frozen=True)
class SecondMoments:
    r"""The second moments $E\,g_S^2$ of the gradients of minibatches, entry by entry, as Adam averages them.

    Args:
        values: Bias-corrected averages by parameter, float64.
        steps: How many steps each average has seen.
        symmetries: The symmetries that are to be brought to rest, with parameters under their canonical names.

    Source: Kingma and Ba (2015) for the average and its correction.
    """

    values: dict[str, Tensor] = field(repr=False)
    steps: dict[str, int] = field(repr=False)
    symmetries: dict[str, Symmetry]

    def select(self, *names: str) -> "SecondMoments":
        """The second moments, restricted to some of the symmetries.

        Args:
            names: The symmetries to keep, by name.

        Returns:
            The same second moments, with these symmetries alone, in the order given.

        Raises:
            ParameterNameError: If there is no symmetry of that name.
        """
        missing = [name for name in names if name not in self.symmetries]
        if missing:
            raise ParameterNameError(f"there are no symmetries {missing}, only {sorted(self.symmetries)}")
        return replace(self, symmetries={name: self.symmetries[name] for name in names})

    def save(self, path: str | Path) -> None:
        """Write the second moments to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by custom `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "SecondMoments":
        """Read second moments that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The second moments, on the CPU.

        Raises:
            FileError: If the file is missing, damaged, or holds something else.
        """
        return _store.load(cls, path, _require_consistent)


def second_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, symmetries: Mapping[str, Symmetry] | None = None
) -> SecondMoments:
    """Read the second moments of gradients from an optimizer.

    Args:
        optimizer: A `torch.optim.AdamW` or `Adam`.
        model: The model that it trains.
        symmetries: By name.

    Returns:
        The second moments.

    Raises:
        SettingsError: If the optimizer is of another kind.
    """
    values: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    if not isinstance(optimizer, torch.optim.Adam):
        raise SettingsError(f"expected torch.optim.AdamW or Adam, got {type(optimizer).__name__}")
    betas = {id(p): group["betas"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            steps[name] = int(state["step"])
            average = state["exp_avg_sq"].detach().to(CPU, torch.float64)
            values[name] = average / (1 - float(betas[id(parameter)][1]) ** steps[name])
    return SecondMoments(values, steps, resolve(model, symmetries or {}))


def _require_consistent(moments: SecondMoments) -> None:
    """Raise unless the parts, read from a file, belong together."""
    if moments.values.keys() != moments.steps.keys():
        raise ParameterShapeError(f"steps of {sorted(moments.steps)}, expected those of {sorted(moments.values)}")
    for symmetry in moments.symmetries.values():
        symmetry.check(moments.values)
    for name, tensor in moments.values.items():
        if tensor.dtype != torch.float64:
            raise ParameterShapeError(f"values[{name!r}] has dtype {tensor.dtype}, expected float64")

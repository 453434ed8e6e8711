"""Options of the command line: choices, and options that contradict each other."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, final

from noetherflow._errors import SettingsError


@final
class Dtype(StrEnum):
    """The choices of --dtype."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


def check_options(rebalance: bool, save: Path | None, options: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for options that contradict each other or lie out of range, before `build()` runs."""
    for name in ("holdout", "tolerance"):
        if not 0 < options.get(name, 0.5) < 1:
            raise SettingsError(f"--{name} must lie between 0 and 1, got {options[name]}")
    if rebalance and save is None:
        raise SettingsError("--rebalance needs a file for the weights: add --save FILE.safetensors")
    if save is not None and not rebalance:
        raise SettingsError(f"--save {save} writes rebalanced weights: add --rebalance")
    if save is not None and save.suffix != ".safetensors":
        raise SettingsError(f"--save writes safetensors, so the file must end in .safetensors, got {save}")

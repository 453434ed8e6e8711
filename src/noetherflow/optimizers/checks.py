"""Checks and factors that all optimizers share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from noetherflow._errors import SettingsError
from noetherflow.optimizers.by_parameter import entries_of, number


def require(value: Any, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise `SettingsError` unless a condition holds for a value."""
    try:
        good = bool(holds(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise SettingsError(f"{name} must be {expected}, got {value!r}")


def require_setting(setting: Any, key: str, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise `SettingsError` unless a condition holds for every number of a setting."""
    for place, value in entries_of(setting, key).items():
        require(value, place, expected, holds)


def require_batches(batch_size: Any, replacement: bool, dataset_size: Any) -> None:
    """Raise `SettingsError` unless the settings of sampling are in range and complete."""
    require(batch_size, "batch_size", "a whole number, 1 or more", lambda n: n == int(n) and n >= 1)
    if replacement:
        return
    if dataset_size is None:
        raise SettingsError(
            "sampling without replacement has less noise in a small data set, by (N - S)/(N - 1): give its size too, "
            "replacement=False, dataset_size=len(dataset)"
        )
    require(dataset_size, "dataset_size", f"at least batch_size = {batch_size}", batch_size.__le__)


def sampling_factor(batch_size: int, replacement: bool, dataset_size: int | None) -> float:
    """The variance of a minibatch mean over that of independent draws: 1, or (N - S)/(N - 1) without replacement."""
    if replacement or dataset_size is None:
        return 1.0
    if dataset_size == 1:
        return 0.0
    return (dataset_size - batch_size) / (dataset_size - 1)


def filled_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups that hold parameters; all of them, if none does."""
    return [group for group in optimizer.param_groups if group["params"]] or optimizer.param_groups


def shared(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A setting in which parameter groups must not differ; raises `SettingsError` if they do."""
    values = [number(group[name]) for group in groups]
    if any(value != values[0] for value in values):
        raise SettingsError(
            f"all parameter groups must share {name}, got {values}: a symmetry that joins parameters of different "
            f"{name} has no equilibrium in closed form. Give every group the same {name}; for symmetries within a "
            "single group, give the settings of that group, and restrict the noise with noise.select(...)"
        )
    return values[0]

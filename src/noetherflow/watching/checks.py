"""What a watch of the noise scale is given: checked, with sentences."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.optimizers.checks import require

EXAMPLES, MICROBATCHES = "examples", "microbatches"
_STATE = {"steps", "skipped", "averages"}


def require_settings(every: int, between: str, window: float, confidence: float) -> None:
    """Raise `SettingsError` if a setting is out of range."""
    if between not in (EXAMPLES, MICROBATCHES):
        raise SettingsError(f"between must be {EXAMPLES!r} or {MICROBATCHES!r}, got {between!r}")
    require(every, "every", "a whole number, 1 or more", lambda n: n == int(n) and n >= 1)
    require(window, "window", "at least 2 measured steps, or infinity", lambda n: n >= 2)
    require(confidence, "confidence", "between 0 and 1", lambda p: 0 < p < 1)


def require_optimizer(optimizer: object) -> None:
    """Raise `SettingsError` unless there is no optimizer, or it has parameter groups."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise SettingsError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: of several optimizers give "
            "the adaptive optimizer, whose metric is measured, or none"
        )


def require_known(model: nn.Module, params: Params) -> None:
    """Raise `SettingsError` if a model trains other parameters than those that are watched."""
    others = [name for name, p in model.named_parameters() if p.requires_grad and name not in params]
    if others:
        raise SettingsError(
            f"the model trains parameters that it did not train when the NoiseScale was made: {others[:3]}"
            f"{' and more' if len(others) > 3 else ''}. Make another NoiseScale, which begins new averages"
        )


def require_state(state: Any) -> None:
    """Raise `SettingsError` unless something is a state of a `NoiseScale`."""
    if not isinstance(state, Mapping) or not state.keys() >= _STATE:
        listing = sorted(map(str, state))[:5] if isinstance(state, Mapping) else type(state).__name__
        raise SettingsError(
            f"expected a state of NoiseScale.state_dict(), with the keys {sorted(_STATE)}, got {listing}"
        )
    averages = state["averages"]
    if not isinstance(averages, Mapping) or not averages.keys() >= {"parts", "steps", "averages"}:
        raise SettingsError(f"the state of NoiseScale is damaged: its averages are {averages!r:.80}")

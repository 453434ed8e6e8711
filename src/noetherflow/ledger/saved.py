"""The account in a checkpoint: numbers, strings and tensors, which `torch.load` reads with weights only."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow.ledger.parts import ChargeParts

COUNTS = ("steps", "split_steps", "measured_steps", "skipped")
_FORMAT = 1
_Unpacked = tuple[dict[str, int], dict[str, Tensor], dict[str, ChargeParts], dict[str, ChargeParts]]


def packed(
    counts: Mapping[str, int],
    charges: Mapping[str, Tensor],
    totals: Mapping[str, ChargeParts],
    last: Mapping[str, ChargeParts],
) -> dict[str, Any]:
    """The account in dictionaries, with copies of its tensors."""
    return {
        "format": _FORMAT,
        "counts": dict(counts),
        "charges": {name: charge.clone() for name, charge in charges.items()},
        "totals": {name: {part: t.clone() for part, t in parts.items()} for name, parts in totals.items()},
        "last": {name: {part: t.clone() for part, t in parts.items()} for name, parts in last.items()},
    }


def unpacked(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> _Unpacked:
    """Counts, charges, totals and last parts of a state.

    Args:
        state: From `packed`.
        like: The charges of the account that is to continue.

    Returns:
        Its contents, with copies of its tensors.

    Raises:
        SettingsError: If it does not fit.
    """
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise SettingsError(
            f"expected a state of ChargeLedger.state_dict() in format {_FORMAT}, got "
            f"{state.get('format') if isinstance(state, Mapping) else type(state).__name__!r}"
        )
    try:
        counts = {name: int(state["counts"][name]) for name in COUNTS}
        charges = {name: _copy(charge) for name, charge in state["charges"].items()}
        totals, last = (
            {name: ChargeParts(**{part: _copy(t) for part, t in parts.items()}) for name, parts in state[key].items()}
            for key in ("totals", "last")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"the state of ChargeLedger is damaged: {error!r}") from error
    expected = {name: tuple(charge.shape) for name, charge in like.items()}
    shapes = {name: tuple(charge.shape) for name, charge in charges.items()}
    if shapes != expected or totals.keys() != expected.keys() or not last.keys() <= expected.keys():
        raise SettingsError(
            f"the state of ChargeLedger has charges of the shapes {shapes}, and the symmetries of this account have "
            f"{expected}: load it into an account of the symmetries with which it was saved"
        )
    return counts, {name: charges[name] for name in expected}, {name: totals[name] for name in expected}, last


def _copy(tensor: Tensor) -> Tensor:
    return torch.as_tensor(tensor, dtype=torch.float64, device="cpu").clone()

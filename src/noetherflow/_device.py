"""Where the package computes, and in which floating-point type: the policy of devices, in one place.

- Losses and gradients are computed where the parameters are, in the type of the model (proofs: in float64).
- Statistics of gradients are accumulated in float64 where each parameter is. If parameters are on several devices, the
  statistics that join them are joined on the CPU.
- Results are on the CPU, and so is every solver, in float64. What moves a model moves numbers to its parameters.
- Random numbers of the package are drawn on the CPU, so that all devices get the same numbers. A block of
  `own_randomness` restores the generators of all devices of a type.

A device without float64 (MPS) is refused before any work begins.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from noetherflow._errors import SettingsError

CPU = torch.device("cpu")


def require_float64(devices: Iterable[torch.device]) -> None:
    """Raise unless every device has float64.

    Args:
        devices: The devices of a model's parameters.

    Raises:
        SettingsError: If a device has no float64, as MPS.
    """
    for device in dict.fromkeys(devices):
        if not _has_float64(device):
            raise SettingsError(
                f"the model is on {device}, which has no float64; statistics of gradients and proofs are computed in "
                "float64. Move the model to the CPU: model.cpu()"
            )


def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors on one device: as they are, or on the CPU if they are on several devices."""
    given = list(tensors)
    if len({tensor.device for tensor in given}) < 2:
        return given
    return [tensor.to(CPU) for tensor in given]


def every_device(device: torch.device) -> list[int]:
    """The indices of all devices of a type other than the CPU; none for the CPU and for tensors without numbers.

    A model may be on several devices, and `torch.manual_seed` seeds all of them.

    Returns:
        The indices.
    """
    if device.type in ("cpu", "meta"):
        return []
    return list(range(torch.get_device_module(device).device_count()))

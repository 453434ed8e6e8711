"""Which set of kernels works on a tensor: by device, by what is installed, or by NOETHERFLOW_KERNELS."""

import os
from functools import cache

from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow._extras import has, require
from noetherflow.noise.kernels.base import Kernels
from noetherflow.noise.kernels.reference import Reference

_VARIABLE = "NOETHERFLOW_KERNELS"


def kernels_for(tensor: Tensor) -> Kernels:
    """The set for tensors like this.

    Args:
        tensor: Any tensor on the device where the work is.

    Returns:
        That which NOETHERFLOW_KERNELS names; else the compiled loops on a CPU where numba is installed, else the
        reference.

    Raises:
        SettingsError: If NOETHERFLOW_KERNELS names no set.
        MissingExtraError: If it names a set whose package is not installed.
    """
    return kernels_of(name_for(tensor))


def name_for(tensor: Tensor) -> str:
    """The name of the set for tensors like this; see `kernels_for`."""
    return os.environ.get(_VARIABLE) or ("cpu" if tensor.is_cpu and has_numba() else "reference")


def reason_for(tensor: Tensor) -> str:
    """Why `name_for` names that set, for a reader."""
    if value := os.environ.get(_VARIABLE):
        return f"{_VARIABLE}={value}"
    if not tensor.is_cpu:
        return "compiled loops run on the CPU only"
    return "numba is installed" if has_numba() else "numba is not installed"


@cache
def kernels_of(name: str) -> Kernels:
    """The set of a name; see `kernels_for`."""
    if name == "reference":
        return Reference()
    if name == "cpu":
        require("cpu", "numba", purpose=f"{_VARIABLE}=cpu")
        from noetherflow.noise.kernels.cpu import Cpu  # loads the compiler

        return Cpu()
    raise SettingsError(f"{_VARIABLE}={name} names no set of kernels: it is reference or cpu")


@cache
def has_numba() -> bool:
    """Whether the package that compiles the loops is installed."""
    return has("numba")

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
    name = os.environ.get(_VARIABLE) or ("cpu" if tensor.is_cpu and has_numba() else "reference")
    return kernels_of(name)


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

"""What is installed and what of it works: versions, devices, kernels, threads and extras, and what is broken."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any, final

import torch

from noetherflow import _versions
from noetherflow._device import require_float64
from noetherflow._errors import MissingExtraError, SettingsError
from noetherflow._extras import has
from noetherflow._table import Column, Table, text_of
from noetherflow.noise.kernels.choose import kernels_for, name_for, reason_for

# The dependencies. As in pyproject.toml, like the rest of this list.
CORE = ("torch", "numpy", "scipy", "safetensors")
# The oldest version that works, where an older version is known not to.
OLDEST: dict[str, tuple[int, ...]] = {"torch": (2, 6), "transformers": (5, 19)}
# What each extra installs, with the extras that it contains.
EXTRAS = {
    "cpu": ("numba",),
    "cli": ("typer", "rich"),
    "report": ("matplotlib", "plotly"),
    "paper": ("typer", "rich", "matplotlib", "plotly", "pyarrow", "scikit-learn", "transformers"),
    "lightning": ("lightning",),
    "transformers": ("transformers", "accelerate"),
}
# Packages whose modules have another name.
_IMPORTED_AS = {"scikit-learn": "sklearn"}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@final
@dataclass(frozen=True)
class Device:
    """A device of PyTorch.

    Args:
        name: As PyTorch calls it, such as `cuda:0`.
        description: The name of the processor, if PyTorch knows it.
        float64: Whether float64 works there, which statistics and proofs need.
        kernels: The set of kernels for tensors there.
        reason: Why that set.
        problem: What does not work there, or an empty string.
    """

    name: str
    description: str
    float64: bool
    kernels: str
    reason: str
    problem: str = ""


@final
@dataclass(frozen=True)
class Extra:
    """An extra of the package.

    Args:
        name: Its name.
        versions: The version of each of its packages; None for a package that is not installed.
    """

    name: str
    versions: dict[str, str | None]

    @property
    def command(self) -> str:
        """The command that installs what is missing or too old; empty if nothing is."""
        complete = all(version and not too_old(name, version) for name, version in self.versions.items())
        return "" if complete else f'pip install "noetherflow[{self.name}]"'


@final
@dataclass(frozen=True)
class Installation:
    """What `noetherflow doctor` prints.

    Args:
        versions: Of Python, this package and its dependencies; None for what is not installed.
        devices: The CPU and every accelerator.
        extras: The extras.
        threads: Numbers of threads, and the environment variables that set them.
        problems: A sentence for everything that is broken. A missing extra is not.
    """

    versions: dict[str, str | None]
    devices: tuple[Device, ...]
    extras: tuple[Extra, ...]
    threads: dict[str, str]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return text_of(_tables(self))

    def to_json(self) -> dict[str, Any]:
        """Everything as dictionaries, lists and text."""
        extras = [asdict(extra) | {"command": extra.command} for extra in self.extras]
        return asdict(self) | {"extras": extras}


def examine() -> Installation:
    """Look at the environment in which this process runs."""
    versions: dict[str, str | None] = {"noetherflow": _versions.__version__, "python": platform.python_version()}
    versions |= {name: version_of(name) for name in CORE}
    devices = tuple(examine_device(device, text) for device, text in _devices())
    extras = tuple(
        Extra(name, {package: _version_of_extra(package) for package in packages}) for name, packages in EXTRAS.items()
    )
    problems = (*problems_of(versions), *(f"{device.name}: {device.problem}" for device in devices if device.problem))
    return Installation(versions, devices, extras, _threads(), problems)


def _version_of_extra(package: str) -> str | None:
    """The version of a package, "installed" if it states none, None if it cannot be imported."""
    return (version_of(package) or "installed") if has(_IMPORTED_AS.get(package, package)) else None


def problems_of(versions: dict[str, str | None]) -> list[str]:
    """A sentence for each dependency that is missing or too old."""
    sentences = []
    for name in CORE:
        version = versions[name]
        if version is None:
            sentences.append(f"{name} is not installed: run pip install {name}")
        elif too_old(name, version):
            oldest = ".".join(map(str, OLDEST[name]))
            sentences.append(
                f'{name} {version} is too old, noetherflow needs {oldest} or newer: run pip install "{name}>={oldest}"'
            )
    return sentences


def too_old(name: str, version: str) -> bool:
    """Whether a version of a package is older than the oldest that works; not if it has no numbers."""
    numbers = release_of(version)
    return bool(numbers) and numbers < OLDEST.get(name, ())


def release_of(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: (2, 13, 0) of 2.13.0+cpu, and (2, 6) of 2.6a1."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_device(device: torch.device, description: str) -> Device:
    """Try float64 on a device, and load the kernels for it."""
    try:
        tensor = torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch is built without the device
        return Device(str(device), description, False, "", "", f"does not work: {_first_line(error)}")
    try:
        require_float64([device])
    except SettingsError:
        return Device(str(device), description, False, "none", "without float64 a model on this device is refused")
    problem = ""
    try:
        kernels_for(tensor)
    except (SettingsError, MissingExtraError) as error:
        problem = str(error)
    except ImportError as error:
        problem = (
            f"numba is installed but cannot be imported ({_first_line(error)}): repair it, or set "
            "NOETHERFLOW_KERNELS=reference"
        )
    return Device(str(device), description, True, name_for(tensor), reason_for(tensor), problem)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _devices() -> list[tuple[torch.device, str]]:
    """The CPU and every accelerator, with the names of their processors."""
    listed = [(torch.device("cpu"), platform.machine())]
    # PyTorch 2.6 brought this interface; an older PyTorch is a problem of its own.
    accelerators = getattr(torch, "accelerator", None)
    if accelerators is None or not accelerators.is_available():
        return listed
    kind = accelerators.current_accelerator().type
    name_of = getattr(torch.get_device_module(kind), "get_device_name", None)
    for index in range(accelerators.device_count()):
        listed.append((torch.device(kind, index), name_of(index) if name_of else ""))
    return listed


def _threads() -> dict[str, str]:
    counts = {
        "processors": str(os.cpu_count()),
        "threads of PyTorch": str(torch.get_num_threads()),
        "threads between operations": str(torch.get_num_interop_threads()),
    }
    return counts | {name: os.environ.get(name, "not set") for name in _THREADS}


def _package(name: str, version: str | None) -> str:
    if version is None:
        return f"{name} missing"
    return f"{name} {version}" + (" (too old)" if too_old(name, version) else "")


def _tables(installation: Installation) -> list[Table]:
    plain = (Column(""), Column("", folds=True))
    versions = tuple((name, version or "not installed") for name, version in installation.versions.items())
    devices = tuple(
        (device.name, device.description, "works" if device.float64 else "no", device.kernels, device.reason)
        for device in installation.devices
    )
    extras = tuple(
        (
            extra.name,
            ", ".join(_package(name, version) for name, version in extra.versions.items()),
            extra.command or "complete",
        )
        for extra in installation.extras
    )
    return [
        Table("Versions", plain, versions),
        Table(
            "Devices",
            (*map(Column, ("device", "processor", "float64", "kernels")), Column("because", folds=True)),
            devices,
        ),
        Table("Extras", (Column("extra"), Column("packages", folds=True), Column("install")), extras),
        Table("Threads", plain, tuple(installation.threads.items())),
        Table("Broken", (Column("", folds=True),), tuple((text,) for text in installation.problems or ("nothing",))),
    ]

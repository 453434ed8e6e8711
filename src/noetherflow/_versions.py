"""The versions with which a result was computed."""

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    packages = ("noetherflow", "torch", "numpy")
    packages_used = {name: importlib.metadata.version(name) for name in packages}
    return packages_used | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
    }

"""What a result was computed with."""

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    packages = ("noetherflow", "torch", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}

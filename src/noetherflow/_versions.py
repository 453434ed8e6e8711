"""The version of this package, and the versions with which a result was computed."""

import importlib.metadata
import platform

# The only place of the version: the build reads it here, and so do programs that run from the source.
__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    packages_used = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return (
        {"noetherflow": __version__}
        | packages_used
        | {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
        }
    )

"""Optional packages: what is not installed is named in one sentence, with the command that installs it."""

import importlib.util

from noetherflow._errors import MissingExtraError


def has(*packages: str) -> bool:
    """Whether all packages can be imported; none of them is imported by this question."""
    return not _missing(packages)


def require(extra: str, *packages: str, purpose: str) -> None:
    """Raise unless all packages can be imported.

    Args:
        extra: The extra of `pyproject.toml` that installs them.
        packages: Their import names.
        purpose: What needs them, as the subject of a sentence.

    Raises:
        MissingExtraError: If at least one is not installed.
    """
    missing = _missing(packages)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{purpose} needs {' and '.join(missing)}, which {verb} not installed: "
            f'run pip install "noetherflow[{extra}]"',
            name=missing[0],
        )


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]

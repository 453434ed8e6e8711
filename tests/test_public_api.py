"""What `import noetherflow` promises: documented names, and nothing loaded that is not needed."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import noetherflow

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"
# Each is needed by some commands or figures, none by the theory.
LAZY = {"numba", "sklearn", "transformers", "matplotlib", "pyarrow", "typer"}


def complaint(name: str, thing: object) -> str | None:
    """What is missing from the documentation of one public name."""
    ours = getattr(thing, "__module__", "").split(".")[0] == noetherflow.__name__
    if not ours or not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return None  # an alias or a constant: it has no docstring of its own
    text = thing.__doc__ or ""
    if not text.strip():
        return f"{name} has no docstring"
    if ">>>" not in text and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        return f"{name} has no example in its docstring"
    if re.search(r"^ *Example:", text, flags=re.MULTILINE):
        return f"{name} has an 'Example:' section: only 'Examples:' is shown as code in the documentation"
    return None


def loaded_by(code: str) -> set[str]:
    """Which of the packages that should wait are loaded by some code in a new interpreter."""
    script = f"import sys\n{code}\nprint(*[name for name in sys.modules if '.' not in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return LAZY & set(done.stdout.split())


@pytest.mark.parametrize("name", noetherflow.__all__)
def test_a_public_name_resolves_and_is_documented_with_an_example(name: str) -> None:
    assert complaint(name, getattr(noetherflow, name)) is None


def test_a_missing_docstring_or_example_is_found() -> None:
    def bare() -> None: ...

    def told() -> None:
        """Does nothing."""

    def misspelt() -> None:
        """Does nothing.

        Example:
            >>> None
        """

    class Shown(Exception):
        """An exception needs no example."""

    for thing in (bare, told, misspelt, Shown):
        thing.__module__ = "noetherflow.somewhere"
    assert complaint("bare", bare) == "bare has no docstring"
    assert complaint("told", told) == "told has no example in its docstring"
    assert "Examples:" in str(complaint("misspelt", misspelt))
    assert complaint("Shown", Shown) is None


def test_all_is_sorted_and_is_what_the_package_binds() -> None:
    bound = {
        name for name, thing in vars(noetherflow).items() if not (name.startswith("_") or isinstance(thing, ModuleType))
    }
    assert noetherflow.__all__ == sorted(set(noetherflow.__all__))
    assert {name for name in noetherflow.__all__ if not name.startswith("_")} == bound


def test_the_reference_lists_each_public_name_once() -> None:
    listed = re.findall(r"^::: noetherflow\.(?:\w+\.)*(\w+)$", REFERENCE.read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == [name for name in noetherflow.__all__ if not name.startswith("_")]


def test_importing_the_package_leaves_what_it_does_not_need_alone() -> None:
    assert loaded_by("import noetherflow") == set()


def test_a_package_that_was_loaded_is_seen() -> None:
    assert loaded_by("import noetherflow, typer") == {"typer"}

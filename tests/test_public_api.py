"""What `import noetherflow` promises: documented names, and nothing loaded that is not needed."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import noetherflow
from noetherflow import integrations

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"
# Each is needed by some commands or figures, none by the theory.
LAZY = {"numba", "sklearn", "transformers", "lightning", "matplotlib", "pyarrow", "typer"}
# Their files need an optional package each, so that no name of theirs is in noetherflow.
ADAPTERS = [("lightning", "NoiseCallback"), ("transformers", "NoiseCallback")]


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
        name
        for name, thing in vars(noetherflow).items()
        if not name.startswith("_") and (name == "linear" or not isinstance(thing, ModuleType))
    }
    assert noetherflow.__all__ == sorted(set(noetherflow.__all__))
    assert {name for name in noetherflow.__all__ if not name.startswith("_")} == bound


def test_the_reference_lists_each_public_name_once() -> None:
    listed = re.findall(r"^::: noetherflow\.((?:\w+\.)*)(\w+)$", REFERENCE.read_text("utf-8"), flags=re.MULTILINE)
    names = [name for folder, name in listed if not folder.startswith("integrations.")]
    assert sorted(names) == [name for name in noetherflow.__all__ if not name.startswith("_")]
    adapters = [f"{folder}{name}" for folder, name in listed if folder.startswith("integrations.")]
    assert sorted(adapters) == [f"integrations.{module}.{name}" for module, name in ADAPTERS]


@pytest.mark.parametrize(("module", "name"), ADAPTERS)
def test_an_adapter_is_documented_with_an_example(module: str, name: str) -> None:
    adapter = getattr(importlib.import_module(f"noetherflow.integrations.{module}"), name)
    assert complaint(name, adapter) is None
    assert signature(adapter) == "symmetries=None"


def test_every_adapter_is_listed() -> None:
    files = {module.name for module in pkgutil.iter_modules(integrations.__path__)}
    assert {name for name in files if not name.startswith("_")} == {module for module, _ in ADAPTERS}


# Other programs call these. One order everywhere: model, loss, data, symmetries, settings, then options by keyword.
CONTRACT = {
    "estimate_noise": "model, loss, loader, symmetries=None",
    "second_moments": "optimizer, model, symmetries=None",
    "drift": "noise, settings, params",
    "expected_step": "noise, settings, params",
    "potential": "noise, settings, params, coordinates=None",
    "solve_equilibrium": "noise, settings, params",
    "equilibrate": "model, loss, loader, settings, symmetries=None",
    "forecast": "model, loss, loader, settings, symmetries=None",
    "rebalance_": "model, equilibrium, loss, batch",
    "analyze": "model, loss, loader, settings, symmetries=None",
    "find_symmetries": "model, loss, batch",
    "explain": "model, loss, batch",
    "exponent_rule": "keys",
    "gradient_rule": "functions",
    "verify_symmetry": "model, loss, batch, symmetry",
    "check_completeness": "model, loss, batch",
    "discover_generators": "model, loss, batch",
    "discover_rescalings": "model, loss, batch",
    "discover_blocks": "model, loss, batch, axes",
    "simulate": "model, loss, data, dynamics",
    "NoiseMeter": "model, symmetries",
    "MicrobatchMeter": "model, symmetries",
    "ChargeLedger": "model, symmetries, optimizer",
    "NoiseScale": "model, symmetries=None, optimizer=None",
    "RunRecord": "folder",
}


def signature(function: object) -> str:
    """What may be given by position, with defaults."""
    parameters = inspect.signature(function).parameters.values()
    positional = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    return ", ".join(one.name + ("" if one.default is one.empty else f"={one.default}") for one in positional)


@pytest.mark.parametrize("name", CONTRACT)
def test_arguments_stand_in_the_order_that_other_programs_rely_on(name: str) -> None:
    assert signature(getattr(noetherflow, name)) == CONTRACT[name]


def test_every_public_function_is_in_the_contract() -> None:
    functions = {name for name in noetherflow.__all__ if inspect.isfunction(getattr(noetherflow, name))}
    assert functions <= set(CONTRACT)
    assert "optimizer" in inspect.signature(noetherflow.rebalance_).parameters


def test_another_order_is_noticed() -> None:
    def swapped(params: object, noise: object, sgd: object, *, throw: bool = False) -> None: ...

    assert signature(swapped) == "params, noise, sgd" != CONTRACT["drift"]


def modules() -> list[str]:
    """Every file and folder directly in the package."""
    return [module.name for module in pkgutil.iter_modules(noetherflow.__path__)]


def test_no_public_function_shadows_a_module_and_files_are_private() -> None:
    functions = {name for name in noetherflow.__all__ if callable(getattr(noetherflow, name))}
    assert not functions & set(modules())
    folders = {module.name for module in pkgutil.iter_modules(noetherflow.__path__) if module.ispkg}
    assert {name for name in modules() if not name.startswith("_")} - folders == {"linear"}


def test_importing_the_package_leaves_what_it_does_not_need_alone() -> None:
    assert loaded_by("import noetherflow") == set()


def test_a_package_that_was_loaded_is_seen() -> None:
    assert loaded_by("import noetherflow, typer") == {"typer"}

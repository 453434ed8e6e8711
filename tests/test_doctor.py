"""`noetherflow doctor`: what is installed, what of it works, and what is broken; the exit code says which."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow import _device, _doctor
from noetherflow._cli import app
from noetherflow.noise.kernels import choose

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Extras for work on the package itself, and the extra that installs all others.
NOT_SHOWN = {"all", "examples", "test", "lint", "types", "docs", "bench", "dev"}


def packages_of(extra: str) -> set[str]:
    """The packages of an extra of pyproject.toml, those of the extras that it contains included."""
    names: set[str] = set()
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == "noetherflow":
            names.update(*(packages_of(part) for part in requirement.extras))
        else:
            names.add(requirement.name)
    return names


def oldest_versions() -> dict[str, tuple[int, ...]]:
    """The lower bounds in pyproject.toml, of the dependencies and of the extras that are shown."""
    shown = set(PROJECT["optional-dependencies"]) - NOT_SHOWN
    texts = [*PROJECT["dependencies"], *(text for name in shown for text in PROJECT["optional-dependencies"][name])]
    bounds = {
        requirement.name: part.version
        for requirement in map(Requirement, texts)
        for part in requirement.specifier
        if part.operator == ">="
    }
    return {name: _doctor.release_of(version) for name, version in bounds.items()}


def run(*arguments: str) -> object:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "100"})


def test_it_knows_the_extras_and_the_bounds_of_the_project() -> None:
    shown = set(PROJECT["optional-dependencies"]) - NOT_SHOWN
    assert {name: set(packages) for name, packages in _doctor.EXTRAS.items()} == {
        name: packages_of(name) for name in shown
    }
    assert packages_of("all") < set().union(*_doctor.EXTRAS.values())
    assert {Requirement(one).name for one in PROJECT["dependencies"]} == set(_doctor.CORE)
    assert oldest_versions() == _doctor.OLDEST
    # The comparisons above must be able to fail.
    assert packages_of("cpu") != packages_of("cli")
    assert set(oldest_versions()) == {"torch", "transformers"}


def test_a_complete_installation_is_shown_and_ends_in_exit_code_0() -> None:
    done = run()
    assert done.exit_code == 0, done.output
    for words in ("noetherflow  0.", f"torch        {torch.__version__}", "numba is installed", "complete", "nothing"):
        assert words in done.output
    said = json.loads(run("--json").output)
    assert said["versions"]["noetherflow"] == nf.__version__
    assert said["devices"][0]["name"] == "cpu"
    assert said["devices"][0]["float64"] is True
    assert said["devices"][0]["kernels"] == choose.name_for(torch.zeros(1))
    assert said["threads"]["threads of PyTorch"] == str(torch.get_num_threads())
    assert said["problems"] == []


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Say that distributions have other versions, or are not installed."""
    real = _doctor.version_of
    monkeypatch.setattr(_doctor, "version_of", lambda name: versions[name] if name in versions else real(name))
    absent = {name for name, version in versions.items() if version is None}
    has = _doctor.has
    monkeypatch.setattr(_doctor, "has", lambda *names: not absent & set(names) and has(*names))


def test_a_missing_extra_is_named_with_its_command_and_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, plotly=None)
    done = run()
    assert done.exit_code == 0, done.output
    assert 'pip install "noetherflow[report]"' in done.output
    assert 'pip install "noetherflow[paper]"' in done.output
    assert "plotly missing" in done.output
    assert 'pip install "noetherflow[cpu]"' not in done.output
    extras = {extra["name"]: extra for extra in json.loads(run("--json").output)["extras"]}
    assert extras["report"]["versions"]["plotly"] is None
    assert extras["cli"]["command"] == ""


def test_a_package_of_an_extra_that_is_too_old_is_shown_and_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not json.loads(run("--json").output)["extras"][-1]["command"]
    installed(monkeypatch, transformers="5.2.0")
    done = run()
    assert done.exit_code == 0, done.output
    assert "transformers 5.2.0 (too old)" in done.output
    assert 'pip install "noetherflow[transformers]"' in done.output


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ({"torch": "2.5.1+cu124"}, "torch 2.5.1+cu124 is too old, noetherflow needs 2.6 or newer"),
        ({"torch": "1.13"}, "torch 1.13 is too old"),
        ({"scipy": None}, "scipy is not installed: run pip install scipy"),
    ],
)
def test_what_is_broken_is_a_sentence_and_exit_code_1(
    versions: dict[str, str | None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, **versions)
    done = run()
    assert done.exit_code == 1
    assert sentence in " ".join(done.output.split())
    assert run("--json").exit_code == 1


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "2.10.1", "3.0"])
def test_a_version_that_is_new_enough_is_not_broken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch=version)
    assert run().exit_code == 0


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.6a1", (2, 6)), ("2.6.0rc1", (2, 6, 0)), ("3", (3,)), ("2.dev.5", (2,))],
)
def test_the_numbers_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    assert _doctor.release_of(version) == numbers


def cpu() -> _doctor.Device:
    return _doctor.examine_device(torch.device("cpu"), "")


def test_the_kernels_and_the_reason_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOETHERFLOW_KERNELS", raising=False)
    assert (cpu().kernels, cpu().reason) == ("cpu", "numba is installed")
    assert choose.reason_for(torch.zeros(1, device="meta")) == "compiled loops run on the CPU only"
    assert choose.name_for(torch.zeros(1, device="meta")) == "reference"
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    assert (cpu().kernels, cpu().reason, cpu().problem) == ("reference", "numba is not installed", "")
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "reference")
    assert (cpu().kernels, cpu().reason) == ("reference", "NOETHERFLOW_KERNELS=reference")


def test_kernels_that_cannot_be_had_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHERFLOW_KERNELS", "quick")
    assert "names no set of kernels" in cpu().problem
    assert run().exit_code == 1
    monkeypatch.delenv("NOETHERFLOW_KERNELS")

    def unloadable(tensor: torch.Tensor) -> object:
        raise ImportError("Numba needs NumPy 2.3 or less. Got NumPy 2.4.\nA second line.")

    monkeypatch.setattr(_doctor, "kernels_for", unloadable)
    assert cpu().problem == (
        "numba is installed but cannot be imported (Numba needs NumPy 2.3 or less. Got NumPy 2.4.): repair it, or set "
        "NOETHERFLOW_KERNELS=reference"
    )
    assert run().exit_code == 1


def test_a_device_without_float64_is_shown_and_a_device_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_device, "_has_float64", lambda device: False)
        assert (cpu().float64, cpu().kernels, cpu().problem) == (False, "none", "")
        done = run()
        assert done.exit_code == 0
        assert "without float64 a model on this device is refused" in done.output

    class Accelerators:
        """Two accelerators of a kind that this build of PyTorch cannot use."""

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def current_accelerator() -> torch.device:
            return torch.device("xpu")

        @staticmethod
        def device_count() -> int:
            return 2

    def module_of(kind: str) -> object:
        return type("Module", (), {"get_device_name": staticmethod(lambda index: f"card {index}")})

    monkeypatch.setattr(torch, "accelerator", Accelerators)
    monkeypatch.setattr(torch, "get_device_module", module_of)
    examined = _doctor.examine()
    assert [(one.name, one.description) for one in examined.devices[1:]] == [("xpu:0", "card 0"), ("xpu:1", "card 1")]
    assert len(examined.problems) == 2
    assert examined.problems[0].startswith("xpu:0: does not work: ")
    assert run().exit_code == 1

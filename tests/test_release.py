"""A release: its version stands in one place, its files are those of git, and it can be cited."""

import datetime
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import noetherflow as nf
import wheel
from noetherflow import _versions
from noetherflow._cli import app

ROOT = Path(__file__).parents[1]


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"] == {"path": "src/noetherflow/_versions.py"}
    assert nf.__version__ == wheel.version_of_source() == _versions.versions()["noetherflow"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", nf.__version__)
    quoted = re.compile(rf'["\']{re.escape(nf.__version__)}["\']')
    assert [path.name for path in (ROOT / "src").rglob("*.py") if quoted.search(path.read_text("utf-8"))] == [
        "_versions.py"
    ]


def releases(changelog: str) -> list[tuple[str, datetime.date]]:
    """Versions and dates of a changelog, the newest first."""
    headings = re.findall(r"^## \[(.+?)\] - (\S+)$", changelog, re.MULTILINE)
    return [(version, datetime.date.fromisoformat(date)) for version, date in headings]


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (?!\[.+\] - ).*$", changelog, re.MULTILINE) == ["## [Unreleased]"]
    assert changelog.index("## [Unreleased]") < changelog.index("## [0.2.0]")
    listed = releases(changelog)
    assert listed[0][0] == nf.__version__
    assert listed == sorted(listed, key=lambda release: release[1], reverse=True)
    # The check knows another version, and a date that does not exist.
    assert releases(changelog.replace("## [0.2.0]", "## [0.2.1]"))[0][0] != nf.__version__
    with pytest.raises(ValueError, match="month"):
        releases(changelog.replace("] - 2026-11-28", "] - 2026-13-28"))


def test_the_command_prints_the_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"noetherflow {nf.__version__}\n")
    # Without a request for it, nothing of the kind is printed.
    assert "noetherflow 0" not in CliRunner().invoke(app, ["symmetries", "--help"]).output


def test_a_shell_completes_commands() -> None:
    def completed(words: str) -> list[str]:
        asked_by_shell = {"_NOETHERFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
        command = [sys.executable, "-m", "noetherflow"]
        done = subprocess.run(
            command, env=os.environ | asked_by_shell, capture_output=True, text=True, check=False, timeout=120
        )
        return done.stdout.split()

    assert completed("noetherflow an") == ["analyze"]
    assert completed("noetherflow xyz") == []


TRACKED = {
    "src/noetherflow/__init__.py",
    "src/noetherflow/py.typed",
    "tests/test_release.py",
    "pyproject.toml",
    "README.md",
    "notebooks/first-ten-minutes.ipynb",
    "LICENSE",
    ".ci/run",
    "notes.txt",
}


def test_wheel_and_sdist_hold_what_git_holds_of_them() -> None:
    in_wheel, in_sdist = wheel.expected_members(TRACKED, "0.2.0")
    assert {name for name in in_wheel if "dist-info" not in name} == {"noetherflow/__init__.py", "noetherflow/py.typed"}
    assert {name.removeprefix("noetherflow-0.2.0/") for name in in_sdist} == TRACKED - {".ci/run", "notes.txt"} | {
        "PKG-INFO"
    }
    assert not wheel.complaints("wheel", dict.fromkeys(in_wheel, 1), in_wheel)
    assert not wheel.complaints("sdist", dict.fromkeys(in_sdist, 1), in_sdist)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"noetherflow/weights.safetensors": 1}, "wheel holds noetherflow/weights.safetensors, which nobody expects"),
        ({"noetherflow/__init__.py": None}, "wheel lacks noetherflow/__init__.py"),
        ({"noetherflow/py.typed": 2_000_000}, "wheel holds noetherflow/py.typed of 2000000 bytes"),
        ({"tests/cases.py": 1}, "wheel holds tests/cases.py: neither code nor a part of a page"),
    ],
)
def test_a_file_too_many_too_few_or_too_large_is_noticed(change: dict[str, int | None], sentence: str) -> None:
    in_wheel, _ = wheel.expected_members(TRACKED, "0.2.0")
    sizes = dict.fromkeys(in_wheel, 1) | change
    members = {name: size for name, size in sizes.items() if size is not None}
    assert sentence in wheel.complaints("wheel", members, in_wheel)


def test_the_software_can_be_cited() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (citation["cff-version"], citation["type"], citation["title"]) == ("1.2.0", "software", project["name"])
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"]
    # The version stands in one place.
    assert "version" not in citation
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Ziyin", "Wang", "Li", "Wu"]
    assert paper["url"].removeprefix("https://arxiv.org/abs/") in (ROOT / "README.md").read_text("utf-8")

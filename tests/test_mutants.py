"""The runner of planted faults, on a package of three lines: what survives or does not fit is reported."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutants

PACKAGE = {
    "src/noetherflow/__init__.py": "from noetherflow.maths import double, half\n",
    "src/noetherflow/maths.py": "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n",
    "tests/helpers.py": "ONE = 1\n",
    "tests/test_double.py": "import helpers\nimport noetherflow\n\n\ndef test_double():\n"
    "    assert noetherflow.double(helpers.ONE) == 2\n",
    "tests/test_half.py": "import noetherflow\n\n\ndef test_half():\n    assert noetherflow.half(0) == 0\n",
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["tests"]\n',
}
FAULT = """
[[fault]]
name = "{name}"
why = "somebody slipped"
file = "maths.py"
old = "{old}"
new = "{new}"
tests = ["tests/test_{test}.py"]
"""
NOTICED = FAULT.format(name="tripled", old="2 * x", new="3 * x", test="double")
SURVIVES = FAULT.format(name="thirds", old="x / 2", new="x / 3", test="half")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path
    # The tree itself is never touched.
    assert {name: (tmp_path / name).read_text() for name in PACKAGE} == PACKAGE


def run(tree: Path, table: str, *arguments: str) -> int:
    (tree / mutants.TABLE).write_text(table)
    return mutants.main(arguments, tree)


def test_a_fault_that_is_noticed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, NOTICED) == 0
    printed = capsys.readouterr().out
    assert "tripled  maths.py  killed by tests/test_double.py::test_double" in printed
    assert "1 of 1 noticed" in printed


def test_a_fault_that_survives(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, NOTICED + SURVIVES) == 1
    printed = capsys.readouterr().out
    assert "thirds   maths.py  SURVIVED" in printed
    assert "1 of 2 noticed; not: thirds" in printed
    assert run(tree, NOTICED + SURVIVES, "tripled") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("2 * x", "4 * x"), "occurs 0 times in maths.py: '4 * x'"),
        (("2 * x", "return"), "occurs 2 times"),
        (("3 * x", "3 * * x"), "no Python"),
        (("3 * x", "2 * x"), "nothing changes"),
        (('"maths.py"', '"moths.py"'), "moths.py"),
        (("test_double.py", "test_double.py::test_gone"), "do not pass (status 4)"),
        (("3 * x", "missing(x"), "no Python"),
    ],
)
def test_a_fault_that_does_not_fit(
    change: tuple[str, str], words: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tree, NOTICED.replace(*change)) == 1
    assert words in capsys.readouterr().out


def test_tests_that_fail_without_a_fault(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "tests" / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    assert run(tree, NOTICED.replace("test_double", "test_wrong")) == 1
    assert "without any fault these tests do not pass (status 1)" in capsys.readouterr().out


def test_a_package_that_cannot_be_imported_is_no_verdict(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any test would fail, whatever it tests."""
    assert run(tree, NOTICED.replace("2 * x", "def double(x):").replace("3 * x", "def triple(x):")) == 1
    printed = capsys.readouterr().out
    assert "ImportError" in printed
    assert "0 of 1 noticed" in printed


def test_a_loop_without_an_end_is_noticed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endless = NOTICED.replace("2 * x", "return 2 * x").replace("3 * x", "while True: pass")
    assert run(tree, endless, "--timeout", "5") == 0
    assert "killed by a timeout of 5 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (NOTICED + NOTICED, "several faults are called ['tripled']"),
        (NOTICED.replace("why", "because"), "because"),
        (NOTICED.replace('file = "maths.py"', ""), "file"),
    ],
)
def test_a_table_that_makes_no_sense(table: str, words: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, table) == 1
    assert words in capsys.readouterr().out


def test_a_name_that_is_not_there(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tree, NOTICED, "doubled") == 1
    assert "no fault called ['doubled']" in capsys.readouterr().out


def test_only_what_a_change_concerns(tree: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tree, check=True, capture_output=True)

    def concerned(base: str | None = "HEAD") -> list[str]:
        faults = mutants.read((tree / mutants.TABLE).read_text())
        return [fault.name for fault in mutants.touched(tree, faults, base)]

    other = SURVIVES.replace("maths.py", "more.py")
    (tree / mutants.TABLE).write_text(NOTICED + other)
    assert concerned() == ["tripled", "thirds"]  # there is no repository, or none of this tree
    git("init", "--initial-branch=main")
    git("add", "-A")
    git("commit", "-m", "first")
    assert concerned() == []
    for changed, names in {
        "src/noetherflow/maths.py": ["tripled"],
        "src/noetherflow/more.py": ["thirds"],
        "tests/test_half.py": ["thirds"],
        "tests/helpers.py": ["tripled"],
        "src/noetherflow/__init__.py": [],
    }.items():
        before = PACKAGE.get(changed)
        (tree / changed).write_text((before or "") + "\n# changed\n")
        assert concerned() == names, changed
        (tree / changed).write_text(before) if before is not None else (tree / changed).unlink()
    (tree / mutants.TABLE).write_text(NOTICED + other.replace("x / 3", "x / 4"))
    assert concerned() == ["thirds"]
    git("commit", "-am", "second")
    assert concerned() == []
    assert concerned(None) == ["thirds"]  # main itself: since the commit before
    git("checkout", "-b", "branch")
    git("commit", "--allow-empty", "-m", "third")
    git("commit", "--allow-empty", "-m", "fourth")
    assert concerned(None) == []  # a branch: since it left main
    assert concerned("nowhere") == ["tripled", "thirds"]
    assert run(tree, (tree / mutants.TABLE).read_text(), "--changed") == 0


def test_the_table_of_this_package_can_be_read() -> None:
    """And every text that it replaces is there, once."""
    faults = mutants.read((mutants.ROOT / mutants.TABLE).read_text("utf-8"))
    assert len(faults) >= 70
    for fault in faults:
        fault.text_in(mutants.ROOT / "src")
        assert all((mutants.ROOT / name).is_file() for name in fault.test_files), fault.name
        assert fault.why

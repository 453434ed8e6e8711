"""Plants faults in a copy of the package, one at a time, and runs the tests that must notice each of them.

    python tests/mutants.py                  every fault of tests/mutations.toml
    python tests/mutants.py NAME ...         these
    python tests/mutants.py --changed BASE   those whose file, tests or description differ from a commit

A fault is a text that occurs exactly once in a file of the package, and what somebody could have written instead. The
working tree is never touched: every fault has a copy of src/noetherflow in a temporary folder.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = "tests/mutations.toml"
PACKAGE = "noetherflow"
# Run in place of `python -m pytest`: the first argument is the folder from which the package must come.
PYTEST = f"""
import pathlib, sys
import {PACKAGE}, pytest
if pathlib.Path(sys.argv[1]).resolve() not in pathlib.Path({PACKAGE}.__file__).resolve().parents:
    sys.exit("tested {PACKAGE} from " + {PACKAGE}.__file__ + ", not from " + sys.argv[1])
sys.exit(pytest.main(sys.argv[2:]))
"""
OPTIONS = ["-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]


class BrokenTableError(Exception):
    """The table of faults, or the command line, does not fit the package."""


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody could make, and the tests that must fail because of it.

    Args:
        name: A few words, unique.
        why: What the mistake is.
        file: Where it is, below src/noetherflow.
        old: The text that is replaced.
        new: What replaces it.
        tests: Arguments of pytest: files or node ids.
        only: An expression for `pytest -k`, to leave out most of their tests.
    """

    name: str
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str = ""

    def text_in(self, source: Path) -> str:
        """The text of its file with the fault in it, from a folder that holds the package.

        Returns:
            The text.

        Raises:
            BrokenTableError: If the file is not there, or if `planted` cannot put the fault into it.
        """
        try:
            return planted(self, (source / PACKAGE / self.file).read_text(encoding="utf-8"))
        except OSError as error:
            raise BrokenTableError(f"fault {self.name!r}: {error}") from error

    @property
    def test_files(self) -> set[str]:
        """The files of its tests."""
        return {test.split("::")[0] for test in self.tests}


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: the test that noticed it, or why none did."""

    fault: Fault
    killer: str = ""
    trouble: str = ""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """As a cell of the table."""
        return f"killed by {self.killer}" if self.killer else self.trouble or "SURVIVED"


def read(text: str) -> list[Fault]:
    """The faults of a table.

    Returns:
        The faults.

    Raises:
        BrokenTableError: If a field is missing or unknown, or if two have one name.
    """
    faults = []
    for entry in tomllib.loads(text).get("fault", []):
        try:
            faults.append(Fault(**entry | {"tests": tuple(entry["tests"])}))
        except (KeyError, TypeError) as error:
            raise BrokenTableError(f"fault {entry.get('name', entry)!r}: {error}") from error
    names = [fault.name for fault in faults]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise BrokenTableError(f"several faults are called {sorted(repeated)}")
    return faults


def planted(fault: Fault, source: str) -> str:
    """The text of a file with the fault in it.

    Returns:
        The text.

    Raises:
        BrokenTableError: If the text to replace does not occur exactly once, or if the result is no Python.
    """
    count = source.count(fault.old)
    if count != 1:
        raise BrokenTableError(
            f"fault {fault.name!r}: the text to replace occurs {count} times in {fault.file}: {fault.old!r}"
        )
    changed = source.replace(fault.old, fault.new)
    if changed == source:
        raise BrokenTableError(f"fault {fault.name!r}: nothing changes in {fault.file}: {fault.old!r}")
    if fault.file.endswith(".py"):
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise BrokenTableError(f"{fault.file} is no Python with fault {fault.name!r} in it: {error}") from error
    return changed


def run_pytest(root: Path, source: Path, arguments: Sequence[str], timeout: float | None) -> tuple[int, str]:
    """Run tests of a tree against a package.

    Args:
        root: The tree whose tests run.
        source: The folder from which the package is imported.
        arguments: Of pytest.
        timeout: In seconds.

    Returns:
        The exit status, and what was printed.

    Raises:
        subprocess.TimeoutExpired: If the tests take longer.
    """
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", PYTEST, str(source), *OPTIONS, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def baseline(root: Path, faults: Sequence[Fault], jobs: int) -> None:
    """Run every test that has to notice a fault once, without one.

    Raises:
        BrokenTableError: If a test is not there or fails.
    """
    # All tests that run completely in one process, and for every file those of which an expression chooses some.
    groups: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for fault in faults:
        for test in fault.tests:
            tests, only = groups.setdefault(test.split("::")[0] if fault.only else "", ({}, {}))
            tests[test] = None
            only |= {f"({fault.only})": None} if fault.only else {}

    def run(group: tuple[dict[str, None], dict[str, None]]) -> None:
        tests, only = group
        # A file says all that a test of that file says.
        wanted = [test for test in tests if "::" not in test or test.split("::")[0] not in tests]
        status, output = run_pytest(root, root / "src", [*(["-k", " or ".join(only)] if only else []), *wanted], None)
        if status:
            raise BrokenTableError(f"without any fault these tests do not pass (status {status}):\n{output}")

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, group) for group in groups.values()]:
            future.result()


def try_fault(root: Path, fault: Fault, timeout: float) -> Verdict:
    """Plant a fault in a copy of the package and run its tests."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        # With what was compiled, which Python and numba look at only if it is of the same file.
        shutil.copytree(root / "src" / PACKAGE, source / PACKAGE)
        path = source / PACKAGE / fault.file
        text = fault.text_in(source)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        path.write_text(text, encoding="utf-8")
        arguments = ["-x", *(["-k", fault.only] if fault.only else []), *fault.tests]
        try:
            status, output = run_pytest(root, source, arguments, timeout)
        except subprocess.TimeoutExpired:
            return Verdict(fault, killer=f"a timeout of {timeout:.0f} s", seconds=time.monotonic() - start)
    seconds = time.monotonic() - start
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::[^ \[]+(?:\[.*?\])?|\S+)(?: - |$)", output, flags=re.MULTILINE)
    # 1: tests failed. 2: a test file could not even be imported. Below 0: the process crashed.
    if status in (1, 2) and failed:
        return Verdict(fault, killer=failed[1], seconds=seconds)
    if status < 0:
        return Verdict(fault, killer=f"a crash, signal {-status}", seconds=seconds)
    trouble = f"pytest ended with status {status}: {output[-2000:]}" if status else ""
    return Verdict(fault, trouble=trouble, seconds=seconds)


def try_all(root: Path, faults: Sequence[Fault], jobs: int, timeout: float) -> Iterator[Verdict]:
    """Try faults, several at a time; verdicts come as they are reached.

    Yields:
        A verdict for each fault.
    """
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(try_fault, root, fault, timeout) for fault in faults]):
            yield future.result()


def touched(root: Path, faults: Sequence[Fault], base: str | None) -> list[Fault]:
    """The faults whose file, tests or description differ from a commit; all of them where git cannot tell.

    Args:
        root: The tree.
        faults: All faults.
        base: The commit; by default where this branch left main, or the commit before this one.

    Returns:
        Some of the faults.
    """
    try:
        base = base or _branch_point(root)
        names = {*_git(root, "diff", "--name-only", base), *_git(root, "ls-files", "--others", "--exclude-standard")}
    except (OSError, subprocess.CalledProcessError):
        return list(faults)
    try:
        before = set(read("\n".join(_git(root, "show", f"{base}:{TABLE}"))))
    except (OSError, subprocess.CalledProcessError, BrokenTableError, tomllib.TOMLDecodeError):
        before = set()
    return [
        fault
        for fault in faults
        if fault not in before
        or f"src/{PACKAGE}/{fault.file}" in names
        or not names.isdisjoint(_with_helpers(root, fault.test_files))
    ]


def _branch_point(root: Path) -> str:
    (head,) = _git(root, "rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        try:
            (base,) = _git(root, "merge-base", "HEAD", main)
        except (subprocess.CalledProcessError, ValueError):
            continue
        if base != head:
            return base
    return "HEAD~1"


def _with_helpers(root: Path, files: Iterable[str]) -> set[str]:
    """Test files and the files beside them that they import, one through the other."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        name = waiting.pop()
        path = root / name
        if name in found or not path.is_file():
            continue
        found.add(name)
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        waiting += [path.with_name(f"{module}.py").relative_to(root).as_posix() for module in imported]
    return found


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Plant faults and print what became of them; 0 if every one was noticed.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; all by default")
    parser.add_argument("--changed", nargs="?", const="", metavar="BASE", help="only those that a change concerns")
    parser.add_argument("--jobs", type=int, default=2, help="how many to try at a time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for the tests of one fault")
    given = parser.parse_args(arguments)
    try:
        faults = read((root / TABLE).read_text(encoding="utf-8"))
        if unknown := set(given.names) - {fault.name for fault in faults}:
            raise BrokenTableError(f"there is no fault called {sorted(unknown)}")
        chosen = [fault for fault in faults if not given.names or fault.name in given.names]
        if given.changed is not None:
            chosen = touched(root, chosen, given.changed or None)
        if not chosen:
            print(f"0 of {len(faults)} faults are concerned")
            return 0
        for fault in chosen:
            fault.text_in(root / "src")
        print(f"{len(chosen)} of {len(faults)} faults; their tests without any", flush=True)
        baseline(root, chosen, given.jobs)
    except BrokenTableError as error:
        print(error)
        return 1
    verdicts = {}
    for verdict in try_all(root, chosen, given.jobs, given.timeout):
        verdicts[verdict.fault.name] = verdict
        number = f"[{len(verdicts)}/{len(chosen)}] {verdict.seconds:5.1f} s"
        print(f"{number}  {verdict.fault.name}: {verdict.text}", flush=True)
    width = max(len(fault.name) for fault in chosen)
    place = max(len(fault.file) for fault in chosen)
    print("\n" + "\n".join(f"{one.name:{width}}  {one.file:{place}}  {verdicts[one.name].text}" for one in chosen))
    lost = [fault.name for fault in chosen if not verdicts[fault.name].killer]
    print(f"\n{len(chosen) - len(lost)} of {len(chosen)} noticed" + (f"; not: {', '.join(lost)}" if lost else ""))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

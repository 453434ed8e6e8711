"""The tests of the numbers on the oldest and the newest PyTorch that each Python gets from the package index.

    python tests/matrix.py                                every python3.N on the path that the package supports
    python tests/matrix.py PYTHON ... --torch 2.6.0 ...   these interpreters and these releases

Each pair gets a virtual environment of its own with the package, its extras and what the tests need. What this prints
is what README says about versions.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# From symmetries to rebalance, a compiled and an exported model included. What is left out tests the paper, pages and
# files, which ask PyTorch for nothing that these do not.
SUBSET = (
    "bad_input", "conventions", "custom_symmetry", "detect", "detect_random", "discover", "equilibrate",
    "equilibrium", "exponent_rules", "extras", "fast_noise", "fused", "kernels", "linear", "meters", "microbatch",
    "model_function", "noise", "optimizer_state", "passes", "planted_faults", "proof", "rebalance",
    "report", "report_values", "residual", "rules", "simulate", "spd", "store", "store_damage", "symmetry",
    "training_continues", "trajectory", "undo", "verify", "wrapped",
)  # fmt: skip
NEEDED = ("pytest", "pytest-xdist", "hypothesis", "scikit-learn", "transformers", "peft")
# Held by constraints.txt at what one release of torch works with: another release brings others.
FREE = ("torch", "sympy", "setuptools", "networkx", "fsspec", "filelock", "jinja2", "typing_extensions")
PYTEST = ("-q", "-n", "2", "--tb=short", "-p", "no:cacheprovider")
SUMMARY = re.compile(r"^.*?((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """What came of one pair.

    Args:
        python: The interpreter's version.
        torch: The release.
        outcome: What pytest said last, or why it did not run.
        failed: Which tests failed.
        seconds: Wall time, of the installation too.
        good: Whether all passed.
    """

    python: str
    torch: str
    outcome: str
    failed: tuple[str, ...]
    seconds: float
    good: bool


def version_of(interpreter: str) -> str | None:
    """The version of an interpreter; None if it does not run, as a name that only a version manager knows."""
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def interpreters() -> list[str]:
    """The oldest and the newest python3.N on the path that the package supports."""
    oldest = int(PROJECT["requires-python"].rpartition(".")[2])
    named = [f"python3.{minor}" for minor in range(oldest, oldest + 20)]
    there = [name for name in named if shutil.which(name) and version_of(name)]
    return list(dict.fromkeys((there[0], there[-1]))) if there else [sys.executable]


def releases(interpreter: str) -> list[str]:
    """The oldest and the newest release of torch for an interpreter, not older than the package's bound."""
    command = [interpreter, "-m", "pip", "index", "versions", "torch"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (listed,) = re.findall(r"^Available versions: (.*)$", said, re.MULTILINE)
    (bound,) = (re.findall(r"torch>=([\d.]+)", one)[0] for one in PROJECT["dependencies"] if one.startswith("torch"))
    return ends(listed.split(", "), bound)


def ends(listed: Iterable[str], bound: str) -> list[str]:
    """The lowest and the highest of some versions that are not below a bound; builds with a local tag count once."""
    plain = {one.partition("+")[0] for one in listed}
    fit = sorted((one for one in plain if _number(one) >= _number(bound)), key=_number)
    return list(dict.fromkeys((fit[0], fit[-1])))


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def constraints() -> str:
    """Those of constraints.txt that do not follow from the release of torch."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    kept = [line for line in lines if "==" in line and not line.startswith("#")]
    return "\n".join(line for line in kept if line.partition("==")[0].lower() not in FREE) + "\n"


def attempt(interpreter: str, release: str, folder: Path, tests: Sequence[str]) -> Row:
    """Install one pair into a folder and run the tests with it."""
    start, python = time.monotonic(), version_of(interpreter) or "?"
    here = folder / f"{python}-{release}"
    bin_, pins = here / "bin" / "python", folder / "constraints.txt"
    pins.write_text(constraints(), "utf-8")
    wanted = [f"{ROOT}[cpu,cli,report,paper]", f"torch=={release}", *NEEDED]
    for command in (
        [interpreter, "-m", "venv", "--clear", str(here)],
        [str(bin_), "-m", "pip", "install", "-q", "-c", str(pins), *wanted],
    ):
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            seconds = time.monotonic() - start
            return Row(python, release, f"not installed: {command[2]} ended with {done.returncode}", (), seconds, False)
    # The tests see the package that was installed, not this folder's.
    done = subprocess.run(
        [str(bin_), "-m", "pytest", *PYTEST, *tests],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr, file=sys.stderr, flush=True)
    said = SUMMARY.findall(done.stdout)
    failed = tuple(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    outcome = said[-1] if said else f"pytest ended with {done.returncode}"
    return Row(python, release, outcome, failed, time.monotonic() - start, done.returncode == 0)


def table(rows: Iterable[Row]) -> str:
    """One line for each pair, and one for each test that failed."""
    lines = [f"{'Python':8} {'PyTorch':8} {'minutes':>7}  outcome"]
    for row in rows:
        lines.append(f"{row.python:8} {row.torch:8} {row.seconds / 60:7.1f}  {row.outcome}")
        lines += [f"{'':26}{name}" for name in row.failed]
    return "\n".join(lines)


def main() -> int:
    """Try every pair; the exit code is 1 unless all tests passed with each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs="*", metavar="PYTHON")
    parser.add_argument("--torch", nargs="+", metavar="RELEASE", help="instead of the oldest and the newest")
    parser.add_argument("--folder", type=Path, help="for the environments, which are kept; else they are removed")
    parser.add_argument("--tests", nargs="+", default=[f"tests/test_{name}.py" for name in SUBSET])
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for interpreter in given.interpreters or interpreters():
            for release in given.torch or releases(interpreter):
                rows.append(attempt(interpreter, release, folder, given.tests))
                print(table(rows[-1:]), flush=True)
                if given.folder is None:  # several gigabytes each
                    shutil.rmtree(folder / f"{rows[-1].python}-{release}", ignore_errors=True)
    print(table(rows))
    return 0 if rows and all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

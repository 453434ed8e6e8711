"""The wheel alone: built, installed without extras into a bare environment, where README and a page of the docs run.

    python tests/wheel.py
    python tests/wheel.py --members  # builds wheel and sdist, and only looks at what is in them

The wheel is built from the sdist, so that the sdist holds what a build needs. What runs in the bare environment sees
nothing of this folder's source: only the wheel, its dependencies, and the page's programs.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "first-ten-minutes.md")
# What only extras bring, and what their work on a page or a figure would hide.
ABSENT = ("numba", "llvmlite", "rich", "typer", "matplotlib", "plotly", "pyarrow", "sklearn", "transformers")
CHECK = f"""
import importlib.metadata, importlib.util, pathlib, sys
there = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
if there:
    sys.exit("not a bare environment, these are installed: " + ", ".join(there))
import noetherflow
place = pathlib.Path(noetherflow.__file__).resolve()
if pathlib.Path(sys.prefix).resolve() not in place.parents:
    sys.exit(f"noetherflow comes from {{place}}, not from the wheel")
metadata = importlib.metadata.version("noetherflow")
if metadata != noetherflow.__version__:
    sys.exit(f"the metadata says version {{metadata}}, the package {{noetherflow.__version__}}")
print("noetherflow", metadata, "from", place)
"""
PIP = ("-m", "pip", "--disable-pip-version-check")
REFUSAL = 'run pip install "noetherflow[cli]"'
# What the sdist holds of the files of git, and what hatchling adds to them.
SHIPPED = re.compile(
    r"(src|tests|examples|docs|notebooks|benchmarks)/.*|mkdocs\.yml|Makefile|constraints\.txt|CITATION\.cff|[^/]+\.md"
    r"|LICENSE|pyproject\.toml|\.gitignore"
)
ADDED = {"PKG-INFO"}
# The largest file of the sdist, in bytes: a model or a data set is larger than any program.
LARGEST = 1_000_000


def expected_members(tracked: set[str], version: str) -> tuple[set[str], set[str]]:
    """The members of wheel and sdist that follow from the files of git."""
    info = f"noetherflow-{version}.dist-info"
    wheel = {name.removeprefix("src/") for name in tracked if name.startswith("src/noetherflow/")}
    wheel |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    sdist = {name for name in tracked if SHIPPED.fullmatch(name)} | ADDED
    return wheel, {f"noetherflow-{version}/{name}" for name in sdist}


def complaints(kind: str, members: dict[str, int], expected: set[str]) -> list[str]:
    """What is wrong with the members (name and size in bytes) of a wheel or an sdist."""
    wrong = [f"{kind} lacks {name}" for name in sorted(expected - members.keys())]
    wrong += [f"{kind} holds {name}, which nobody expects" for name in sorted(members.keys() - expected)]
    wrong += [f"{kind} holds {name} of {size} bytes" for name, size in members.items() if size > LARGEST]
    if kind == "wheel":
        allowed = re.compile(r"noetherflow/(.+\.(py|css|html|js)|py\.typed)|noetherflow-.*\.dist-info/.+")
        wrong += [
            f"wheel holds {name}: neither code nor a part of a page" for name in members if not allowed.fullmatch(name)
        ]
    return wrong


def version_of_source() -> str:
    """The version, from its only place."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src/noetherflow/_versions.py").read_text("utf-8"), re.M)
    return str(version)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel that is built from the sdist."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    venv.create(folder / "builder", with_pip=True)
    python = folder / "builder" / "bin" / "python"
    run(python, *PIP, "install", "-q", *needs, cwd=folder)
    for kind in ("sdist", "wheel"):
        source = ROOT
        if kind == "wheel":
            with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
                archive.extractall(folder / "source", filter="data")
            (source,) = (folder / "source").iterdir()
        run(python, "-m", "hatchling", "build", "-t", kind, "-d", folder / "dist", cwd=source)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_members(sdist: Path, wheel: Path) -> None:
    """End with a list of what is missing from wheel and sdist, what is too much, and another version."""
    # Also files that are not committed yet, as hatchling takes them.
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    version = version_of_source()
    in_wheel, in_sdist = expected_members({name for name in tracked if (ROOT / name).is_file()}, version)
    with zipfile.ZipFile(wheel) as archive:
        wrong = complaints("wheel", {one.filename: one.file_size for one in archive.infolist()}, in_wheel)
        metadata = HeaderParser().parsestr(archive.read(f"noetherflow-{version}.dist-info/METADATA").decode())
    with tarfile.open(sdist) as archive:
        wrong += complaints("sdist", {one.name: one.size for one in archive.getmembers() if one.isfile()}, in_sdist)
    if metadata["Version"] != version:
        wrong.append(f"METADATA says version {metadata['Version']}, the source {version}")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"noetherflow {version}: {len(in_wheel)} files in the wheel, {len(in_sdist)} in the sdist, as expected")


def run(*command: object, cwd: Path) -> None:
    """Run a command, or end with its exit code."""
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Build, install, check that nothing else is there, run the page, and meet the command line's refusal."""
    for page in PAGES:
        if not page.is_file() or "```python\n" not in page.read_text("utf-8"):
            sys.exit(f"{page} has no program to run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist, wheel = build(folder)
        check_members(sdist, wheel)
        if "--members" in sys.argv[1:]:
            return
        venv.create(folder / "bare", with_pip=True)
        bare = folder / "bare" / "bin" / "python"
        run(bare, *PIP, "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
        run(bare, "-c", CHECK, cwd=folder)
        for page in PAGES:
            run(bare, ROOT / "tests" / "pages.py", page, cwd=folder)
        script = folder / "bare" / "bin" / "noetherflow"
        done = subprocess.run([script, "--help"], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 2 or done.stdout or REFUSAL not in done.stderr or done.stderr.count("\n") != 1:
            sys.exit(f"noetherflow without typer: {done}, expected exit code 2 and one sentence with {REFUSAL}")
    print(f"the wheel runs {' and '.join(page.name for page in PAGES)} with nothing but its dependencies")


if __name__ == "__main__":
    main()

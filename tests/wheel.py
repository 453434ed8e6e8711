"""The wheel alone: built, installed without extras into a bare environment, and put through a page of the docs.

    python tests/wheel.py

Nothing of this folder's source is seen by what runs there: only the wheel, its dependencies, and the page's programs.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-ten-minutes.md"
# What only extras bring, and what their work on a page or a figure would hide.
ABSENT = ("numba", "llvmlite", "rich", "typer", "matplotlib", "plotly", "pyarrow", "sklearn", "transformers")
CHECK = f"""
import importlib.util, pathlib, sys
there = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
if there:
    sys.exit("not a bare environment, these are installed: " + ", ".join(there))
import noetherflow
place = pathlib.Path(noetherflow.__file__).resolve()
if pathlib.Path(sys.prefix).resolve() not in place.parents:
    sys.exit(f"noetherflow comes from {{place}}, not from the wheel")
print("noetherflow from", place)
"""
REFUSAL = 'run pip install "noetherflow[cli]"'


def run(*command: object, cwd: Path) -> None:
    """Run a command, or end with its exit code."""
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Build, install, check that nothing else is there, run the page, and meet the command line's refusal."""
    if not PAGE.is_file() or "```python\n" not in PAGE.read_text("utf-8"):
        sys.exit(f"{PAGE} has no program to run")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip = ("-m", "pip", "--disable-pip-version-check")
        run(sys.executable, *pip, "wheel", "-q", "--no-deps", "-w", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "bare", with_pip=True)
        bare = folder / "bare" / "bin" / "python"
        run(bare, *pip, "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
        run(bare, "-c", CHECK, cwd=folder)
        run(bare, ROOT / "tests" / "pages.py", PAGE, cwd=folder)
        script = folder / "bare" / "bin" / "noetherflow"
        done = subprocess.run([script, "--help"], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 2 or done.stdout or REFUSAL not in done.stderr or done.stderr.count("\n") != 1:
            sys.exit(f"noetherflow without typer: {done}, expected exit code 2 and one sentence with {REFUSAL}")
    print(f"the wheel runs {PAGE.name} with nothing but its dependencies")


if __name__ == "__main__":
    main()

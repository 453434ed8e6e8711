"""Results of experiments: JSON files with settings and versions, a key that detects stale results, and a table."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from noetherflow import _files, _fingerprint
from noetherflow.paper.claim import Claim

# Files that start experiments or show results. No number depends on them, so that `code_version` leaves them out.
# The settings of a figure, which `experiment.py` parses, are a part of `key_of`.
DISPLAY_FILES = {
    "_cli.py",
    "_cli_options.py",
    "_cli_outputs.py",
    "__main__.py",
    "_kept.py",
    "_progress.py",
    "_user_file.py",
    "paper/curves.py",
    "paper/experiment.py",
    "paper/page.py",
    "report/document.py",
    "report/page.py",
    "report/parts.py",
    "report/picture.py",
    "report/rows.py",
    "report/words.py",
}
# Figures whose files a figure imports.
BUILT_ON = {"f12": ("f3", "f4")}
PICTURES = (".png", ".svg")


@final
@dataclass(frozen=True)
class Result:
    """The result of a finished experiment.

    Args:
        name: Name of the figure, such as "f1".
        title: Title of the experiment.
        quick: Whether the defaults of the settings were the reduced sizes.
        settings: Every setting, by name.
        command: Shell command that repeats the experiment.
        claims: The claims with their measured values.
        panels: `Panel.to_json` of each panel of the figure; empty if the figure shows images.
        seconds: Wall time in seconds.
        versions: Versions of Python and the packages.
        code: `code_version` at the time of the run.
        key: `key_of` the figure, the settings and the code.
    """

    name: str
    title: str
    quick: bool
    settings: dict[str, Any]
    command: str
    claims: tuple[Claim, ...]
    panels: tuple[dict[str, Any], ...]
    seconds: float
    versions: dict[str, str]
    code: str
    key: str


def code_version(name: str) -> str:
    """Hash the code on which the numbers of a figure depend, and the version of torch.

    A figure f2 owns the files `paper/f2_*.py`. The files of all figures that it is not built on are left out: a change
    of f3 does not make the result of f2 stale.

    Args:
        name: Name of the figure.

    Returns:
        16 hexadecimal digits.
    """
    root = Path(__file__).parents[1]
    figure_files = {path.name for path in (root / "paper").glob("f[0-9]*_*.py")}
    related = tuple(f"{figure}_" for figure in (name, *BUILT_ON.get(name, ())))
    unrelated = {f"paper/{file}" for file in figure_files if not file.startswith(related)}
    return _fingerprint.of_code(root, frozenset(DISPLAY_FILES | unrelated))


def key_of(name: str, settings: dict[str, Any], code: str) -> str:
    """Hash the figure, its settings and its code: two runs with equal keys give equal numbers."""
    content = json.dumps([name, settings, code], sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write(result: Result, out: Path) -> None:
    """Write the JSON file of a result atomically; write the pictures before this call."""
    content = {
        "figure": result.name,
        "title": result.title,
        "quick": result.quick,
        "settings": result.settings,
        "command": result.command,
        "claims": [_claim_to_json(claim) for claim in result.claims],
        "holds": all(claim.holds for claim in result.claims),
        "wall_seconds": round(result.seconds, 2),
        "versions": result.versions,
        "code": result.code,
        "key": result.key,
    }
    text = json.dumps(_files.finite(content), indent=2, allow_nan=False)
    # One line for each panel: `indent` would write a line for each number and make the file ten times as long.
    panels = ",\n    ".join(json.dumps(_files.finite(panel), allow_nan=False) for panel in result.panels)
    with _files.atomic(out / f"{result.name}.json") as temporary:
        temporary.write_text(f'{text[:-2]},\n  "panels": [{panels}]\n}}\n', encoding="utf-8")


def read(name: str, out: Path) -> Result | None:
    """Read a stored result; None if the file is missing, damaged or inconsistent, or if a picture is missing."""
    try:
        content = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        claims = tuple(_claim_from_json(claim) for claim in content["claims"])
        result = Result(
            name=content["figure"],
            title=content["title"],
            quick=content["quick"],
            settings=content["settings"],
            command=content["command"],
            claims=claims,
            panels=tuple(content["panels"]),
            seconds=float(content["wall_seconds"]),
            versions=content["versions"],
            code=content["code"],
            key=content["key"],
        )
        stored = [claim["holds"] for claim in content["claims"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    complete = all((out / f"{name}{suffix}").is_file() for suffix in PICTURES)
    # Verdicts are computed again: a file whose stored verdicts differ has been edited or damaged.
    return result if complete and result.name == name and stored == [claim.holds for claim in claims] else None


def table(results: Sequence[Result]) -> Table:
    """Table of claims with the columns figure, claim, theory, measured with standard error, band, verdict."""
    rows = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    rows.add_column("", no_wrap=True)
    rows.add_column("claim", overflow="fold")
    for heading in ("theory", "measured", "band", "verdict"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        for claim in result.claims:
            verdict = "[green]holds[/green]" if claim.holds else "[red bold]FAILS[/red bold]"
            rows.add_row(result.name, claim.text, theory(claim), measured(claim), claim.band, verdict)
    return rows


def theory(claim: Claim) -> str:
    """The predicted value as text, with three significant digits."""
    return f"{claim.predicted:.3g}"


def measured(claim: Claim) -> str:
    """The measured value as text, with three significant digits and its standard error."""
    return f"{claim.measured:.3g}" + (f" ± {claim.error:.1g}" if claim.error is not None else "")


def verdict(result: Result) -> str:
    """The number of claims that hold, and the wall time, as text."""
    held = sum(claim.holds for claim in result.claims)
    return f"{held} of {len(result.claims)} claims hold ({result.seconds:.0f} s)"


def _claim_to_json(claim: Claim) -> dict[str, Any]:
    """JSON types of a claim. JSON has no infinity and no NaN: `not_finite` stores such values as text."""
    content = claim.to_json()
    not_finite = {
        name: str(value) for name, value in content.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return content | ({"not_finite": not_finite} if not_finite else {})


def _claim_from_json(content: dict[str, Any]) -> Claim:
    """Inverse of `_claim_to_json`."""
    not_finite = {name: float(value) for name, value in content.get("not_finite", {}).items()}
    wrong = {mistake: math.nan if value is None else value for mistake, value in content["wrong"].items()}
    names = ("text", "predicted", "measured", "low", "high", "error")
    return Claim(**({name: content[name] for name in names} | not_finite), wrong=wrong)

"""What came out of an experiment: as a file that says what it was made with, and as a table."""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from noetherflow import _files
from noetherflow.paper import experiment
from noetherflow.paper.claim import Claim

# These start experiments or show results, and enter no number. A figure's settings are in its key by themselves.
BYSTANDERS = {"cli.py", "__main__.py", "_progress.py", "paper/curves.py", "paper/experiment.py", "paper/page.py"}
PICTURES = (".png", ".svg")


@final
@dataclass(frozen=True)
class Result:
    """One finished experiment.

    Args:
        name: The figure.
        title: The question it asks.
        quick: Whether the settings started from the reduced ones.
        settings: All of them, by name.
        command: What runs it again.
        claims: The verdicts.
        panels: Curves for the page, as JSON; none if the picture shows more than curves.
        seconds: Wall time.
        versions: What it was computed with.
        code: `code_version` at that time.
        key: `key_of` its settings and that code.
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
    """A hash of all code that can enter a figure's numbers, and of the version of torch.

    The files of the other figures are left out, so that work on one of them does not make all results stale.

    Returns:
        16 hexadecimal digits.
    """
    root = Path(__file__).parents[1]
    others = {path.name for path in (root / "paper").glob("f[0-9]*_*.py")} - {f"{experiment.FIGURES[name]}.py"}
    return _hash_of(root, frozenset(BYSTANDERS | {f"paper/{other}" for other in others}))


def key_of(name: str, settings: dict[str, Any], code: str) -> str:
    """What a result depends on, as a hash: two runs of one key have the same numbers."""
    content = json.dumps([name, settings, code], sort_keys=True, default=repr)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write(result: Result, out: Path) -> None:
    """Write a result's JSON, whole or not at all; the pictures have to be there."""
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
    # A line for each panel: a line for each number would make the file ten times as long, and nobody reads them.
    panels = ",\n    ".join(json.dumps(_files.finite(panel), allow_nan=False) for panel in result.panels)
    with _files.atomic(out / f"{result.name}.json") as temporary:
        temporary.write_text(f'{text[:-2]},\n  "panels": [{panels}]\n}}\n', encoding="utf-8")


def read(name: str, out: Path) -> Result | None:
    """A result written before; None if there is none, if it cannot be read, or if its pictures are gone."""
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
        written = [claim["holds"] for claim in content["claims"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    whole = all((out / f"{name}{suffix}").is_file() for suffix in PICTURES)
    # A verdict is computed, never believed.
    return result if whole and result.name == name and written == [claim.holds for claim in claims] else None


def table(results: Sequence[Result]) -> Table:
    """The verdicts: figure, claim, predicted, measured with its error, band, verdict."""
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
    """The predicted number as people write it."""
    return f"{claim.predicted:.3g}"


def measured(claim: Claim) -> str:
    """The measured number as people write it, with its error."""
    return f"{claim.measured:.3g}" + (f" ± {claim.error:.1g}" if claim.error is not None else "")


def verdict(result: Result) -> str:
    """One line for one experiment."""
    held = sum(claim.holds for claim in result.claims)
    return f"{held} of {len(result.claims)} claims hold ({result.seconds:.0f} s)"


@functools.cache
def _hash_of(root: Path, without: frozenset[str]) -> str:
    """Once per process: what is imported does not change with the files."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in without:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _claim_to_json(claim: Claim) -> dict[str, Any]:
    """As the claim says; what JSON has no word for is null, and beside it is said what it was."""
    content = claim.to_json()
    lost = {
        name: str(value) for name, value in content.items() if isinstance(value, float) and not math.isfinite(value)
    }
    return content | ({"not_finite": lost} if lost else {})


def _claim_from_json(content: dict[str, Any]) -> Claim:
    lost = {name: float(value) for name, value in content.get("not_finite", {}).items()}
    wrong = {what: math.nan if value is None else value for what, value in content["wrong"].items()}
    names = ("text", "predicted", "measured", "low", "high", "error")
    return Claim(**({name: content[name] for name in names} | lost), wrong=wrong)

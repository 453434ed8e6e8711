"""Runs the gallery's experiments at their reduced size when the pages are built, and puts pictures and verdicts in."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from noetherflow.paper import experiment, results, runner

# Kept between builds: what was run with the same settings and the same code is not run again.
FOLDER = Path(".cache") / "gallery"
PLACE = re.compile(r"<!-- figure (f\d+) -->")
_found: dict[str, results.Result] = {}


def on_files(files: Files, config: Any) -> Files:
    """Run what is not there yet, and add the pictures."""
    configs = experiment.configure(list(experiment.FIGURES), quick=True, seed=None, overrides=[])
    for ending in runner.run(configs, FOLDER, quick=True):
        if ending.result is None:
            raise PluginError(f"{ending.name} did not finish: {ending.error}\n{ending.trace}")
        _found[ending.name] = ending.result
        picture = (FOLDER / f"{ending.name}.png").read_bytes()
        files.append(File.generated(config, f"gallery/{ending.name}.png", content=picture))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A picture and its verdicts where the page asks for them."""
    return PLACE.sub(lambda place: _shown(_found[place[1]]), markdown)


def _shown(result: results.Result) -> str:
    rows = [
        f"| {claim.text.replace('|', '&#124;')} | {results.theory(claim)} | {results.measured(claim)} | {claim.band} | "
        f"{'holds' if claim.holds else '**FAILS**'} |"
        for claim in result.claims
    ]
    head = ["| claim | theory | measured | band | verdict |", "|---|---:|---:|---:|---|"]
    return "\n".join([f"![{result.title}]({result.name}.png)", "", f"`{result.command}`", "", *head, *rows])

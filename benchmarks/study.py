"""A study whose tables stand in a page: it measures, keeps the results, and writes the tables into the page."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noetherflow import _files

MARKS = "<!-- table -->\n\n", "\n<!-- end -->"


def shown(page: Path) -> str:
    """What stands between the marks of a page."""
    return page.read_text("utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]


def run(
    words: str | None, out: Path, page: Path, measure: Callable[[], dict[str, Any]], table: Callable[[Any], str]
) -> None:
    """The program of a study."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table, and write it into the page")
    if not parser.parse_args().show:
        _files.write_json(out, _files.finite(measure()))
    text = table(json.loads(out.read_text("utf-8")))
    before, _, rest = page.read_text("utf-8").partition(MARKS[0])
    page.write_text(before + MARKS[0] + text + MARKS[1] + rest.partition(MARKS[1])[2], "utf-8")
    print(text)

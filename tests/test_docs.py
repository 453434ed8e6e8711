"""The programs printed in README and docs run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from cases import case

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), code)
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_a_printed_program_runs(page: str, code: str) -> None:
    one = case("diagonal")
    namespace = {"torch": torch, "model": one.model, "loss": one.loss, "loader": one.loader(), "batch": one.batch}
    exec(compile(code, page, "exec"), namespace)


def test_there_are_programs_to_run() -> None:
    assert {page for page, _ in BLOCKS} >= {"README.md", "docs/index.md"}

"""The page on operations lists every operation that has an exponent rule."""

import re
from pathlib import Path

import pytest

from noetherflow.detect.rules import RULES

PAGE = Path(__file__).parents[1] / "docs" / "how-to-add-an-operation.md"
RULE_FILES = Path(__file__).parents[1] / "src" / "noetherflow" / "detect" / "rules"
ROW = re.compile(r"^\| `(\w+\.py)` \| (.*) \|$", re.MULTILINE)


def listed(page: str) -> dict[str, set[str]]:
    """The operations of each file in the last table of the page; names without a namespace are those of aten."""
    table = page.rpartition("## Operations with a rule")[2]
    names = {file: re.findall(r"`([\w:]+)`", cell) for file, cell in ROW.findall(table)}
    return {file: {name if "::" in name else f"aten::{name}" for name in each} for file, each in names.items()}


def registered() -> dict[str, set[str]]:
    """The operations whose rules each file registers."""
    files = {}
    for path in sorted(RULE_FILES.glob("*.py")):
        keys = set(re.findall(r'"(\w+::\w+)"', path.read_text("utf-8"))) & set(RULES)
        if keys and path.name != "registry.py":
            files[path.name] = keys
    return files


def test_the_page_lists_every_operation_beside_the_file_of_its_rule() -> None:
    assert listed(PAGE.read_text("utf-8")) == registered()
    assert set().union(*registered().values()) >= {key for key in RULES if key.startswith("aten::")}


@pytest.mark.parametrize("name", ["glu", "transformers::grouped_mm_fallback"])
def test_an_operation_that_the_page_forgets_is_noticed(name: str) -> None:
    page = PAGE.read_text("utf-8")
    assert f"`{name}`" in page
    assert listed(page.replace(f"`{name}`", "")) != registered()


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    head = page[: page.index("|---|---|\n", page.index("## Operations with a rule")) + len("|---|---|\n")]
    rows = []
    for file, keys in registered().items():
        names = ", ".join("`" + key.removeprefix("aten::") + "`" for key in sorted(keys))
        rows.append(f"| `{file}` | {names} |\n")
    PAGE.write_text(head + "".join(rows), "utf-8")

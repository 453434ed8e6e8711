"""The programs printed in README and docs run, and print what the pages say."""

import re
from pathlib import Path

import pytest
import torch

import pages
from cases import case
from noetherflow.paper import experiment
from test_floors import FLOORS

ROOT = Path(__file__).parents[1]
# Complete programs: their blocks run one after the other, and their output is compared.
COMPLETE = [
    "README.md",
    "docs/do-i-need-warmup.md",
    "docs/does-the-forecast-hold.md",
    "docs/first-ten-minutes.md",
    "docs/how-to-add-an-operation.md",
    "docs/lora.md",
    "docs/my-cnn-with-batchnorm.md",
    "docs/my-transformer.md",
    "docs/under-adamw.md",
    "docs/for-theorists.md",
    "docs/watching.md",
    "docs/which-batch-size.md",
    "docs/with-hugging-face.md",
    "docs/with-lightning.md",
]
# Programs on the model of the reader: each block runs with a model, a loss and data from tests/cases.py.
SHORT = [
    (page, block.code)
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if (page := path.relative_to(ROOT).as_posix()) not in COMPLETE
    for block in pages.blocks(path.read_text("utf-8"))
]


@pytest.mark.parametrize("page", COMPLETE)
def test_the_programs_of_a_page_print_what_the_page_shows(page: str) -> None:
    assert any(block.printed for block in pages.blocks((ROOT / page).read_text("utf-8")))
    wrong = pages.check(ROOT / page)
    assert not wrong, "\n".join(wrong) + f"\nIf the page is out of date: python tests/pages.py {page} --write"


def test_the_program_of_readme_has_twelve_lines() -> None:
    (block,) = pages.blocks((ROOT / "README.md").read_text("utf-8"))
    assert len([line for line in block.code.splitlines() if line]) == 12


def test_the_command_of_the_first_ten_minutes_prints_what_the_page_shows() -> None:
    answers = pages.command_outputs((ROOT / "docs/first-ten-minutes.md").read_text("utf-8"))
    assert [arguments for arguments, _, _ in answers] == ["analyze my_model.py"]
    for _, expected, printed in answers:
        assert not pages.differences(expected, printed)


@pytest.mark.parametrize(("page", "code"), SHORT, ids=[page for page, _ in SHORT])
def test_a_short_program_runs(page: str, code: str) -> None:
    subject = case("diagonal")
    namespace = {
        "torch": torch,
        "model": subject.model,
        "loss": subject.loss,
        "loader": subject.loader(),
        "batch": subject.batch,
    }
    exec(compile(code, page, "exec"), namespace)


def test_there_are_short_programs() -> None:
    assert {page for page, _ in SHORT} >= {"docs/index.md", "docs/gallery/f1.md"}


def test_every_figure_has_a_page_of_the_gallery() -> None:
    """Its experiment runs when the documentation is built, see docs/hooks.py."""
    index, navigation = ((ROOT / name).read_text("utf-8") for name in ("docs/gallery/index.md", "mkdocs.yml"))
    for figure in experiment.FIGURES:
        assert f"<!-- figure {figure} -->" in (ROOT / f"docs/gallery/{figure}.md").read_text("utf-8")
        assert f"({figure}.md)" in index
        assert f"- gallery/{figure}.md" in navigation


PROGRAM = "```python\nx = 2.0\n```\n\n```python\nprint(f'{x:.3f} metres')\n```\n\n```text\n2.000 metres\n```\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.000 metres", "2.031 metres"),  # a number that is 1.5 % off
        ("2.000 metres", "-2.000 metres"),
        ("2.000 metres", "2.000 feet"),
        ("\n\n```text\n2.000 metres\n```", ""),  # an output that the page does not show
        ("x = 2.0", "x = 2.1"),
        ("x = 2.0", "x = 2.0; print(x)"),
    ],
)
def test_a_page_that_shows_something_else_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PROGRAM, "utf-8")
    assert not pages.check(page)
    page.write_text(PROGRAM.replace(old, new), "utf-8")
    assert pages.check(page)


def test_a_program_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PROGRAM.replace("x = 2.0", "y = 2.0"), "utf-8")
    with pytest.raises(RuntimeError, match="name 'x' is not defined"):
        pages.check(page)


@pytest.mark.parametrize(
    ("shown", "came", "equal"),
    [
        ("19.3243", "19.33", True),
        ("19.3243", "19.6", False),
        ("4,380", "4390", True),
        ("4,380", "438", False),
        ("7e-16", "3e-15", True),  # rounding errors, whose size depends on the processor
        ("7e-16", "3e-02", False),
        ("1e-05", "1e-05", True),  # no rounding error, but the eps of a norm
        ("1e-05", "2e-05", False),
        ("5.7e-05", "5.8e-05", True),  # the last digit is rounded the other way
        ("5.7e-05", "5.9e-05", False),
        ("0", "1", False),
    ],
)
def test_numbers_are_compared_to_the_digits_that_processors_share(shown: str, came: str, equal: bool) -> None:
    assert pages.agree(shown, came) is equal


def test_a_page_is_brought_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PROGRAM.replace("2.000 metres", "3.000 metres"), "utf-8")
    pages.write(page)
    assert page.read_text("utf-8") == PROGRAM


def floors_of(page: str) -> list[set[str]]:
    """Files and folders by floor, as the table of docs/design.md has them, from the ground up."""
    rows = re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    by_floor = {int(floor): set(re.findall(r"`(\w+)(?:\.py|/)`", cell)) for floor, cell in rows}
    return [by_floor[floor] for floor in sorted(by_floor)]


def test_the_design_page_lists_every_file_on_its_floor() -> None:
    page = (ROOT / "docs/design.md").read_text("utf-8")
    assert floors_of(page) == FLOORS
    assert floors_of(page.replace("`_drift.py`", "`_draft.py`")) != FLOORS

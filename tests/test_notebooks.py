"""The notebooks are their pages, and Jupyter runs them as they are."""

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import notebooks
import pages

ROOT = Path(__file__).parents[1]


@pytest.fixture
def jupyter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which notebooks run, with what Jupyter and IPython write about themselves."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("COLUMNS", "100")
    # Of tqdm, which transformers imports: it misses a progress bar for browsers, which no cell draws.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    return tmp_path


@pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda page: page.stem)
def test_a_notebook_is_its_page(page: Path) -> None:
    remedy = "python tests/notebooks.py --write"
    assert notebooks.file_of(page).read_text("utf-8") == notebooks.notebook_of(page), remedy


def test_every_notebook_has_a_page() -> None:
    assert set(notebooks.FOLDER.iterdir()) == {notebooks.file_of(page) for page in notebooks.PAGES}


@pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda page: page.stem)
def test_a_notebook_holds_every_program_and_nothing_of_a_machine(page: Path) -> None:
    notebook = nbformat.read(notebooks.file_of(page), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source + "\n" for cell in code] == [block.code for block in pages.blocks(page.read_text("utf-8"))]
    assert all(cell.execution_count is None and not cell.metadata for cell in code)
    assert all(output.name == "stdout" for cell in code for output in cell.outputs)
    assert notebook.metadata == notebooks.METADATA


@pytest.mark.slow
@pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda page: page.stem)
def test_jupyter_prints_what_the_notebook_shows(page: Path, jupyter: Path) -> None:
    runs = notebooks.executed(notebooks.file_of(page).read_text("utf-8"), jupyter)
    assert sum(bool(run.shown) for run in runs) >= 4
    wrong = notebooks.differences(runs)
    assert not wrong, "\n".join(wrong)


def made(folder: Path, markdown: str) -> str:
    page = folder / "page.md"
    page.write_text(markdown, "utf-8")
    return notebooks.notebook_of(page)


PROGRAM = (
    "# A page\n\n```python\nx = 2.0\n```\n\nThen\n\n"
    "```python\nprint(f'{x:.3f} metres')\n```\n\n```text\n2.000 metres\n```\n"
)


def test_a_change_of_a_page_changes_its_notebook(tmp_path: Path) -> None:
    first = made(tmp_path, PROGRAM)
    assert first == made(tmp_path, PROGRAM)
    for old, new in (("A page", "The page"), ("2.0\n", "2.1\n"), ("2.000", "2.001"), ("Then", "Now")):
        assert made(tmp_path, PROGRAM.replace(old, new)) != first


def test_a_cell_that_prints_something_else_is_noticed(jupyter: Path) -> None:
    assert not notebooks.differences(notebooks.executed(made(jupyter, PROGRAM), jupyter))
    for old, new, cell in (
        ("x = 2.0", "x = 2.1", 4),
        ("\n\n```text\n2.000 metres\n```", "", 4),
        ("x = 2.0", "x = 2.0; import sys; print('a warning', file=sys.stderr)", 2),
        ("x = 2.0", "x = 2.0\nx", 2),
    ):
        wrong = notebooks.differences(notebooks.executed(made(jupyter, PROGRAM.replace(old, new)), jupyter))
        assert [sentence.partition(":")[0] for sentence in wrong] == [f"cell {cell}"], (old, new)


def test_a_cell_that_fails_is_noticed(jupyter: Path) -> None:
    with pytest.raises(CellExecutionError, match="name 'x' is not defined"):
        notebooks.executed(made(jupyter, PROGRAM.replace("x = 2.0", "y = 2.0")), jupyter)


def test_links_lead_from_the_folder_of_the_notebooks(tmp_path: Path) -> None:
    text = made(
        tmp_path,
        "[a](other.md) [b](other.md#part) [c](#here) [d](gallery/f1.md) [e](https://x.org/y) [`f`][noetherflow.f]\n",
    )
    (_, cell) = nbformat.reads(text, as_version=4).cells
    assert cell.source == (
        "[a](../docs/other.md) [b](../docs/other.md#part) [c](../docs/page.md#here) [d](../docs/gallery/f1.md) "
        "[e](https://x.org/y) `f`"
    )

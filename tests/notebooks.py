"""The notebooks of notebooks/: pages of docs/, cell by cell, and what their cells print when Jupyter runs them.

    python tests/notebooks.py          # exit code 1 and a list of differences, if a notebook is not its page
    python tests/notebooks.py --write  # makes the notebooks from the pages

The page is the only copy of the text. A cell shows the output that the page shows, which a test compares with what the
programs print, so that a reader who cannot run the notebook sees it as well. No output depends on a machine: no
picture, no execution count, no time.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

import pages

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PAGES = (ROOT / "docs/first-ten-minutes.md", ROOT / "docs/my-transformer.md")
# What `nbformat` writes, and nothing of the machine that wrote it.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NOTE = (
    "*This notebook is the page [{name}](../docs/{name}), made by `python tests/notebooks.py --write`. Edit the page.*"
)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#]*)(?P<anchor>#[^)]*)?\)")
# References to the API, which only the documentation resolves.
REFERENCE = re.compile(r"\[(`[^`]+`)\]\[[\w.]+\]")


@dataclass(frozen=True)
class Run:
    """What a cell of code printed, what the notebook shows, and the number of the cell."""

    cell: int
    shown: str
    printed: str


def notebook_of(path: Path) -> str:
    """The notebook of a page, as the text of an .ipynb file."""
    page = path.read_text("utf-8")
    cells = [nbformat.v4.new_markdown_cell(NOTE.format(name=path.name))]
    position = 0
    for match in pages.FENCE.finditer(page):
        cells += _prose(page[position : match.start()], path.name)
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=match["printed"])] if match["printed"] else []
        cells.append(nbformat.v4.new_code_cell(match["code"].rstrip("\n"), outputs=outputs))
        position = match.end()
    cells += _prose(page[position:], path.name)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def file_of(path: Path) -> Path:
    """Where the notebook of a page is."""
    return FOLDER / f"{path.stem}.ipynb"


def executed(text: str, folder: Path, limit: int = 300) -> list[Run]:
    """Run the cells of a notebook by a Jupyter kernel in a folder; raises if a cell does, or writes to stderr."""
    notebook = nbformat.reads(text, as_version=4)
    shown = [_text(cell) for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    # Sockets are files, whose paths have to be short: TCP ports would be open to everybody on the machine.
    with tempfile.TemporaryDirectory() as sockets:
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        NotebookClient(notebook, timeout=limit, resources={"metadata": {"path": str(folder)}}, config=config).execute()
    return [
        Run(number, expected, _text(cell))
        for number, (cell, expected) in enumerate(zip(notebook.cells, shown, strict=True))
        if cell.cell_type == "code"
    ]


def differences(runs: list[Run]) -> list[str]:
    """Sentences on where cells printed something else than the notebook shows."""
    return [f"cell {run.cell}: {sentence}" for run in runs for sentence in pages.differences(run.shown, run.printed)]


def _text(cell: nbformat.NotebookNode) -> str:
    """What a cell of code shows on stdout; anything else, such as a warning or the value of an expression, is named."""
    return "".join(
        output.text if output.get("name") == "stdout" else f"[{output.output_type} {output.get('name', '')}] {output}"
        for output in cell.get("outputs", [])
    )


def _prose(markdown: str, name: str) -> list[nbformat.NotebookNode]:
    """A cell of text, with links that hold in the folder of the notebooks; none for blank lines."""

    def moved(match: re.Match[str]) -> str:
        return f"](../docs/{match['target'] or name}{match['anchor'] or ''})"

    source = LINK.sub(moved, REFERENCE.sub(r"\1", markdown)).strip("\n")
    return [nbformat.v4.new_markdown_cell(source)] if source else []


if __name__ == "__main__":
    texts = {file_of(page): notebook_of(page) for page in PAGES}
    if sys.argv[1:] == ["--write"]:
        FOLDER.mkdir(exist_ok=True)
        for target, content in texts.items():
            target.write_text(content, "utf-8")
    else:
        stale = [target for target, content in texts.items() if target.read_text("utf-8") != content]
        sys.exit("\n".join(f"{target} is not its page: python tests/notebooks.py --write" for target in stale) or 0)

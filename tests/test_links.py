"""Links of README and its neighbours, of notebooks and docstrings lead somewhere; external addresses are listed once.

Links between the pages of docs/ are checked by mkdocs, whose settings are looked at here. Outside of docs/ mkdocs sees
nothing. External addresses are not fetched: a page that was moved is noticed by a reader, a mistyped address here.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOURCE = sorted((ROOT / "src").rglob("*.py"))
# Every address outside of this repository that a page, a docstring or a setting of the documentation names.
ADDRESSES = {
    "https://arxiv.org/abs/1812.06162",
    "https://arxiv.org/abs/2402.07193",
    "https://cdn.jsdelivr.net/npm/katex@0.19.1/dist/contrib/auto-render.min.js",
    "https://cdn.jsdelivr.net/npm/katex@0.19.1/dist/katex.min.css",
    "https://cdn.jsdelivr.net/npm/katex@0.19.1/dist/katex.min.js",
    "https://github.com/danielkunin/neural-mechanics",
    "https://github.com/f-dangel/backpack/blob/1.4.0/docs_src/rtd/extensions.rst",
    "https://github.com/meta-pytorch/opacus/issues/319",
    "https://github.com/pytorch/pytorch.github.io/commit/c1fc8cc299593113809971942aaecc7506396aec",
    "https://keepachangelog.com/en/1.1.0/",
    "https://pypi.org/project/backpack-for-pytorch/",
    "https://pypi.org/project/curvlinops-for-pytorch/3.0.1/",
    "https://pypi.org/project/laplace-torch/0.5.1/",
    "https://semver.org/spec/v2.0.0.html",
    "https://www.github.com/f-dangel/curvlinops",
    "https://www.github.com/pytorch/opacus/releases",
}
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<markdown>[^)\s]+)[^)]*\)|(?:href|src)=\"(?P<html>[^\"]+)\"")
ADDRESS = re.compile(r"\bhttps?://[^\s<>)\]\"'`]*[^\s<>)\]\"'`.,;:]")
# Files of this repository that a page names without a link.
NAMED = re.compile(r"`(?:[a-z]+ )*((?:benchmarks|docs|examples|notebooks|tests)/[\w./-]+\.\w+)\b[^`\n]*`")


def links(markdown: str) -> list[str]:
    """The targets of all links and pictures of a text, external ones excluded; code and formulas are no links."""
    targets = [match["markdown"] or match["html"] for match in LINK.finditer(CODE.sub("``", markdown))]
    return [target for target in targets if not urlsplit(target).scheme]


def anchors(page: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def broken(markdown: str, place: Path) -> list[str]:
    """Sentences on links of a text in the file `place` whose file, or whose heading, does not exist."""
    wrong = []
    for target in links(markdown):
        name, _, anchor = target.partition("#")
        file = (place.parent / name).resolve() if name else place
        if not file.exists() or ROOT not in file.parents:
            wrong.append(f"{place.name}: {target}: no such file")
        elif anchor and anchor not in anchors(markdown if file == place else file.read_text("utf-8")):
            wrong.append(f"{place.name}: {target}: no such heading")
    return wrong


def docstrings(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def prose_of(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("page", TOP, ids=lambda page: page.name)
def test_links_outside_of_the_documentation_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    assert links(text) or page.name == "CHANGELOG.md"
    assert not broken(text, page)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_links_of_a_notebook_lead_somewhere(notebook: Path) -> None:
    assert len(links(prose_of(notebook))) > 3
    assert not broken(prose_of(notebook), notebook)


def test_links_of_docstrings_lead_somewhere() -> None:
    # On the page of the API reference, where docstrings are shown.
    texts = [text for path in SOURCE for text in docstrings(path.read_text("utf-8"))]
    assert len(texts) > 1000
    assert not [sentence for text in texts for sentence in broken(text, ROOT / "docs" / "reference.md")]


def test_mkdocs_checks_the_links_between_pages() -> None:
    # Tags of Python, such as !!python/name, are not looked at.
    settings = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), yaml.BaseLoader)
    assert settings["strict"] == "true"
    kinds = ("omitted_files", "absolute_links", "unrecognized_links", "anchors")
    assert {kind: settings["validation"][kind] for kind in kinds} == dict.fromkeys(kinds, "warn")


def test_files_that_a_page_names_exist() -> None:
    # The changelog also names what is gone.
    named = {
        (page.name, name)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for name in NAMED.findall(page.read_text("utf-8"))
    }
    assert len(named) > 10
    assert not {(page, name) for page, name in named if not (ROOT / name).exists()}


def test_external_addresses_are_those_of_the_list() -> None:
    texts = [path.read_text("utf-8") for path in (*PAGES, ROOT / "mkdocs.yml", ROOT / "CITATION.cff")]
    texts += [text for path in SOURCE for text in docstrings(path.read_text("utf-8"))]
    used = {address for text in texts for address in ADDRESS.findall(text)}
    assert used == ADDRESSES, "an address was mistyped, or ADDRESSES is out of date"


@pytest.mark.parametrize("address", sorted(ADDRESSES))
def test_an_address_is_well_formed(address: str) -> None:
    parts = urlsplit(address)
    assert parts.scheme == "https"
    assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc)
    assert parts.path.startswith("/")
    assert not parts.query
    assert "//" not in parts.path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[a](docs/no-page.md)", "no such file"),
        ("[a](docs/conventions.md#no-heading)", "no such heading"),
        ("# Title\n[a](#titel)", "no such heading"),
        ("![a picture](docs/no.svg)", "no such file"),
        ("[![a picture](docs/no.svg)](docs/index.md)", "no such file"),
        ("[![a picture](docs/noise.svg)](docs/no.md)", "no such file"),
        ('<img src="docs/no.svg">', "no such file"),
        ("[a](../outside.md)", "no such file"),
        ('[a](docs/no.md "a title")', "no such file"),
    ],
)
def test_a_broken_link_is_noticed(text: str, sentence: str) -> None:
    (wrong,) = broken(text, ROOT / "README.md")
    assert wrong.endswith(sentence)


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/conventions.md#one-step-exactly) and ![b](docs/noise.svg), [c](LICENSE), [d](https://x.org/no.md)",
        "# The title: of `this`, really?\n[a](#the-title-of-this-really)",
        "`[a](no.md)` and $x[a](b)$\n\n```text\n[a](no.md)\n```\n",
    ],
)
def test_a_link_that_holds_is_left_alone(text: str) -> None:
    assert not broken(text, ROOT / "README.md")

"""Names are nouns and words are those of the field: in pages, in examples, and in folders of the source.

Only what a program can tell is enforced. Words such as `page`, `turn` or `alone` also have an ordinary meaning, and are
left to a reader. Code inside prose is not read: file names and the names of removed functions may stand there.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE = ROOT / "src" / "noetherflow"
CODE = [*sorted((ROOT / "examples").glob("*.py")), *sorted(SOURCE.rglob("*.py"))]

# Private vocabulary, and what to write instead.
WORDS = {
    r"ledgers?": "buffer",
    r"strips?": "block of rows",
    r"calm|calmer|calmest|quietest": "small noise, least noise",
    r"fates?": "outcome, status",
    r"witness(?:es)?": "examples on which the function is checked",
    r"settles?|settled": "converge, come to rest",
    r"nearly": "almost, close to",
    r"the latter|the former": "the noun",
    r"nothing to speak of|for nothing": "a number, or negligible",
    r"in passing": "during the step",
}
BANNED = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): instead for word, instead in WORDS.items()}
# Pronouns and adjectives that are no names of things.
PRONOUNS = {"one", "ones", "found", "own", "asked", "wanted", "whole", "same", "some"}
# Fields of public results, which other programs read: what the finder found, beside what it rejected or missed.
PUBLIC = {("Explanation", "found"), ("Completeness", "found")}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)


def offences_of_words(prose: str) -> Iterator[tuple[int, str]]:
    """Line numbers and sentences for every word of the private vocabulary; inline code and formulas are left out."""
    readable = SPAN.sub(_blank, prose)
    for pattern, instead in BANNED.items():
        for match in pattern.finditer(readable):
            yield _line(readable, match.start()), f"write {instead!r} instead of {match[0]!r}"


def offences_of_names(code: str) -> Iterator[tuple[int, str]]:
    """Line numbers and sentences for every variable, parameter, field, function or class that a pronoun names."""
    tree = ast.parse(code)
    public = {
        (part.target.id, part.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and (node.name, part.target.id) in PUBLIC
    }
    for node in ast.walk(tree):
        for name, line in _bound(node):
            if name.strip("_") in PRONOUNS and (name, line) not in public:
                yield line, f"{name!r} is no name of a thing: use a noun"


def offences_of_page(page: str) -> Iterator[tuple[int, str]]:
    """The words of a page outside its blocks of code, and the names in its blocks of Python."""
    yield from offences_of_words(FENCE.sub(_blank, page))
    for match in FENCE.finditer(page):
        if match[1] == "python":
            above = _line(page, match.start(2)) - 1
            yield from ((line + above, sentence) for line, sentence in offences_of_names(match[2]))


def offences_of_code(code: str) -> Iterator[tuple[int, str]]:
    """The words of docstrings and comments, and the names."""
    yield from offences_of_names(code)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], sentence) for _, sentence in offences_of_words(token.string))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            first = node.body[0].lineno if text else 0
            yield from ((line + first - 1, sentence) for line, sentence in offences_of_words(text or ""))


def _bound(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a node introduces."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr, node.lineno
    elif isinstance(node, ast.arg):
        yield node.arg, node.lineno
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name, node.lineno


def _blank(match: re.Match[str]) -> str:
    """Line breaks of what is left out, so that line numbers stay."""
    return "\n" * match[0].count("\n") or " "


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def listed(path: Path, offences: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {sentence}" for line, sentence in sorted(offences)]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_uses_words_of_the_field(path: Path) -> None:
    wrong = listed(path, offences_of_page(path.read_text("utf-8")))
    assert not wrong, "\n".join(wrong)


def test_code_uses_words_of_the_field_and_nouns_as_names() -> None:
    wrong = [line for path in CODE for line in listed(path, offences_of_code(path.read_text("utf-8")))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("page", "line"),
    [
        ("The numbers go into\nthe ledger.", 2),
        ("A strip at a time.", 1),
        ("At this point the model is\nfor once **quietest**.", 2),
        ("Two ways; the latter is faster.", 1),
        ("It costs nothing to speak of.", 1),
        ("```python\nx = 1\none = 2\n```\n", 3),
        ("```python\nfor found in []:\n    pass\n```\n", 2),
        ("`code`, then a\n\n```text\nledger\n```\n\nledger", 7),
    ],
)
def test_a_page_with_private_words_or_pronouns_as_names_is_noticed(page: str, line: int) -> None:
    assert [number for number, _ in offences_of_page(page)] == [line]


@pytest.mark.parametrize(
    "page",
    [
        "One neuron of the same layer; some of them were found. `ledger.py` is a file, $calm$ a formula.",
        "```text\nthe ledger settles\n```\n",
        "```console\n$ strip one\n```\n",
        "```python\nprint(torch.ones(3), same(1))\nonce = 1\n```\n",
        "A stripe, a witnessed event, an unsettled question.",
    ],
)
def test_ordinary_english_and_quoted_code_are_left_alone(page: str) -> None:
    assert not list(offences_of_page(page))


@pytest.mark.parametrize(
    "code",
    [
        "def f(one): ...",
        "def _found(): ...",
        "class own: ...",
        "self.asked = 1",
        "for same in x: ...",
        "with f() as whole: ...",
        "y = [wanted for wanted in x]",
        "if (some := f()): ...",
        "found: int = 3",
        "x = 1  # the fate of x",
        '"""A calm module."""',
        'def f():\n    """Settles."""',
    ],
)
def test_code_with_private_words_or_pronouns_as_names_is_noticed(code: str) -> None:
    assert len(list(offences_of_code(code))) == 1


def test_code_without_them_is_left_alone() -> None:
    assert not list(offences_of_code('def once(ones_like): ...\nx = one  # the same\ny = "ledger"\nz = a.found\n'))

"""Plain tables: cells stand under their headings, lines fit the width, hostile text is harmless."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from html_cells import cells_of
from noetherflow import _table
from noetherflow._table import Column, Table, html_of, steps, text_of

NUMBERS = Table(
    "Two layers",
    (Column("name", folds=True), Column("size", right=True), Column("ratio", right=True)),
    (("first", "12", "0.5"), ("second layer", "3", "10.25")),
    ("* a note",),
)
EXPECTED = """\
Two layers
name          size  ratio
-------------------------
first           12    0.5
second layer     3  10.25
* a note"""


def wide_size(line: str) -> int:
    """The width of a line on a terminal, for the characters of these tests."""
    return sum(2 if character in "漢字" else 0 if character == "\u0301" else 1 for character in line)


def test_a_table_as_text_to_the_character() -> None:
    assert NUMBERS.text(80) == EXPECTED


def test_a_table_with_two_columns_swapped_is_another_text() -> None:
    swapped = Table(NUMBERS.title, NUMBERS.columns, tuple((a, c, b) for a, b, c in NUMBERS.rows), NUMBERS.notes)
    assert swapped.text(80) != EXPECTED


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 cells in a row, got 2"):
        Table("", NUMBERS.columns, (("a", "b"),))


def test_without_headings_there_is_neither_head_nor_rule() -> None:
    legend = Table("", (Column("", right=True), Column("", folds=True)), (("a", "first letter"), ("bcd", "word")))
    assert legend.text(80) == "  a  first letter\nbcd  word"
    assert "<thead>" not in legend.html()
    assert "<caption" not in legend.html()


def test_a_table_without_rows_shows_its_headings() -> None:
    assert Table("", NUMBERS.columns, ()).text(80) == "name  size  ratio\n-----------------"


def test_a_cell_of_several_lines_stays_in_its_column() -> None:
    table = Table(
        "", (Column("a"), Column("b", right=True), Column("c")), (("x\nyy", "1", "p\nq\nr"), ("z", "22", "s"))
    )
    assert table.text(80).splitlines()[2:] == ["x    1  p", "yy      q", "        r", "z   22  s"]


@pytest.mark.parametrize("width", [200, 80, 40, 30, 17, 9])
def test_every_line_fits_and_no_character_is_lost(width: int) -> None:
    name = "transformer.h.10.attention.c_attn.weight -> transformer.h.10.attention.c_proj.weight"
    long = Table(
        "Symmetries of a model with long names",
        (Column("symmetry", folds=True), Column("size", right=True), Column("why", folds=True)),
        ((name, "768", "the gradients of this layer are tied to those of another layer"),),
        ("* " + "this sentence is repeated " * 5,),
    )
    lines = long.text(width).splitlines()
    assert max(map(len, lines)) <= width
    if width > 30:  # numbers are in one piece as long as names can be folded
        assert any(re.search(r" 768 ", line) for line in lines)
    squeezed = re.sub(r"[\s-]", "", "".join(lines))
    for text in (long.title, name, *long.rows[0], *long.notes):
        for character in set(text) - set(" -"):
            assert squeezed.count(character) >= text.count(character), character
    # A column by itself, read downwards, is the name again.
    alone = Table("", (Column("", folds=True),), ((name,),)).text(width).splitlines()
    assert "".join(alone).replace(" ", "") == name.replace(" ", "")


def test_a_table_that_is_not_narrowed_is_too_wide() -> None:
    table = Table("", (Column("symmetry", folds=True),), (("w" * 100,),))
    assert max(map(len, table.text(200).splitlines())) == 100
    assert max(map(len, table.text(50).splitlines())) == 50


def test_a_fold_prefers_spaces() -> None:
    table = Table("", (Column("", folds=True),), (("one two three four",),))
    assert table.text(9).splitlines() == ["one two", "three", "four"]
    assert Table("", (Column("", folds=True),), (("abcdefgh ij",),)).text(5).splitlines() == ["abcde", "fgh", "ij"]


def test_a_dotted_name_is_cut_before_a_dot() -> None:
    table = Table("", (Column("", folds=True),), (("model.layers.{i=0..11}.attention.weight",),))
    assert table.text(16).splitlines() == ["model.layers", ".{i=0..11}", ".attention", ".weight"]
    assert Table("", (Column("", folds=True),), (("0.123456789",),)).text(6).splitlines() == ["0.1234", "56789"]
    assert Table("", (Column("", folds=True),), (("model.layers of",),)).text(12).splitlines() == ["model.layers", "of"]


def test_the_column_that_costs_the_fewest_lines_is_narrowed() -> None:
    """A sentence beside a list: the sentence can be folded to the length of the list, and the list stays as it is."""
    columns = Column("list", folds=True), Column("sentence", folds=True)
    names = [f"a_module_with_a_long_name_{k}" for k in range(4)]
    table = Table("", columns, (("\n".join(names), "a sentence of a few words"),))
    lines = table.text(40).splitlines()
    assert [line[:27] for line in lines[2:]] == names
    assert [line[28:] for line in lines[2:]] == ["a sentence", "of a few", "words", ""]


def test_wide_characters_and_accents_take_their_width() -> None:
    table = Table("", (Column("n"), Column("k")), (("漢字", "1"), ("e\u0301", "2"), ("abcd", "3")))
    assert table.text(80).splitlines()[2:] == ["漢字  1", "e\u0301     2", "abcd  3"]
    folded = Table("", (Column("", folds=True),), (("漢字" * 8,),)).text(7).splitlines()
    assert "".join(folded) == "漢字" * 8
    assert max(map(wide_size, folded)) <= 7


def test_a_long_name_is_folded_quickly() -> None:
    table = Table("", (Column("", folds=True),), (("x" * 300_000,),))
    assert len(table.text(60).splitlines()) == 5000


HOSTILE = "<script>alert('x')</script> & \"q\" \x1b[31mred\x07\t\r\ud800\u202e"


def test_a_hostile_name_neither_acts_on_a_terminal_nor_in_a_page() -> None:
    table = Table(HOSTILE, (Column(HOSTILE, folds=True),), ((HOSTILE,),), (HOSTILE,))
    for text in (table.text(300), table.html()):
        assert all(character.isprintable() or character == "\n" for character in text)
        text.encode()  # a lone surrogate would raise
        assert r"\x1b[31mred\x07\t\r\ud800\u202e" in text
    page = cells_of(table.html())
    assert "script" not in page.tags
    assert page.rows[1][0][0].startswith("<script>alert('x')</script> & \"q\"")


def test_the_html_holds_every_cell_under_its_heading() -> None:
    page = cells_of(NUMBERS.html())
    assert page.caption == "Two layers"
    assert page.rows == [
        [("name", "left"), ("size", "right"), ("ratio", "right")],
        [("first", "left"), ("12", "right"), ("0.5", "right")],
        [("second layer", "left"), ("3", "right"), ("10.25", "right")],
    ]
    assert page.notes == ["* a note"]


def test_several_tables_are_apart() -> None:
    assert text_of([NUMBERS, NUMBERS], 80) == EXPECTED + "\n\n" + EXPECTED
    assert html_of([NUMBERS, NUMBERS]).count("<table>") == 2


@pytest.mark.parametrize(
    ("count", "written"),
    [(float("inf"), "never"), (1234.4, "1,234"), (0.4, "0"), (9_999_999.0, "9,999,999"), (3e9, "3.0e+09")],
)
def test_a_number_of_steps_is_written_as_people_write_it(count: float, written: str) -> None:
    assert steps(count) == written


@pytest.mark.parametrize("columns", ["40", "100"])
def test_the_width_is_that_of_the_terminal(columns: str) -> None:
    code = "from noetherflow._table import Column, Table\n"
    code += "print(Table('', (Column('', folds=True),), (('x' * 500,),)).text())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"COLUMNS": columns}, capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) == int(columns)


def test_tables_need_the_standard_library_only() -> None:
    assert foreign_imports(Path(_table.__file__).read_text("utf-8")) == set()


def test_an_import_from_elsewhere_is_seen() -> None:
    assert foreign_imports("import html\nfrom rich.table import Table\nimport torch.nn") == {"rich", "torch"}


def foreign_imports(code: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names

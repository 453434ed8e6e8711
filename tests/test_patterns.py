"""Rows that differ in integers only are merged, and the merged rows stand for exactly these rows."""

import itertools
import random

import pytest

from expanded import expanded, values
from noetherflow._patterns import cell_of_name, cell_of_sentence, merge


def merged(*rows: str) -> list[str]:
    """Rows of cells separated by ` | `, merged."""
    cells = [tuple(map(cell_of_name, row.split(" | "))) for row in rows]
    return [" | ".join(pattern.cells) for pattern in merge(cells, [None] * len(rows))]


def names(template: str, *ranges: list[int]) -> list[str]:
    return [template.format(*numbers) for numbers in itertools.product(*ranges)]


def test_three_rows_are_merged_and_two_are_not() -> None:
    assert merged("h.0.fc", "h.1.fc", "h.2.fc") == ["h.{i=0..2}.fc"]
    assert merged("h.0.fc", "h.1.fc") == ["h.0.fc", "h.1.fc"]
    assert merged("h.0.fc", "h.1.fc", "h.2.proj") == ["h.0.fc", "h.1.fc", "h.2.proj"]


@pytest.mark.parametrize(
    ("numbers", "written"),
    [
        ([*range(12)], "0..11"),
        ([0, 1, 2, 3, 5], "0..3, 5"),
        ([0, 2, 4, 6], "0, 2, ..., 6"),
        ([1, 3, 5], "1, 3, 5"),
        ([0, 1, 10], "0, 1, 10"),
        ([5, 6, 7, 9, 10, 20, 21, 22], "5..7, 9, 10, 20..22"),
    ],
)
def test_values_are_written_exactly(numbers: list[int], written: str) -> None:
    assert merged(*names("a{}", numbers)) == [f"a{{i={written}}}"]
    assert values(written) == numbers
    assert values(written) != numbers[:-1]


def test_all_combinations_are_a_row_and_a_missing_combination_splits_it() -> None:
    full = names("h.{}.attn: head {}", [0, 1, 2], [0, 1, 2, 3])
    assert merged(*full) == ["h.{i=0..2}.attn: head {j=0..3}"]
    assert merged(*full[:-1]) == ["h.{i=0, 1}.attn: head {j=0..3}", "h.2.attn: head {i=0..2}"]
    irregular = [name for name in full if name not in ("h.0.attn: head 1", "h.2.attn: head 0")]
    assert merged(*irregular) == ["h.0.attn: head {i=0, 2, 3}", "h.1.attn: head {i=0..3}", "h.2.attn: head {i=1..3}"]


def test_integers_that_depend_on_others_are_expressions() -> None:
    assert merged("0 -> 2", "2 -> 4", "4 -> 6", "6 -> 8") == ["{i=0, 2, ..., 6} -> {i+2}"]
    assert merged("head 0 | w 8 12", "head 1 | w 12 16", "head 2 | w 16 20") == ["head {i=0..2} | w {4i+8} {4i+12}"]
    assert merged("a0 b9", "a1 b8", "a2 b7") == ["a{i=0..2} b{-i+9}"]
    assert merged("a0 b0", "a2 b1", "a4 b2") == ["a0 b0", "a2 b1", "a4 b2"]  # half of i is no integer
    assert merged("a0 b0", "a1 b1", "a2 b4") == ["a0 b0", "a1 b1", "a2 b4"]


def test_texts_and_keys_have_to_agree() -> None:
    cells = [(cell_of_name(f"h.{k}"),) for k in range(6)]
    patterns = merge(cells, [0, 0, 0, 1, 1, 1])
    assert [(pattern.cells, pattern.rows) for pattern in patterns] == [
        (("h.{i=0..2}",), (0, 1, 2)),
        (("h.{i=3..5}",), (3, 4, 5)),
    ]
    assert len(merge(cells, [0] * 6)) == 1


def test_braces_and_leading_zeros_of_names_are_kept() -> None:
    braces = names("h.{}.{{i=0..2}}", [0, 1, 2])
    assert merged(*braces) == braces
    zeros = names("h.0{}", [0, 1, 2])
    assert merged(*zeros) == zeros


def test_decimal_numbers_of_sentences_are_text() -> None:
    assert cell_of_sentence("norm (h.3.ln) has eps = 1e-05") == ("norm (h.", 3, ".ln) has eps = ", "1e-05")
    assert cell_of_sentence("relu (0.1)") == ("relu (", 0, ".", 1, ")")
    assert cell_of_sentence("scale 0.5 in head 2") == ("scale ", "0.5", " in head ", 2)


def test_random_rows_are_recovered_and_never_repeated() -> None:
    generator = random.Random(0)
    for _ in range(300):
        full = list(itertools.product(range(3), range(4), range(2)))
        kept = generator.sample(full, generator.randint(1, len(full)))
        texts = [f"h.{a}.attn head {b} | e{c} w[{3 * b + 5}:{3 * b + 8}] {10 - a}" for a, b, c in kept]
        rows = merged(*texts)
        recovered = [" | ".join(cells) for row in rows for cells in expanded(row.split(" | "))]
        assert sorted(recovered) == sorted(texts)
        assert len(rows) < len(texts) or len(kept) < 20


def test_a_row_that_stands_for_too_much_is_noticed() -> None:
    assert expanded(["h.{i=0..2}", "w {2i+1}"]) == [("h.0", "w 1"), ("h.1", "w 3"), ("h.2", "w 5")]
    assert expanded(["h.{i=0..2}", "w[2i:2i+2]"]) == [("h.0", "w[0:2]"), ("h.1", "w[2:4]"), ("h.2", "w[4:6]")]
    assert expanded(["h.{i=0..3}", "w {2i+1}"]) != [("h.0", "w 1"), ("h.1", "w 3"), ("h.2", "w 5")]


def test_many_rows_take_no_time() -> None:
    """144 heads of 96 layers: more rows than any model so far."""
    rows = names("h.{}.attn: head {}", [*range(96)], [*range(144)])
    assert merged(*rows) == ["h.{i=0..95}.attn: head {j=0..143}"]

"""The words, the rows and the marks of the page of an analysis, without a browser."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import noetherflow as nf
from many_symmetries import NAN, analysis_of, layers, many, report
from noetherflow.report import page
from noetherflow.report.rows import ACROSS, block_of, rows_of
from noetherflow.report.words import meaning, sentences

INFINITY = "along some directions the equilibrium lies at infinity; these directions were left where they are"


def written(folder: Path, analysis: nf.Analysis) -> Path:
    path = folder / "page.html"
    page.write(path, analysis)
    return path


@pytest.mark.parametrize(
    ("parameters", "block"),
    [
        (("transformer.h.0.ln_1.weight", "transformer.h.0.attn.c_attn.weight"), "transformer.h.0"),
        (("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"), "transformer.h.0"),
        (("transformer.h.0.mlp.weight", "transformer.h.1.mlp.weight"), "transformer.h"),
        (("layer1.0.conv1.weight", "layer1.0.conv2.weight"), "layer1.0"),
        (("encoder.a.weight", "encoder.b.weight"), "encoder"),
        (("0.weight", "2.weight"), ACROSS),
        (("u", "w"), ACROSS),
        (("0.weight", "0.bias"), "0"),
    ],
)
def test_a_block_is_the_common_prefix_of_modules_up_to_a_number(parameters: tuple[str, ...], block: str) -> None:
    assert block_of(parameters) == block


def test_the_words_say_how_many_are_far_and_which_is_furthest() -> None:
    analysis = layers()
    first, second, third = sentences(analysis, rows_of(analysis))
    assert first.startswith("2 of 5 symmetries are further from rest than the error")
    assert "1 is at rest within the error. The error of the distance is not known for 1 of them. 1 is left" in first
    assert 'that of "first", whose weights are typically a factor 1.8 from rest (distance 0.588 ± 0.05)' in first
    # The median of 3000, 500, 3000, 3000 steps, and the slowest of those that are finite.
    assert "in about 3,000 steps, the median over symmetries; the slowest direction needs about 9,000." in first
    assert "from 3.18 to 4.48" in second
    assert "The noise rises" in second
    assert f"For 1 of 5 symmetries: {INFINITY}." in third
    assert "neither noise nor weight decay" in third


def test_the_noise_is_said_to_rise_only_where_it_rises() -> None:
    analysis = analysis_of([report("a")], ["m"], trace_before=4.48, trace_after=3.18)
    words = " ".join(sentences(analysis, rows_of(analysis)))
    assert "from 4.48 to 3.18" in words
    assert "rises" not in words


def test_without_errors_or_symmetries_the_words_claim_nothing() -> None:
    analysis = analysis_of([report("a", error=NAN), report("b", error=NAN, distance=2.0)], ["m", "n"])
    words = sentences(analysis, rows_of(analysis))[0]
    assert words.startswith("2 symmetries were measured. The error of the distance is not known for any of them.")
    assert 'that of "b", whose weights are typically a factor 7.39 from rest (distance 2)' in words
    assert sentences(analysis_of([], []), []) == ["The model has no symmetry: there is nothing to balance."]


def test_held_out_data_gives_medians_and_columns(tmp_path: Path) -> None:
    numbers = ((0.6, 0.3), (0.7, 0.36), (0.1, NAN))
    reports = [report(f"s{k}", holdout_before=a, holdout_after=b) for k, (a, b) in enumerate(numbers)]
    analysis = analysis_of(reports, ["m"] * 3, held=True)
    words = " ".join(sentences(analysis, rows_of(analysis)))
    assert "from 0.4 to 1e-09 on the data that was used, and from 0.6 to 0.33 on data that was held out" in words
    text = written(tmp_path, analysis).read_text()
    assert text.count('data-key="holdout') == 2
    assert 'data-key="holdout' not in written(tmp_path, analysis_of(reports, ["m"] * 3)).read_text()


def test_every_status_has_a_meaning() -> None:
    for status in nf.Status:
        assert meaning(status.name.lower()) == status.value
    assert meaning("not known here") == "not known here"


def test_the_page_refers_to_no_external_address(tmp_path: Path) -> None:
    text = written(tmp_path, layers()).read_text()
    assert not re.search(r"""\b(src|href)=["'](?!#|data:)""", text)
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize("count", [300, 301])
def test_many_symmetries_are_drawn_as_a_mark_per_block(tmp_path: Path, count: int) -> None:
    text = written(tmp_path, many(count)).read_text()
    assert text.count("<circle") == (count if count <= 300 else 100)


def test_blocks_with_the_largest_distances_are_drawn(tmp_path: Path) -> None:
    reports = [report(f"s{k}", distance=k / 400) for k in range(400)]
    text = written(tmp_path, analysis_of(reports, [f"h.{k}" for k in range(400)])).read_text()
    assert text.count("<circle") == 150
    assert "250 blocks with smaller distances are not drawn" in text
    assert ">h.399<" in text
    assert ">h.249<" not in text


def test_a_report_keeps_its_place(tmp_path: Path) -> None:
    """Every field that the page reads comes from the report, and none from its neighbour."""
    values: dict[str, Any] = {"distance": 0.11, "error": 0.012, "imbalance_before": 0.13, "imbalance_after": 0.14}
    values |= {"holdout_before": 0.15, "holdout_after": 0.16, "relaxation_steps": 17.0, "slowest_steps": 18.0}
    (row,) = rows_of(analysis_of([dataclasses.replace(report("a"), **values)], ["net.3"]))
    expected = ["a", "net.3", "diagonal", 3, 0.11, 0.012, 0.13, 0.14, 0.15, 0.16, 17.0, 18.0, "converged"]
    assert row.to_json() == [*expected, "further from rest than the error", ""]


def test_weight_decay_by_parameter_is_shown_by_value(tmp_path: Path) -> None:
    decays = {"0.weight": 0.01, "2.weight": 0.01, "0.bias": 0.0}
    analysis = analysis_of([report("a")], ["m"])
    analysis = dataclasses.replace(analysis, settings=dataclasses.replace(analysis.settings, weight_decay=decays))
    text = written(tmp_path, analysis).read_text()
    assert "<dt>weight_decay</dt><dd>0.01 for 2 parameters, 0 for 1 parameter</dd>" in text
    assert "<dt>gamma</dt><dd>0.005 for 2 parameters, 0 for 1 parameter</dd>" in text

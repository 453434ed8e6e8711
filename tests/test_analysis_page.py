"""The page of an analysis: its words, and what a reader sees in Chromium."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

import noetherflow as nf
from chromium import CONTRAST, needs_chromium, opened, until
from many_symmetries import NAN, analysis_of, report, small
from noetherflow.report import page
from noetherflow.report.rows import ACROSS, block_of, rows_of
from noetherflow.report.words import meaning, sentences

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "\"quoted' & &amp; $style ${x} \\u003c",
    "\u202eright to left \u0000 \U0001f4a5 é ß 层",
    "long " + "x" * 400,
    "half a pair \ud800",
)
INFINITY = "along some directions the equilibrium lies at infinity; these directions were left where they are"


def layers() -> nf.Analysis:
    """Five symmetries in two blocks and across blocks: far, at rest, error unknown, at infinity, and no distance."""
    reports = (
        report("first", distance=math.log(1.8), error=0.05, dimension=12, imbalance_before=0.9),
        report("second", distance=0.1, error=0.2, at_rest=True, relaxation_steps=500.0, kind="matrix"),
        report("third", distance=0.3, error=NAN, relaxation_steps=math.inf, slowest_steps=math.inf),
        report("fourth", distance=0.2, error=0.0123, status="at_infinity", message="row 3 has no pull"),
        report("fifth", distance=0.0, error=NAN, status="singular", imbalance_before=NAN, imbalance_after=NAN),
    )
    modules = ("net.h.0.mlp", "net.h.0.attn.c", "net.h.1.mlp", "net.h.1", "head")
    notes = ("the pooler <b>is not used</b> by the loss",)
    return analysis_of(reports, modules, notes=notes, trace_before=3.18, trace_after=4.48, passes=7)


def many(count: int = 10_000) -> nf.Analysis:
    """Symmetries of 100 blocks with distances that are a permutation of 0 to 1."""
    reports = [
        report(f"layer {k}", distance=(k * 7919 % count) / count, at_rest=k % 2 == 0, message="m" * (k % 3))
        for k in range(count)
    ]
    return analysis_of(reports, [f"model.layers.{k * 100 // count}" for k in range(count)])


def written(folder: Path, analysis: nf.Analysis) -> Path:
    path = folder / "page.html"
    page.write(path, analysis)
    return path


def names(tab: Page) -> list[str]:
    return tab.locator("#symmetries tbody td:first-child bdi").all_text_contents()


def column(tab: Page, label: str) -> list[str]:
    return tab.locator(f"#symmetries tbody td[data-label='{label}'] > :first-child").all_text_contents()


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
    assert first.startswith("2 of 5 symmetries are further from rest than their error")
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


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_the_page_fits_and_is_readable(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    tab, wrong = opened(browser, written(tmp_path, layers()), width, scheme)
    tab.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    assert names(tab) == ["first", "second", "third", "fourth", "fifth"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 100
    assert not [ratio for ratio in ratios if ratio[0] < 4.5]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert "the pooler <b>is not used</b> by the loss" in tab.inner_text("header")
    assert "weight_decay" in tab.inner_text("main")
    assert "torch" in tab.inner_text("main")
    assert not wrong
    tab.close()


@needs_chromium
def test_cells_hold_the_numbers_of_the_reports(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, layers()))
    assert column(tab, "size") == ["12", "3", "3", "3", "3"]
    assert column(tab, "kind") == ["diagonal", "matrix", "diagonal", "diagonal", "diagonal"]
    assert column(tab, "distance") == ["0.588 ± 0.05", "0.1 ± 0.2", "0.3", "0.2 ± 0.01", "0"]
    assert column(tab, "factor") == ["×1.8", "×1.11", "×1.35", "×1.22", "×1"]
    assert column(tab, "imbalance") == ["0.9", "0.4", "0.4", "0.4", "–"]
    assert column(tab, "at rest")[0] == "1.0e-9"
    assert column(tab, "steps") == ["3,000", "500", "never", "3,000", "3,000"]
    assert column(tab, "slowest") == ["9,000", "9,000", "never", "9,000", "9,000"]
    assert column(tab, "status") == ["converged", "converged", "converged", "at infinity", "singular"]
    messages = tab.locator("#symmetries .message").all_text_contents()
    assert messages[0] == "further from rest than the error"
    assert messages[3] == "further from rest than the error. row 3 has no pull"
    assert messages[4] == "left where it is"
    assert tab.locator(".totals tbody td").all_text_contents()[1:4] == ["3.18", "4.48", "1.41"]
    assert not wrong
    tab.close()


@needs_chromium
def test_points_and_bars_of_the_picture_are_to_scale(browser: Browser, tmp_path: Path) -> None:
    tab, _ = opened(browser, written(tmp_path, layers()))
    box = "all => all.map((node) => { const b = node.getBoundingClientRect(); return [b.left, b.right]; })"
    points = [(left + right) / 2 for left, right in tab.locator(".distances circle").evaluate_all(box)]
    distances = [math.log(1.8), 0.1, 0.3, 0.2, 0.0]
    scale = (points[0] - points[4]) / distances[0]
    assert scale > 1000
    for point, distance in zip(points, distances, strict=True):
        assert point - points[4] == pytest.approx(scale * distance, abs=0.1)
    bars = tab.locator(".distances g line").evaluate_all(box)
    # Those with an error: a standard error on both sides, cut at zero.
    for (left, right), (low, high) in zip(bars, [(-0.05, 0.05), (-0.1, 0.2), (-0.0123, 0.0123)], strict=True):
        centre = points[{0.05: 0, 0.2: 1, 0.0123: 3}[high]]
        assert left - centre == pytest.approx(scale * low, abs=0.1)
        assert right - centre == pytest.approx(scale * high, abs=0.1)
    assert tab.locator(".distances text.block").all_text_contents() == ["net.h.0", "net.h.1", "head"]
    kinds = tab.locator(".distances svg g > g").evaluate_all("all => all.map((node) => node.getAttribute('class'))")
    assert kinds == ["far", "rest", "unknown", "open", "open"]
    tab.close()


@needs_chromium
def test_the_table_sorts_filters_and_folds(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, layers()))
    tab.uncheck("#grouped")
    for heading, order in (
        ("distance", [4, 1, 3, 2, 0]),
        ("symmetry", [4, 0, 3, 1, 2]),
        ("imbalance", [1, 2, 3, 0, 4]),
    ):
        expected = [["first", "second", "third", "fourth", "fifth"][place] for place in order]
        tab.click(f"th button:text-is('{heading}')")
        assert names(tab) == expected
        tab.click(f"th button:text-is('{heading}')")
        if heading == "imbalance":
            # Equal numbers keep their order; a number that is missing stays at the end.
            assert names(tab) == ["first", "second", "third", "fourth", "fifth"]
        else:
            assert names(tab) == expected[::-1]
    tab.check("#grouped")
    tab.click("th button:text-is('distance')")
    headings = tab.locator("#symmetries tr.block button")
    assert headings.all_text_contents() == ["head", "net.h.0", "net.h.1"]
    assert names(tab) == ["fifth", "second", "first", "fourth", "third"]
    headings.nth(1).click()
    assert names(tab) == ["fifth", "fourth", "third"]
    assert headings.nth(1).get_attribute("aria-expanded") == "false"
    shown = tab.locator("#symmetries tr.block").nth(1).inner_text()
    assert "2 symmetries; 1 further from rest than the error; largest distance 0.588, a factor 1.8" in shown
    tab.click("#fold")
    assert names(tab) == []
    tab.fill("#search", "MATRIX net.h.0")
    assert names(tab) == ["second"]
    assert tab.inner_text("#count") == "1 of 5"
    tab.fill("#search", "")
    tab.click("#unfold")
    for state, expected in (("at infinity", ["fourth"]), ("at rest within the error", ["second"]), ("left", ["fifth"])):
        tab.select_option("#state", label="left where it is" if state == "left" else state)
        assert names(tab) == expected
    assert not wrong
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_ten_thousand_symmetries_stay_usable(browser: Browser, tmp_path: Path, width: int) -> None:
    tab, wrong = opened(browser, written(tmp_path, many()), width)
    assert tab.locator("#symmetries tr.block").count() == 100
    assert tab.evaluate("document.querySelectorAll('*').length") < 5000
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator(".distances circle").count() == 100

    def milliseconds(action: str) -> float:
        script = "() => { const start = performance.now(); ACTION; document.body.offsetHeight; "
        taken: float = tab.evaluate(script.replace("ACTION", action) + "return performance.now() - start; }")
        return taken

    click = "document.querySelector(\"th[data-key='distance'] button\").click()"
    search = "const s = document.getElementById('search'); s.value = 'layer 77'; s.dispatchEvent(new Event('input'))"
    assert milliseconds("document.getElementById('unfold').click()") < 1000
    assert milliseconds("document.getElementById('grouped').click()") < 1000
    assert milliseconds(click) < 1000
    assert names(tab)[:2] == ["layer 0", f"layer {pow(7919, -1, 10_000)}"]
    assert milliseconds(click) < 1000
    assert names(tab)[0] == f"layer {-pow(7919, -1, 10_000) % 10_000}"
    assert milliseconds(search) < 1000
    # Block 77 holds numbers from 7700 to 7799.
    assert tab.inner_text("#count") == f"{sum('77' in str(k) for k in range(10_000))} of 10,000"
    tab.fill("#search", "")
    assert len(names(tab)) < 1000
    while (before := len(names(tab))) < 2000:
        tab.evaluate("scrollTo(0, document.getElementById('more').offsetTop)")
        until(tab, lambda least=before: len(names(tab)) > least)
    assert not wrong
    tab.close()


@needs_chromium
def test_a_tall_screen_is_filled(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, many()))
    tab.set_viewport_size({"width": 1400, "height": 30_000})
    tab.uncheck("#grouped")
    until(tab, lambda: tab.evaluate("document.getElementById('more').getBoundingClientRect().top") > 30_000)
    assert 400 < len(names(tab)) < 2000
    assert not wrong
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_hostile_names_are_text(browser: Browser, tmp_path: Path, width: int) -> None:
    reports = [report(name, distance=1.0 + k, message=name) for k, name in enumerate(HOSTILE)]
    analysis = analysis_of(reports, [name.replace(".", "") for name in HOSTILE], notes=HOSTILE)
    tab, wrong = opened(browser, written(tmp_path, analysis), width)
    # The halves of pairs are replaced in HTML, and shown as they are by scripts.
    assert [name.replace("\ud800", "\ufffd") for name in HOSTILE] == [n.replace("\ud800", "\ufffd") for n in names(tab)]
    assert tab.locator("img").count() == 0
    assert tab.title() == "noetherflow: page"
    assert HOSTILE[0] in tab.inner_text("header")
    assert tab.inner_text("h1") == "page: how far the model is from rest"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong
    tab.close()


@needs_chromium
def test_faults_of_the_page_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """The twins: names that become HTML, a request to another address, a table that is too wide."""
    path = written(tmp_path, analysis_of([report(HOSTILE[0])], ["m"]))
    text = path.read_text()
    assert text.count("node.textContent = content") == 1
    path.write_text(text.replace("node.textContent = content", "node.innerHTML = content"))
    tab, wrong = opened(browser, path)
    tab.wait_for_timeout(200)
    assert tab.locator("img").count() == 1
    assert wrong
    tab.close()
    path.write_text(text.replace("</main>", '<img src="https://example.org/x.png"></main>'))
    tab, wrong = opened(browser, path)
    assert any("Content Security Policy" in line for line in wrong)
    tab.close()
    path.write_text(
        text.replace("overflow-x: auto", "overflow-x: visible").replace("max-width: 720px", "max-width: 9px")
    )
    tab, _ = opened(browser, path, 400)
    assert tab.evaluate("document.documentElement.scrollWidth") > 400
    tab.close()


@needs_chromium
def test_a_model_without_symmetries_has_a_page(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, analysis_of([], [])))
    assert "there is nothing to balance" in tab.inner_text("header")
    assert tab.inner_text("#count") == "0 of 0"
    assert not wrong
    tab.close()


@needs_chromium
def test_a_real_analysis_is_shown(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, small()))
    assert names(tab) == ["0 -> 2"]
    assert column(tab, "distance")[0].startswith(f"{small().reports[0].distance:.3g}")
    assert tab.locator("#symmetries tr.block button").all_text_contents() == [ACROSS]
    assert not wrong
    tab.close()


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

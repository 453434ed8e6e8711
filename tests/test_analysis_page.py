"""The page of an analysis in Chromium."""

import math
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

import noetherflow as nf
from chromium import CONTRAST, needs_chromium, opened, until
from many_symmetries import analysis_of, layers, many, report, small
from noetherflow.report import page
from noetherflow.report.rows import ACROSS

HOSTILE = (
    "</script><img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "\"quoted' & &amp; $style ${x} \\u003c",
    "\u202eright to left \u0000 \U0001f4a5 é ß 层",
    "long " + "x" * 400,
    "half a pair \ud800",
)


def written(folder: Path, analysis: nf.Analysis) -> Path:
    path = folder / "page.html"
    page.write(path, analysis)
    return path


def names(tab: Page) -> list[str]:
    return tab.locator("#symmetries tbody td:first-child bdi").all_text_contents()


def column(tab: Page, label: str) -> list[str]:
    return tab.locator(f"#symmetries tbody td[data-label='{label}'] > :first-child").all_text_contents()


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

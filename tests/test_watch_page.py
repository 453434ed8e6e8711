"""The page of a recorded run in Chromium."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page

from chromium import CONTRAST, needs_chromium, opened, until
from noetherflow.record import Run, RunRecord, read_run
from noetherflow.report import watch
from recorded_runs import ordinary, run_of
from test_analysis_page import HOSTILE

CHARTS = ["Noise scale", "Gradient and noise", "Charges", "Where the change went", "Distance to equilibrium", "loss"]


def written(folder: Path, run: Run) -> Path:
    path = folder / "page.html"
    watch.write(path, run)
    return path


def chart(tab: Page, title: str) -> Locator:
    return tab.locator("#charts section").filter(
        has=tab.locator("h2 bdi", has_text=re.compile(f"^{re.escape(title)}$"))
    )


def ruler(section: Locator, kind: str, log: bool = False) -> Any:
    """From a pixel to a value, by two numbers that the axis shows; a check against the page, not against its code."""
    texts = section.locator(f".chart text.{kind}").all_text_contents()
    numbers = [float(text.replace(",", "")) for text in texts]
    places = section.locator(f".chart text.{kind}").evaluate_all(f"all => all.map((t) => +t.getAttribute('{kind}'))")
    places = [place - 4 for place in places] if kind == "y" else places
    values = [math.log10(number) for number in numbers] if log else numbers
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return lambda pixel: (
        10 ** (values[0] + slope * (pixel - places[0])) if log else values[0] + slope * (pixel - places[0])
    )


def points(section: Locator, index: int, kind: str = "curve") -> np.ndarray:
    """The corners of the paths of a curve, or of its band."""
    paths = section.locator(f".chart g.s{index} path.{kind}").evaluate_all("all => all.map((p) => p.getAttribute('d'))")
    return np.array([[float(x) for x in pair.split(",")] for d in paths for pair in d.strip("MZ").split("L")])


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_is_readable(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    tab, wrong = opened(browser, written(tmp_path, ordinary()), width, scheme)
    until(tab, lambda: tab.locator(".chart text").count() > 20)
    assert tab.locator("#charts h2").all_text_contents() == CHARTS
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 80
    assert not [ratio for ratio in ratios if ratio[0] < 4.5]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert "The critical batch size is at least" in tab.inner_text("header")
    # A chart is as wide as the page, so that letters keep their size, also when the window changes.
    tab.set_viewport_size({"width": 700, "height": 900})
    until(tab, lambda: tab.locator(".chart line.grid").first.evaluate("l => +l.getAttribute('x2')") == 700 - 32 - 12)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 700
    assert not wrong
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_what_is_drawn_is_what_was_recorded(browser: Browser, tmp_path: Path, width: int) -> None:
    """From a file on disk to pixels, and back by the numbers at the axes."""
    run, record = ordinary(), RunRecord(tmp_path / "run")
    for place, step in enumerate(run.steps.tolist()):
        record.append(step, {key: values[place] for key, values in run.columns.items()})
    tab, wrong = opened(browser, written(tmp_path, read_run(tmp_path / "run")), width)
    until(tab, lambda: tab.locator(".chart text").count() > 20)
    for title, index, key, log in (
        ("Noise scale", 0, "noise/scale", True),
        ("Noise scale", 1, "noise/scale_preconditioned", True),
        ("Gradient and noise", 1, "noise/trace", True),
        ("Charges", 0, "charge/s1", False),
        ("Charges", 1, "charge/s0", False),
        ("Where the change went", 1, "charge_decay/s1", False),
        ("Where the change went", 4, "charge_broken/s1", False),
        ("Distance to equilibrium", 1, "distance/s0", False),
        ("loss", 0, "loss", False),
    ):
        section = chart(tab, title)
        x, y, drawn = ruler(section, "x"), ruler(section, "y", log), points(section, index)
        values = run.columns[key]
        # A hundredth of a pixel, of about 200.
        reach = 1e-4 * (1 if log else np.ptp(section_values(run, title)))
        np.testing.assert_allclose(x(drawn[:, 0]), run.steps, atol=0.02 * 580 / (width - 108))
        np.testing.assert_allclose(y(drawn[:, 1]), values, atol=2 * reach, rtol=1e-3 if log else 0)
        with pytest.raises(AssertionError):  # The twin: a shift by a step, and a factor of 1.01.
            np.testing.assert_allclose(y(drawn[:, 1]), np.roll(values, 1), atol=2 * reach, rtol=1e-3 if log else 0)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(y(drawn[:, 1]), 1.01 * values, atol=2 * reach, rtol=1e-3 if log else 0)
    assert not wrong
    tab.close()


def section_values(run: Run, title: str) -> np.ndarray:
    """All values of a chart."""
    kinds = {"Charges": "charge/", "Where the change went": "charge", "Distance to equilibrium": "distance/"}
    start = kinds.get(title, title)
    return np.concatenate([values for key, values in run.columns.items() if key.startswith(start)])


@needs_chromium
def test_the_band_is_the_interval_and_reaches_the_edge_where_it_is_unbounded(browser: Browser, tmp_path: Path) -> None:
    run = ordinary()
    tab, _ = opened(browser, written(tmp_path, run))
    until(tab, lambda: tab.locator(".chart text").count() > 20)
    section = chart(tab, "Noise scale")
    band, y = points(section, 0, "band"), ruler(section, "y", log=True)
    upper, lower = band[:30], band[30:][::-1]
    np.testing.assert_allclose(y(lower[:, 1]), run.columns["noise/scale_low"], rtol=1e-3)
    bounded = np.isfinite(run.columns["noise/scale_high"])
    assert bounded.sum() == 20
    np.testing.assert_allclose(y(upper[bounded, 1]), run.columns["noise/scale_high"][bounded], rtol=1e-3)
    assert set(upper[~bounded, 1]) == {12.0}
    assert (upper[bounded, 1] > 12.0).sum() >= 19
    note = section.locator(".note").last.inner_text()
    assert note.startswith(
        "Noise scale: at 10 of 30 steps the interval is unbounded and its band reaches the upper edge"
    )
    tab.close()


@needs_chromium
def test_gaps_are_gaps_and_huge_ends_do_not_flatten_the_curve(browser: Browser, tmp_path: Path) -> None:
    values = [100.0, 120.0, -5.0, 110.0, 130.0, math.inf, 90.0]
    columns = {"noise/scale": values, "noise/scale_low": [-1.0, 50, 50, 50, 50, 50, math.nan]}
    columns["noise/scale_high"] = [200.0, 1e30, 200, math.nan, 300, math.inf, math.nan]
    tab, wrong = opened(browser, written(tmp_path, run_of(columns)))
    section = chart(tab, "Noise scale")
    until(tab, lambda: section.locator("path.curve").count() == 2)
    assert section.locator("circle.dot").count() == 1
    drawn, y = points(section, 0), ruler(section, "y", log=True)
    np.testing.assert_allclose(y(drawn[:, 1]), [100, 120, 110, 130], rtol=1e-3)
    band = points(section, 0, "band")
    # Steps 0 to 5 have an interval; the last has none.
    assert len(band) == 12
    np.testing.assert_allclose(y(band[:6, 1])[[0, 2, 4]], [200, 200, 300], rtol=1e-3)
    assert np.ptp(band[[1, 3, 5], 1]) == 0
    assert y(band[1, 1]) == pytest.approx(1300, rel=1e-2)
    assert not wrong
    tab.close()


@needs_chromium
def test_values_are_shown_under_the_pointer_and_by_keys(browser: Browser, tmp_path: Path) -> None:
    run = ordinary()
    tab, wrong = opened(browser, written(tmp_path, run))
    section = chart(tab, "Noise scale")
    svg = section.locator(".chart svg")
    until(tab, lambda: svg.locator("path").count() > 1)
    corner = svg.bounding_box()
    assert corner
    outputs = section.locator(".keys output")
    for place in (0, 11, 29):
        tab.mouse.move(corner["x"] + points(section, 0)[place, 0] + 3, corner["y"] + 99)
        value, low, high = (float(run.columns["noise/scale" + end][place]) for end in ("", "_low", "_high"))
        end = "unbounded" if place == 29 else f"{high:.4g}"
        assert outputs.first.inner_text() == f"{value:.4g} ({low:.4g} to {end})"
        assert section.locator(".at").inner_text() == f"step {20 * place}"
        assert outputs.nth(1).inner_text().startswith(f"{value / 9:.4g}"[:4])
    tab.mouse.move(1, 1)
    assert outputs.first.inner_text() == ""
    svg.focus()
    for key, step in (("ArrowRight", 0), ("ArrowRight", 20), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        tab.keyboard.press(key)
        assert section.locator(".at").inner_text() == f"step {step}"
    assert not wrong
    tab.close()


@needs_chromium
def test_a_metric_that_was_not_measured_at_a_step_is_a_dash(browser: Browser, tmp_path: Path) -> None:
    columns = {"distance/a": [1.0, 2.0, 3.0, 4.0, 5.0], "distance/b": [1.0, math.nan, math.nan, math.nan, 9.0]}
    tab, _ = opened(browser, written(tmp_path, run_of(columns)))
    section = chart(tab, "Distance to equilibrium")
    svg = section.locator(".chart svg")
    until(tab, lambda: svg.locator("path").count() > 1)
    # The curve b has no gap: a metric may be measured more rarely than others.
    assert len(points(section, 0)) == 2
    corner = svg.bounding_box()
    assert corner
    tab.mouse.move(corner["x"] + points(section, 1)[1, 0], corner["y"] + 99)
    assert section.locator(".keys bdi").all_text_contents() == ["b", "a"]
    assert section.locator(".keys output").all_text_contents() == ["–", "2"]
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_hostile_names_are_text(browser: Browser, tmp_path: Path, width: int) -> None:
    columns: dict[str, list[float]] = {"noise/scale": [1.0, 2.0]}
    for place, name in enumerate(HOSTILE):
        kinds = ("noise/scale", "charge", "charge_decay", "distance")
        columns |= {f"{kind}/{name}": [1.0, 9.0 - place] for kind in kinds} | {f"plain {name}": [1.0, 2.0]}
    tab, wrong = opened(browser, written(tmp_path, run_of(columns, name=HOSTILE[0])), width)
    until(tab, lambda: tab.locator(".chart text").count() > 20)
    shown = [name.replace("\ud800", "\ufffd") for name in HOSTILE]
    keys = chart(tab, "Charges").locator(".keys bdi").all_text_contents()
    # The charge that moved most is first; the halves of pairs are shown as they are by scripts.
    assert [key.replace("\ud800", "\ufffd") for key in keys] == shown
    options = chart(tab, "Noise scale").locator("option").all_text_contents()
    assert [option.replace("\ud800", "\ufffd") for option in options[1:]] == shown
    assert tab.locator("img").count() == 0
    assert tab.title() == f"noetherflow: {HOSTILE[0]}"
    assert tab.inner_text("h1") == f"{HOSTILE[0]}: what training did"
    assert HOSTILE[0] in tab.inner_text("main table")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong
    tab.close()


@needs_chromium
def test_faults_of_the_page_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """The twins: names that become HTML, and a request to another address."""
    path = written(tmp_path, run_of({f"charge/{HOSTILE[0]}": [1.0, 2.0]}))
    text = path.read_text()
    assert text.count("  node.textContent = content;\n  if (kind)") == 1
    path.write_text(
        text.replace("  node.textContent = content;\n  if (kind)", "  node.innerHTML = content;\n  if (kind)")
    )
    tab, wrong = opened(browser, path)
    tab.wait_for_timeout(200)
    assert tab.locator("img").count() > 0
    assert wrong
    tab.close()
    path.write_text(text.replace("</main>", '<img src="https://example.org/x.png"></main>'))
    tab, wrong = opened(browser, path)
    assert any("Content Security Policy" in line for line in wrong)
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_hundreds_of_symmetries_and_thousands_of_steps_stay_quick(browser: Browser, tmp_path: Path, width: int) -> None:
    run = ordinary(symmetries=300, count=3000, layers=100)
    path = written(tmp_path, run)
    assert path.stat().st_size < 20e6
    tab, wrong = opened(browser, path, width)
    until(tab, lambda: tab.locator(".chart text").count() > 20)
    # A third of the nodes are cells of the tables, and an eighth are options.
    assert tab.evaluate("document.querySelectorAll('*').length") < 12_000
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    section = chart(tab, "Charges")
    assert section.locator(".keys bdi").all_text_contents() == [f"s{k}" for k in range(299, 293, -1)]
    assert section.locator("option").count() == 301
    assert len(points(section, 0)) <= 602
    script = """(all) => { const start = performance.now(); const select = all[0]; select.selectedIndex = 300;
      select.dispatchEvent(new Event('change')); document.body.offsetHeight; return performance.now() - start; }"""
    assert section.locator("select").evaluate_all(script) < 500
    assert section.locator(".keys bdi").all_text_contents() == ["s0"]
    assert section.locator("path.curve").count() == 1
    tables = tab.locator("details")
    assert tables.evaluate_all("all => all.map((d) => [d.open, d.querySelectorAll('tbody tr').length])") == [
        [False, 100],
        [False, 300],
    ]
    assert not wrong
    tab.close()


@needs_chromium
def test_a_record_of_a_single_step_and_constant_curves_have_a_page(browser: Browser, tmp_path: Path) -> None:
    for columns in (
        {"noise/scale": [3.0], "charge/a": [0.0], "x": [1e-300]},
        {"noise/scale": [3.0, 3.0], "charge/a": [0.0, 0.0], "x": [1e300, -1e300]},
        {"noise/scale": [math.inf, -1.0], "noise/scale_low": [math.nan, 0.0], "charge/a": [math.inf, 1.0]},
    ):
        tab, wrong = opened(browser, written(tmp_path, run_of(columns)))
        until(tab, lambda tab=tab: tab.locator(".chart text").count() > 2)
        # What is not finite would be a path or a number that says NaN.
        assert "NaN" not in tab.locator("#charts").inner_html()
        assert "Infinity" not in tab.locator("#charts").inner_html()
        assert not wrong
        tab.close()

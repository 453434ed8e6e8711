"""The report page in Chromium."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from playwright.sync_api import Browser

from chromium import CONTRAST, needs_chromium, opened, until
from fake_experiments import Fake, install
from noetherflow.paper import experiment, page, runner, style
from noetherflow.paper.claim import Claim

STEPS = torch.arange(1.0, 50.0)


def draw(figure: Figure) -> None:
    """Draw two panels of curves."""
    growth, decay = figure.subplots(1, 2)
    growth.plot(STEPS, STEPS[:, None] + torch.arange(4.0), color="blue", label=["SGD", None, None, None])
    growth.plot(STEPS, STEPS, **style.PREDICTED, label="theory")
    growth.plot([1.0, 2.0, 5.0], [30.0, float("nan"), 4.0], "o", label="late")
    growth.set(title="growth", xlabel="steps", ylabel="$C^2$")
    decay.plot(STEPS, (-STEPS).exp(), label="SGD")
    decay.set(title="decay", xlabel="steps", ylabel="</script><b>distance", xscale="log", yscale="log")


def report(out: Path) -> Path:
    configs = experiment.configure(experiment.choose([]), quick=True, seed=None, overrides=[])
    for ending in runner.run(configs, out, quick=True):
        assert ending.name == "f3" or ending.result is not None, ending
    return out / "report.html"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with an interactive figure f1, an SVG figure f2 with failed claims, and an experiment f3 that raised."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        many = tuple(Claim(f"claim {number} of {'long' * 9}", 0.0, 10.0**-number, high=1.0) for number in range(9))
        failed = Claim("<i>less</i> & less", predicted=float("inf"), measured=0.0421, low=0.5, error=0.003)
        install(
            monkeypatch,
            f1=Fake(draw=draw, extra=many),
            f2=Fake(extra=(failed, Claim("no number", 1.0, float("nan"), low=0.0))),
            f3=Fake(error=ZeroDivisionError("by <b>nothing</b>")),
        )
        return report(tmp_path_factory.mktemp("report"))


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_figure_is_drawn_and_readable(browser: Browser, written: Path, width: int, scheme: str) -> None:
    tab, wrong = opened(browser, written, width, scheme)
    tab.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    assert tab.locator("section").count() == 2
    for figure in [*tab.locator(".panel .main-svg").all(), *tab.locator(".scroll > svg").all()]:
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] > 250
        assert box["height"] > 100
        assert box["x"] + box["width"] <= width
    assert tab.locator(".panel .scatterlayer .trace").count() == 4 + 2 + 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 60
    assert not [ratio for ratio in ratios if ratio[0] < 4.5]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert not wrong
    tab.close()


@needs_chromium
def test_a_failed_claim_shows_its_number_and_the_filter_selects_it(browser: Browser, written: Path) -> None:
    tab, wrong = opened(browser, written)
    assert "2 of 13 claims FAIL" in tab.inner_text("header")
    assert "<i>less</i> & less: FAILS with 0.042 ± 0.003, not in >= 0.5" in tab.inner_text("header").replace(
        "0.0421", "0.042"
    )
    rows = tab.locator("#verdicts tbody tr:visible")
    assert rows.count() == 13
    tab.check("#only-failed")
    assert rows.count() == 2
    assert "FAILS with 0.0421 ± 0.003" in rows.first.inner_text()
    assert "FAILS with nan" in rows.last.inner_text()
    assert "ZeroDivisionError: by <b>nothing</b>" in tab.inner_text("header")
    assert not wrong
    tab.close()


@needs_chromium
def test_the_table_sorts_by_number_in_both_directions(browser: Browser, written: Path) -> None:
    tab, _ = opened(browser, written)
    cells = "all => all.map((row) => row.cells[3].dataset.sort)"
    for direction, extreme in (("ascending", 1e-8), ("descending", 1.0)):
        tab.click("th button:text('measured')")
        assert tab.get_attribute("th:nth-child(4)", "aria-sort") == direction
        numbers = [float(text) for text in tab.locator("#verdicts tbody tr").evaluate_all(cells)]
        numbers = [number for number in numbers if number == number]
        assert numbers[0] == pytest.approx(extreme)
        assert numbers == sorted(numbers, reverse=direction == "descending")
    tab.close()


@needs_chromium
def test_the_pointer_shows_a_value_and_a_legend_entry_hides_all_replicas(browser: Browser, written: Path) -> None:
    tab, wrong = opened(browser, written)
    panel = tab.locator(".panel").first
    panel.scroll_into_view_if_needed()
    point = panel.locator(".points path").first.bounding_box()
    assert point is not None
    tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    panel.locator(".hovertext").wait_for()
    shown = panel.locator(".hovertext").text_content() or ""
    assert "late" in shown
    assert "1.000, 30.00" in shown
    legend = panel.locator(".legend .traces")
    assert legend.count() == 3  # four replicas share a legend entry
    panel.locator(".legendtoggle").first.click()
    until(tab, lambda: panel.locator(".scatterlayer .trace").count() == 2)
    # Zooming changes what the axis shows.
    before = panel.locator(".xtick").all_text_contents()
    area = panel.locator(".nsewdrag").bounding_box()
    assert area is not None
    tab.mouse.move(area["x"] + 0.2 * area["width"], area["y"] + 0.2 * area["height"])
    tab.mouse.down()
    tab.mouse.move(area["x"] + 0.3 * area["width"], area["y"] + 0.8 * area["height"], steps=4)
    tab.mouse.up()
    until(tab, lambda: panel.locator(".xtick").all_text_contents() != before)
    assert not wrong
    tab.close()


@needs_chromium
def test_a_picture_can_be_enlarged_without_widening_the_page(browser: Browser, written: Path) -> None:
    tab, _ = opened(browser, written, width=400)
    small = tab.locator(".scroll > svg").bounding_box()
    tab.check(".picture input")
    large = tab.locator(".scroll > svg").bounding_box()
    assert small is not None
    assert large is not None
    assert large["width"] > 2.5 * small["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.close()


@needs_chromium
def test_an_error_in_the_page_is_noticed(browser: Browser, written: Path, tmp_path: Path) -> None:
    """The twin of every `assert not wrong`: a request to another address, and a script that raises."""
    broken = tmp_path / "report.html"
    faults = '<img src="https://example.org/x.png"><script>missing()</script></body>'
    broken.write_text(written.read_text().replace("</body>", faults))
    tab, wrong = opened(browser, broken)
    assert any("Content Security Policy" in text for text in wrong)
    assert any("missing is not defined" in text for text in wrong)
    tab.close()


@needs_chromium
def test_without_plotly_the_page_shows_svg_figures(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "plotly", lambda: "")
    install(monkeypatch, f1=Fake(draw=draw), f2=Fake())
    path = report(tmp_path)
    assert path.stat().st_size < 500_000
    tab, wrong = opened(browser, path)
    assert tab.locator(".scroll > svg").count() == 2
    assert tab.locator(".panel").count() == 0
    assert not wrong
    tab.close()


def test_the_page_contains_plotly_once(written: Path) -> None:
    assert written.read_text().count("plotly.js v") == 1
    assert page.plotly()


def test_the_page_refers_to_no_external_address(written: Path) -> None:
    text = written.read_text().replace(page.plotly(), "")
    assert not re.search(r"""\b(src|href)=["'](?!#|data:)""", text)
    assert "@import" not in text


def test_ids_of_two_svg_figures_differ(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plotly", lambda: "")
    install(monkeypatch, f1=Fake(), f2=Fake())
    text = report(tmp_path).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', text)
    assert used
    assert set(used) <= set(ids)

"""The page of a forecast in Chromium, and its JSON file."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import noetherflow as nf
from chromium import CONTRAST, needs_chromium, opened, until
from noetherflow.forecasting.estimate import Change, unknown
from noetherflow.forecasting.schedule import Need, Warmup
from noetherflow.report import forecast as page
from noetherflow.report import forecast_words
from some_forecasts import SCHEDULE, change, norm, ordinary, small
from test_analysis_page import HOSTILE
from test_watch_page import points, ruler


def written(folder: Path, forecast: nf.Forecast, name: str = "model") -> Path:
    path = folder / "page.html"
    page.write(path, forecast, name)
    return path


def cells(tab: Page, first: str) -> list[str]:
    """The cells of the rows whose first cell has a text, without messages."""
    row = tab.locator("main tr").filter(has=tab.locator(f"td:first-child bdi:text-is('{first}')"))
    return row.locator("td bdi").all_text_contents()[1:]


def named(tab: Page) -> list[str]:
    return tab.locator("table.sortable tbody td:first-child bdi").all_text_contents()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_is_readable(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    tab, wrong = opened(browser, written(tmp_path, ordinary()), width, scheme)
    until(tab, lambda: tab.locator(".chart text").count() > 4)
    tab.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.body.scrollWidth") <= width
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 60
    assert not [ratio for ratio in ratios if ratio[0] < 4.5]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    head = tab.inner_text("header")
    assert "The model flattens: Tr H x 0.575 ± 0.0027, half of it within 1,234 steps." in head
    assert "A warmup is needed: the learning rate is unstable now and stable at the equilibrium" in head
    assert "The warmup takes 1,000 steps." in head
    assert "the pooler <b>is not used</b> by the loss" in head
    main = tab.inner_text("main")
    assert "the second <i>assumption</i>" in main
    assert "weight_decay" in main
    assert "torch" in main
    assert not wrong
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_cells_hold_the_numbers_with_their_errors(browser: Browser, tmp_path: Path, width: int) -> None:
    tab, wrong = opened(browser, written(tmp_path, ordinary()), width)
    assert cells(tab, "Tr H") == ["207 ± 0.56", "119 ± 0.56", "0.5749 ± 0.0027"]
    assert cells(tab, "critical sharpness 2 / lr_c") == ["9 ± 0.03", "3 ± 0.03", "0.3333 ± 0.0033"]
    assert cells(tab, "largest stable step, no noise") == ["0.02 ± 0.001", "0.25 ± 0.001", "12.5 ± 0.05"]
    assert cells(tab, "first.weight") == ["10 ± 0.56", "20 ± 0.56", "2 ± 0.056"]
    # An error of zero, and an error of which a part is not known.
    assert cells(tab, "second.weight") == ["-3", "-1", "0.3333"]
    assert cells(tab, "third.weight")[0] == "200 ± 0.5"
    assert cells(tab, "norm.scale")[:5] == ["2", "3", "-", "0.025", "0.0111"]
    messages = tab.locator(".message").all_text_contents()
    assert messages[0] == "± 0.5 of the method, ± 0.25 of the sample"
    # Tr H and a parameter, three numbers each; not where a part is zero, unknown or too small to count.
    assert len(messages) == 6
    assert "steps to half of the change\n1,234 ± 57" in tab.inner_text("dl >> nth=0")
    points_of_it = tab.locator("details").filter(has_text="Points of the schedule").locator("tbody tr")
    assert [row.split() for row in points_of_it.all_text_contents()] == [
        ["00.01"],
        ["1000.02"],
        ["3000.05"],
        ["1,0000.1"],
    ]
    assert not wrong
    tab.close()


@needs_chromium
def test_a_number_that_cannot_be_told_has_its_reason(browser: Browser, tmp_path: Path) -> None:
    tab, _ = opened(browser, written(tmp_path, ordinary()))
    assert cells(tab, "largest eigenvalue of H *") == ["cannot be told"] * 3
    assert cells(tab, "largest stable step, with noise *") == ["0.015 ± 0.001", "cannot be told", "cannot be told"]
    reasons = tab.locator("main p.note").all_text_contents()
    assert "* largest eigenvalue of H: an operation has no second derivative (<b>roll</b>)" in reasons
    assert "* largest stable step, with noise: no point to go to" in reasons
    assert "* fourth.bias: an operation has no second derivative (<b>roll</b>)" in reasons
    tab.close()
    # Nothing can be told: a reason each, shared by all numbers.
    none = Change(*[unknown("no equilibrium")] * 3)
    fields = dict.fromkeys(("trace", "largest", "critical", "stable_step", "noisy_step"), none)
    lost = ordinary(
        **fields,
        blocks={"a": none, "b": none},
        half_steps=unknown("there is no way"),
        warmup=Warmup(Need.UNKNOWN, (), "no limit is known"),
    )
    tab, wrong = opened(browser, written(tmp_path, lost))
    assert "What becomes of the sharpness cannot be told: no equilibrium." in tab.inner_text("header")
    assert "Whether a warmup is needed cannot be told: no limit is known." in tab.inner_text("header")
    reasons = tab.locator("main p.note").all_text_contents()
    # The head of the page has the reason, and the page refers to it.
    assert not any("no equilibrium" in reason for reason in reasons)
    assert any(reason.startswith("* Tr H, largest eigenvalue") and reason.endswith(": see above") for reason in reasons)
    assert "Tr H of the parameters cannot be told: see above." in reasons
    assert "cannot be told: there is no way" in tab.inner_text("dl >> nth=0")
    assert tab.locator("#charts section").count() == 0
    assert "NaN" not in tab.inner_text("body")
    assert "nan" not in tab.inner_text("main")
    assert not wrong
    tab.close()


@needs_chromium
def test_the_schedule_is_drawn_to_scale(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, ordinary()))
    section = tab.locator("#charts section")
    until(tab, lambda: section.locator("path.curve").count() == 1)
    x, y, drawn = ruler(section, "x"), ruler(section, "y"), points(section, 0)
    steps, rates = np.array(SCHEDULE).T
    np.testing.assert_allclose(x(drawn[:, 0]), steps, atol=0.1)
    np.testing.assert_allclose(y(drawn[:, 1]), rates, atol=1e-5)
    with pytest.raises(AssertionError):  # The twin: the learning rate of the next point.
        np.testing.assert_allclose(y(drawn[:, 1]), np.roll(rates, 1), atol=1e-5)
    assert not wrong
    tab.close()


@needs_chromium
def test_parameters_are_sorted_by_their_numbers(browser: Browser, tmp_path: Path) -> None:
    tab, wrong = opened(browser, written(tmp_path, ordinary()))
    names = {"1": "first.weight", "2": "second.weight", "3": "third.weight", "4": "fourth.bias *"}
    assert named(tab) == [names[k] for k in "3124"]
    for heading, ascending, descending in (("now", "2134", "3124"), ("ratio", "2314", "1324")):
        for order in (ascending, descending):
            tab.click(f"table.sortable th button:text-is('{heading}')")
            # A number that cannot be told stays at the end.
            assert named(tab) == [names[k] for k in order]
    assert not wrong
    tab.close()


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_hostile_names_are_text(browser: Browser, tmp_path: Path, width: int) -> None:
    none = Change(*[unknown(HOSTILE[0])] * 3)
    forecast = ordinary(
        blocks={name: change(10.0 - k, 1.0, 0.1) for k, name in enumerate(HOSTILE)} | {f"unknown {HOSTILE[0]}": none},
        norms={name: norm([1.0], [2.0]) for name in HOSTILE},
        half_steps=unknown(HOSTILE[0]),
        warmup=Warmup(Need.WARMUP, SCHEDULE, HOSTILE[0]),
        assumptions=HOSTILE,
        notes=HOSTILE,
    )
    tab, wrong = opened(browser, written(tmp_path, forecast, HOSTILE[0]), width)
    until(tab, lambda: tab.locator(".chart text").count() > 4)
    assert named(tab)[:2] == list(HOSTILE[:2])
    assert named(tab)[-1] == f"unknown {HOSTILE[0]} *"
    assert tab.locator("img").count() == 0
    assert tab.title() == f"noetherflow: {HOSTILE[0]}"
    assert tab.inner_text("h1") == f"{HOSTILE[0]}: what becomes of the sharpness"
    # As a name five times, and as a reason in the head, to which the page refers.
    assert tab.inner_text("body").count(HOSTILE[0]) >= 6
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not wrong
    tab.close()


@needs_chromium
def test_faults_of_the_page_are_noticed(browser: Browser, tmp_path: Path) -> None:
    """The twins: a name that becomes HTML, a request to another address, a table that is too wide."""
    path = written(tmp_path, ordinary(blocks={"img": change(1.0, 2.0)}))
    text = path.read_text()
    path.write_text(text.replace("<bdi>img</bdi>", f"<bdi>{HOSTILE[0]}</bdi>"))
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
@pytest.mark.parametrize("width", [400, 1400])
def test_a_thousand_parameters_are_folded(browser: Browser, tmp_path: Path, width: int) -> None:
    blocks = {f"model.layers.{k}.attention.weight": change(1.0 + k * 7919 % 1000, 1.0, 0.5) for k in range(1000)}
    tab, wrong = opened(browser, written(tmp_path, ordinary(blocks=blocks)), width)
    table = tab.locator("details").filter(has=tab.locator("table.sortable"))
    assert table.get_attribute("open") is None
    assert table.locator("summary").inner_text() == "Tr H by parameter, from random vectors (1,000)"
    table.locator("summary").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    script = """all => { const start = performance.now(); all[1].click(); document.body.offsetHeight;
      return performance.now() - start; }"""
    assert tab.locator("table.sortable th button").evaluate_all(script) < 1000
    assert named(tab)[:2] == [f"model.layers.{k}.attention.weight" for k in (0, pow(7919, -1, 1000))]
    assert not wrong
    tab.close()


@needs_chromium
def test_a_real_forecast_is_shown(browser: Browser, tmp_path: Path) -> None:
    forecast = small()
    tab, wrong = opened(browser, written(tmp_path, forecast))
    assert cells(tab, "Tr H")[0].startswith(f"{forecast.trace.now.value:.4g} ± ")
    assert sorted(named(tab)) == sorted(forecast.blocks)
    assert forecast.sentence.replace("+-", "±") in tab.inner_text("header")
    assert "No warmup is needed: the learning rate is stable" in tab.inner_text("header")
    assert tab.locator("#charts section").count() == 0
    assert not wrong
    tab.close()


class Told(NamedTuple):
    """A part of a forecast that says what it is."""

    value: float

    def __str__(self) -> str:
        return f"the loss falls by {self.value} +- 1"


def test_a_further_part_is_a_sentence_and_in_the_json_file() -> None:
    wider: Any = dataclasses.make_dataclass(
        "Wider", [("further_motion", Told, Told(3.5))], bases=(nf.Forecast,), frozen=True
    )
    plain = ordinary()
    forecast = wider(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    further = [text for text in forecast_words.sentences(forecast) if text not in forecast_words.sentences(plain)]
    assert further == ["Further motion: the loss falls by 3.5 ± 1."]
    assert forecast.to_json()["further_motion"] == {"value": 3.5}


def test_the_json_file_has_every_field_and_no_number_that_is_none(tmp_path: Path) -> None:
    forecast = ordinary()
    forecast.save_json(tmp_path / "forecast.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads((tmp_path / "forecast.json").read_text(), parse_constant=refuse)
    assert {field.name for field in dataclasses.fields(forecast)} <= content.keys()
    assert content["trace"]["now"] == {"value": 207.0, "error": 0.5, "sampling": 0.25, "why": ""}
    assert content["blocks"]["third.weight"]["then"]["sampling"] is None
    assert content["largest"]["ratio"] == {
        "value": None,
        "error": None,
        "sampling": None,
        "why": "an operation has no second derivative (<b>roll</b>)",
    }
    assert content["warmup"]["need"] == "warmup"
    assert content["warmup"]["schedule"] == [list(point) for point in SCHEDULE]
    assert content["norms"]["norm.scale"]["then"] == [2.0, 3.0, None]
    assert content["status"] == "converged"
    assert content["settings"]["optimizer"] == "SGD"
    assert content["settings"]["weight_decay"] == 1e-3
    assert content["sentence"] == forecast.sentence
    assert content["versions"]["torch"]
    assert forecast.to_json() == content
    # The twin: NaN, which JSON does not know, would be refused.
    assert math.isnan(forecast.largest.now.value)
    with pytest.raises(AssertionError, match="NaN"):
        json.loads(json.dumps(forecast.largest.now.value), parse_constant=refuse)


def test_a_page_that_cannot_be_written_is_an_error_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(nf.FileError, match=r"cannot be written: .*check the path"):
        page.write(tmp_path / "file" / "page.html", small(), "model")

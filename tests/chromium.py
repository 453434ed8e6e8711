"""A page in Chromium: what a reader sees, and what a page must not do."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: none of chromium, chromium-browser, google-chrome is installed"
)

# Contrast ratio of text and background as WCAG defines the ratio; WCAG asks for 4.5 or more.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => parse(text).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      const alpha = parse(colour)[3];
      if (alpha === undefined || alpha > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const ratios = [];
  for (const node of document.querySelectorAll("h1, h2, h2 span, p, li, a, td, td span, td strong, th button, label, "
      + "summary, pre, dt, dd, .panel text, .distances text, .chart text, figcaption, output, .message")) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.tagName === "text" ? style.fill : style.color), light(ground(node))];
    ratios.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.tagName, node.textContent.slice(0, 40)]);
  }
  return ratios;
}"""


def launched() -> Iterator[Browser]:
    """A browser, for a fixture."""
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser: Browser, path: Path, width: int = 1400, scheme: Any = "light") -> tuple[Page, list[str]]:
    """Open a page; returns the page and a list that collects errors, warnings and requests to other addresses."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("requestfailed", lambda request: wrong.append(request.url))
    local = (path.as_uri(), "data:", "blob:")
    tab.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    tab.goto(path.as_uri())
    return tab, wrong


def until(tab: Page, condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition. `Page.wait_for_function` evaluates text, which the policy of the page blocks."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        tab.wait_for_timeout(50)

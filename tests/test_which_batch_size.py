"""The page on batch sizes: its tables are the stored measurements, its sentences hold, and the fit is a fit."""

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study as page_of_study
import which_batch_size as study

RESULTS: dict[str, Any] = json.loads(study.OUT.read_text("utf-8"))


def shown() -> str:
    return page_of_study.shown(study.PAGE)


def scale(kind: str, key: str) -> float:
    return statistics.fmean(row[key] for row in RESULTS["watched"] if row["optimizer"] == kind)


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    assert shown() == study.table(RESULTS)
    changed = copy.deepcopy(RESULTS)
    changed["rows"][0]["steps"][0] *= 2
    assert shown() != study.table(changed)


def test_the_sentences_of_the_page_hold() -> None:
    fits = RESULTS["fits"]
    assert fits["SGD"]["critical"] / scale("SGD", "scale") == pytest.approx(1.7, abs=0.05)
    assert fits["AdamW"]["critical"] / scale("AdamW", "adapted") == pytest.approx(1.9, abs=0.06)
    assert fits["AdamW"]["critical"] / scale("AdamW", "scale") == pytest.approx(3, abs=0.2)
    assert fits["AdamW"]["critical"] / fits["SGD"]["critical"] == pytest.approx(5, abs=0.2)
    rates = {row["batch"]: row["lr"] for row in RESULTS["rows"] if row["optimizer"] == "SGD"}
    assert rates[512] / rates[8] == pytest.approx(4)
    assert [f"{curve['rms']:.0%}" for curve in fits.values()] == ["6%", "7%"]


def test_the_fit_finds_a_planted_critical_batch_size() -> None:
    rows = [{"batch": size, "steps": [50 * (1 + 70 / size)]} for size in study.SIZES]
    fitted = study.fit(rows)
    assert fitted["critical"] == pytest.approx(70, rel=1e-6)
    assert fitted["fewest"] == pytest.approx(50, rel=1e-6)
    assert fitted["rms"] < 1e-9
    rows[0]["steps"] = [1000]
    assert study.fit(rows)["rms"] > 0.02


def test_a_run_reaches_the_loss_and_is_watched() -> None:
    steps, watch = study.steps_to_loss("SGD", 64, 0.9, seed=0, watch=True)
    assert steps == pytest.approx(study.steps_to_loss("SGD", 64, 0.9, seed=0)[0], rel=0.2)
    assert watch.estimate.low < watch.estimate.scale < watch.estimate.high

"""The page on warmup: its tables are the stored measurements, its sentences hold, and what measures is right."""

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from cases import squared_error
from noetherflow.forecasting.schedule import Need, Warmup
from noetherflow.linear import two_layer_sharpness

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import study as page_of_study
import warmup_helps as study
from warming.case import State, case, recommended, schedule, summary
from warming.linear import F4, of_f4
from warming.normalised import Normalised

RESULTS: dict[str, Any] = json.loads(study.OUT.read_text("utf-8"))
SAID = {result["case"]: summary(result) for result in RESULTS["cases"]}


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    shown = page_of_study.shown(study.PAGE)
    assert shown == study.table(RESULTS)
    changed = copy.deepcopy(RESULTS)
    changed["cases"][0]["rows"][0]["with"] *= 1.1
    assert shown != study.table(changed)


def test_the_problems_of_the_page_are_those_of_the_study() -> None:
    assert [result["case"] for result in RESULTS["cases"]] == [problem.name for problem in problems()]


def problems() -> list[F4 | Normalised]:
    from warming.normalised import of_normalised

    return [*of_f4(), *of_normalised()]

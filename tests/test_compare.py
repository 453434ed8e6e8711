"""The page on other packages: its numbers are those of benchmarks/compare.py, and what it says of ours holds."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import noetherflow as nf
import pages
from cases import cross_entropy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-it-compares.md").read_text("utf-8")
RIVALS = all(importlib.util.find_spec(name) for name in ("backpack", "opacus"))


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare")


def shown() -> str:
    """What the page shows of the program's output."""
    (text,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def column(name: str) -> dict[str, str]:
    """A column of the first table of the page, by model."""
    lines = shown().splitlines()[1:]
    start = lines[0].index(name)
    following = [lines[0].index(other) for other in ("estimate_noise", "BackPACK") if lines[0].index(other) > start]
    width = lines[0].index("NoiseMeter")
    rows = lines[2 : lines.index("")]
    return {line[:width].strip(): line[start : min(following)].strip() for line in rows}


def test_what_noetherflow_covers_is_what_the_page_says(compare: ModuleType) -> None:
    answers = compare.coverage(list(compare.OURS))
    for method in compare.OURS:
        assert {model: row[method] for model, row in answers.items()} == column(method)
    assert sum(row["NoiseMeter"] == "exact" for row in answers.values()) == 8


def test_noise_is_that_of_single_examples(compare: ModuleType) -> None:
    ours = {name: row["noetherflow"] for name, row in compare.quantities().items() if "noetherflow" in row}
    assert len(ours) == 3
    assert max(ours.values()) < 1e-12


def test_a_method_that_is_wrong_incomplete_or_refuses_is_told(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = compare.models()["linear layers"]
    right = compare.one_by_one(subject)
    assert compare.answer("NoiseMeter", subject, right) == "exact"
    assert compare.answer("NoiseMeter", subject, right / 1.25) == "off by 25%"
    incomplete = compare.Way(lambda: None, lambda: right, missing=lambda: "2 of 4 parameters, those of X, are left out")
    monkeypatch.setitem(compare.METHODS, "NoiseMeter", lambda built: incomplete)
    assert compare.answer("NoiseMeter", subject, right) == "lacks 2 of 4 parameters"
    monkeypatch.setitem(compare.METHODS, "NoiseMeter", {}.__getitem__)
    assert compare.answer("NoiseMeter", subject, right) == "KeyError"


@pytest.mark.skipif(not RIVALS, reason="BackPACK and Opacus come with make bench")
def test_the_page_shows_what_the_program_prints() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ.copy())
    assert not pages.differences(shown(), done.stdout)


def test_translations_in_front_of_softmax_are_not_found() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batch = (torch.randn(6, 3).double(), torch.randint(4, (6,)))
    assert nf.find_symmetries(model, cross_entropy, batch) == {}
    moved = nn.Linear(3, 4).double()
    moved.load_state_dict({"weight": model.weight + 0.7, "bias": model.bias - 0.2})
    torch.testing.assert_close(cross_entropy(moved, batch), cross_entropy(model, batch))


def test_gradients_of_single_examples_and_curvature_matrices_are_not_offered() -> None:
    offered = {name.lower() for name in nf.__all__} | {
        name for name in dir(nf.NoiseMoments) if not name.startswith("_")
    }
    assert not {name for name in offered if re.search("hessian|curvature|fisher|per_example|norms", name)}


def test_the_tests_and_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`((?:tests|benchmarks)/\w+\.py)`", PAGE))
    assert len(named) > 6
    assert all((ROOT / name).is_file() for name in named)

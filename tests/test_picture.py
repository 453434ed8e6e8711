"""The picture of README is drawn from a run, small, and shows what README says of it."""

import importlib
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("picture")


def test_a_short_run_starts_where_the_picture_does_and_ends_nearer(picture, tmp_path: Path) -> None:
    curves = picture.measured(2000, 3000)
    start, end = curves.charges[0] - curves.predicted, curves.charges[-1] - curves.predicted
    # More in the first layer, as trained, more in the second layer; and the model that was moved is there already.
    assert start[0] > 1 > -1 > start[2]
    assert float(start[3].abs()) < 1e-9
    assert (end[:3].abs() < start[:3].abs()).all()
    # exp(-steps / relaxation time) of the distance is left near the equilibrium. At these distances more is left on the
    # upper side and less on the lower: the geometric mean of both is free of what is odd in the distance.
    left = math.sqrt(end[0] / start[0] * end[2] / start[2])
    assert left == pytest.approx(math.exp(-3000 / curves.relaxation), abs=0.05)
    assert left != pytest.approx(math.exp(-2 * 3000 / curves.relaxation), abs=0.05)
    for file in ("first.svg", "second.svg"):
        picture.draw(curves, tmp_path / file)
    drawn = (tmp_path / "first.svg").read_bytes()
    assert drawn == (tmp_path / "second.svg").read_bytes()
    assert len(drawn) < 30_000
    assert all(label in drawn.decode() for label in picture.COURSES)


def test_the_committed_picture_has_the_labels_and_no_date(picture) -> None:
    drawn = (ROOT / "docs" / "balance.svg").read_text("utf-8")
    assert all(label in drawn for label in picture.COURSES)
    assert not re.search(r"<dc:date>", drawn)
    for page in ("README.md", "docs/index.md"):
        assert "balance.svg)" in (ROOT / page).read_text("utf-8")

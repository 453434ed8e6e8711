"""Tests that share something expensive run in one process."""

import pytest

from conftest import group_of


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tests/test_paper.py::test_every_claim_holds[f5]", "tests/test_paper_faults.py::test_in_the_noise[f5-2.0]"),
        ("tests/test_paper.py::test_every_claim_holds[f5]", "tests/test_paper_faults.py::test_in_the_noise[0.5-f5]"),
        ("tests/test_page.py::test_a_browser", "tests/test_page.py::test_another[light-400]"),
    ],
)
def test_tests_of_one_experiment_or_of_one_file_are_together(first: str, second: str) -> None:
    assert group_of(first) == group_of(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tests/test_paper.py::test_every_claim_holds[f5]", "tests/test_paper.py::test_every_claim_holds[f6]"),
        ("tests/test_paper.py::test_overrides", "tests/test_paper.py::test_a_band"),
        ("tests/test_spd.py::test_a_root[f5]", "tests/test_spd.py::test_a_mean[f5]"),
    ],
)
def test_other_tests_go_wherever_there_is_time(first: str, second: str) -> None:
    assert group_of(first) != group_of(second)

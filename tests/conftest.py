"""What holds for every test, and which tests share a process."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch

# The models are tiny: a second thread gains nothing, and waiting for it costs a great deal where a core is taken.
torch.set_num_threads(1)
# Files whose tests share what takes seconds: a browser, a pair of processes, imports.
TOGETHER = {"test_page.py", "test_analysis_page.py", "test_forecast_page.py", "test_ranks.py", "test_hugging_face.py"}
# No doctests here: the collector would import the file a second time, under another name, and define its class, or its
# device, twice.
collect_ignore = ["measures_halves.py", "pretended.py"]
FIGURE = re.compile(r"[\[-](f\d+)[\]-]")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw from the global generator draw the same numbers every time and in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once for the tests of a file."""
    from chromium import launched

    yield from launched()


def group_of(node: str) -> str:
    """The group of a test by its node id: its file, the experiment of the paper that it looks at, or the test alone."""
    file = PurePosixPath(node.partition("::")[0]).name
    figure = FIGURE.search(node) if file.startswith("test_paper") else None
    return file if file in TOGETHER else f"{figure[1]} of the paper" if figure else node


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, the tests of a group run in one process, which makes what they share once.

    The marker `xdist_group` would say so as well, but xdist 3.8 does not see it with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Grouped(config, log)

"""What holds for every test, and which tests share a process."""

import pytest
import torch

# The models are tiny: a second thread gains nothing, and waiting for it costs a great deal where a core is taken.
torch.set_num_threads(1)
# Fixtures that take seconds to make, by the group of the tests that use them.
SHARED = {"browser": "browser", "written": "browser", "seen": "ranks"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw from the global generator draw the same numbers every time and in any order."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`, tests of one group run in one process, which makes what they share once."""
    for item in items:
        group = group_of(item)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def group_of(item: pytest.Item) -> str | None:
    """The group of a test: by a fixture that it uses, or by the experiment of the paper that it looks at."""
    if item.path.stem.startswith("test_paper"):
        callspec = getattr(item, "callspec", None)
        return f"paper {callspec.params['name']}" if callspec and "name" in callspec.params else None
    return next((SHARED[name] for name in getattr(item, "fixturenames", ()) if name in SHARED), None)

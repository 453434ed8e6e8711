"""What holds for every test."""

import pytest
import torch

# The models are tiny: a second thread gains nothing, and waiting for it costs a great deal where a core is taken.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw from the global generator draw the same numbers every time and in any order."""
    torch.manual_seed(0)

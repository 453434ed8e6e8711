"""Every experiment of the paper, run once at its reduced size and shared by the tests."""

from functools import cache
from typing import Any

from noetherflow.paper import experiment


@cache
def outcome(name: str) -> tuple[Any, Any]:
    """Settings, and what the run returned."""
    module = experiment.load(name)
    config = module.Config.quick()
    return config, module.run(config)

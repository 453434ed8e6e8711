"""All linear generators of a small model, numerically, and a comparison with the finder."""

from noetherflow.discover.blocks import Blocks, discover_blocks
from noetherflow.discover.completeness import Completeness, check_completeness
from noetherflow.discover.generators import Discovery, discover_generators
from noetherflow.discover.rescalings import Rescalings, discover_rescalings

__all__ = [
    "Blocks",
    "Completeness",
    "Discovery",
    "Rescalings",
    "check_completeness",
    "discover_blocks",
    "discover_generators",
    "discover_rescalings",
]

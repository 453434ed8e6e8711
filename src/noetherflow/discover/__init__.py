"""All linear generators of a small model, and whether what was found is all there is."""

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

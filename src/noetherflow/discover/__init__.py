"""All linear generators of a small model, and whether what was found is all there is."""

from noetherflow.discover.completeness import Completeness, check_completeness
from noetherflow.discover.generators import Discovery, discover_generators

__all__ = ["Completeness", "Discovery", "check_completeness", "discover_generators"]

"""The settings of optimizers, and what a solver needs to know of them."""

from noetherflow.optimizers.adamw import AdamW
from noetherflow.optimizers.base import Optimizer, Terms
from noetherflow.optimizers.given import require_settings, require_sgd
from noetherflow.optimizers.sgd import SGD

__all__ = ["SGD", "AdamW", "Optimizer", "Terms", "require_settings", "require_sgd"]

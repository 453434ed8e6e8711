"""What an example's gradient of each kind of operation is made of: a file for each kind, in a table by function."""

from noetherflow.noise.ops import attention, convolution, elementwise, embedding, experts, linear, normalisation, other
from noetherflow.noise.ops.registry import RULES, gradient_rule

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "elementwise",
    "embedding",
    "experts",
    "gradient_rule",
    "linear",
    "normalisation",
    "other",
]

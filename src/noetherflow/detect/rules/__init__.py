"""The exponent rules, one file per kind of operation. Importing this folder registers them all."""

from noetherflow.detect.rules import (
    attention,
    complex_numbers,
    contraction,
    convolution,
    elementwise,
    experts,
    filling,
    indexing,
    joining,
    moving,
    normalisation,
    padding,
    pooling,
    reduction,
)
from noetherflow.detect.rules.registry import RULES, exponent_rule

__all__ = [
    "RULES",
    "attention",
    "complex_numbers",
    "contraction",
    "convolution",
    "elementwise",
    "experts",
    "exponent_rule",
    "filling",
    "indexing",
    "joining",
    "moving",
    "normalisation",
    "padding",
    "pooling",
    "reduction",
]

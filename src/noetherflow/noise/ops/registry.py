"""Gradient rules by function of PyTorch."""

from collections.abc import Callable
from typing import Any

from noetherflow.noise.capture.mode import Rule

RULES: dict[Any, Rule] = {}


def gradient_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for functions in which parameters meet data; None stands for every other function.

    Args:
        functions: Functions of PyTorch, as `torch.overrides` hands them to a mode.

    Returns:
        The decorator.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register
